#!/bin/sh
# Makes .venv and installs what constraints.txt pins; `make` calls it first, and it takes no time once that is done.
# Where it cannot, it says why and what to do. PYTHON=<path> names the Python to build on.
set -eu
cd "$(dirname "$0")"
needed_gb=9 # the CUDA build of PyTorch unpacks to 6 GB, and uv keeps the downloads beside it

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The state the stamp stands for: these files, in this place (a moved .venv would import the old place's code).
wanted="$(pwd) $(cat setup.sh constraints.txt pyproject.toml | cksum)"
if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then exit 0; fi

free_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1000000) }')
if [ ! -e "$(echo .venv/lib/python3*/site-packages/torch)" ] && [ "$free_gb" -lt "$needed_gb" ]; then
    fail "the installation needs $needed_gb GB of free disk and $(pwd) has $free_gb GB;" \
        "free some, or move this folder to a larger disk"
fi

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
if ! .venv/bin/python -c "import pip; $new_enough" >/dev/null 2>&1; then
    candidates=${PYTHON:-python3.13 python3.12 python3.11 python3 python}
    python=
    for name in $candidates; do # asked, not believed: version managers put names on the PATH that only say "not installed"
        if "$name" -c "$new_enough" >/dev/null 2>&1; then python=$name && break; fi
    done
    [ -n "$python" ] || fail "no Python 3.11 or newer among: $candidates;" \
        "install one (your system's packages, or python.org), or name yours: make test PYTHON=/path/to/python3"
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || fail "$python lacks its venv module;" \
        "install it (Debian, Ubuntu: sudo apt install python3-venv) and run the same command again"
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || fail "$python could not make $(pwd)/.venv (its reason stands above)"
fi

if [ ! -x .venv/bin/uv ]; then
    said=$(.venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 2 uv 2>&1) || case $said in
    *"No space left"*) fail "the disk is full; free $needed_gb GB and run the same command again" ;;
    *Retrying* | *onnection*) fail "no network to download the packages; connect and run the same command again" ;;
    *) fail "pip could not install uv ($(printf '%s\n' "$said" | tail -n 1)); put that right and run the same command again" ;;
    esac
fi

echo "installing the packages of constraints.txt (the first time 3 GB are downloaded)"
# --constraint and not -r: the list holds the CUDA packages of Linux, which other systems neither need nor have.
# Compiled here: else the first start does it, or each one where Python may not write.
.venv/bin/uv pip install --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable '.[dev]' ||
    fail "the packages could not be installed (uv's reason stands above: network, or a full disk?);" \
        "run the same command again, it goes on where it stopped"
echo "$wanted" >.venv/installed
echo "ready; python train.py and all other commands: . .venv/bin/activate first"
