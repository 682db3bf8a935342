"""`make` sets everything up by itself: setup.sh is run here with pretended Pythons, a pretended uv and its own PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "awk", "cat", "chmod", "cksum", "cp", "df", "dirname", "mkdir", "tail")

PYTHON = """#!/bin/sh
# Says of itself what the environment tells it to, and makes a .venv out of a copy of itself.
case "$*" in
*sys.version_info*) exit "${TOO_OLD:-0}" ;;
"-c import venv, ensurepip") exit "${NO_VENV:-0}" ;;
--version) echo "Python 3.12.0" ;;
"-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*"pip install"*)
    if [ -n "${PIP_SAYS:-}" ]; then echo "$PIP_SAYS" >&2; exit 1; fi
    printf '#!/bin/sh\\necho "$*" >>uv.log\\nexit "${UV_FAILS:-0}"\\n' >.venv/bin/uv
    chmod +x .venv/bin/uv ;;
esac
"""


class Place:
    """A fresh clone with nothing on its PATH but a few plain tools and the Pythons a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.bin = folder / "my clone", folder / "bin"
        self.clone.mkdir()
        self.bin.mkdir()
        for name in ("setup.sh", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.clone)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.command("df", "#!/bin/sh\nprintf 'head\\n/dev/x 9 9 99000000 9 /\\n'\n")

    def command(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.clone / "setup.sh")],
            cwd=self.clone.parent,  # it must find its own folder
            env={"PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
        )

    def refusal(self, **environment: str) -> str:
        done = self.setup(**environment)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    @property
    def installations(self) -> list[str]:
        log = self.clone / "uv.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_installs_once(place):
    place.command("python3", PYTHON)
    assert place.setup().returncode == 0
    assert place.installations == [
        "pip install --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable .[dev]"
    ]
    second = place.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(place.installations) == 1


def test_installs_again_when_the_pins_change(place):
    place.command("python3", PYTHON)
    place.setup()
    with (place.clone / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    place.setup()
    place.setup()
    assert len(place.installations) == 2


def test_installs_again_in_a_moved_folder(place):
    place.command("python3", PYTHON)
    place.setup()
    place.clone = place.clone.rename(place.clone.with_name("moved"))
    assert place.setup().returncode == 0
    assert len(place.installations) == 2


def test_a_failed_installation_is_not_taken_for_done(place):
    place.command("python3", PYTHON)
    assert "run the same command again" in place.refusal(UV_FAILS="2")
    assert place.setup().returncode == 0
    assert len(place.installations) == 2


def test_no_python(place):
    line = place.refusal()
    assert "no Python 3.11 or newer" in line and "PYTHON=/path/to/python3" in line


def test_python_too_old(place):
    place.command("python3", PYTHON)
    assert "no Python 3.11 or newer" in place.refusal(TOO_OLD="1")


def test_a_name_that_is_no_python_is_passed_over(place):
    """A version manager's stand-in for a version that is not installed."""
    place.command("python3.13", "#!/bin/sh\necho 'python3.13: command not found' >&2\nexit 127\n")
    place.command("python3.11", PYTHON)
    assert "Python 3.12.0" in place.setup().stdout  # the version the pretended python3.11 claims


def test_the_python_asked_for(place, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text(PYTHON)
    mine.chmod(0o755)
    assert place.setup(PYTHON=str(mine)).returncode == 0


def test_no_venv_module(place):
    place.command("python3", PYTHON)
    assert "python3-venv" in place.refusal(NO_VENV="1")


@pytest.mark.parametrize(
    ("pip_says", "expected"),
    [
        ("WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'", "no network"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something new", "ERROR: something new"),
    ],
)
def test_uv_cannot_be_had(place, pip_says, expected):
    place.command("python3", PYTHON)
    line = place.refusal(PIP_SAYS=pip_says)
    assert expected in line and "run the same command again" in line


def test_too_little_disk(place):
    place.command("python3", PYTHON)
    place.command("df", "#!/bin/sh\nprintf 'head\\n/dev/x 9 9 5200000 9 /\\n'\n")
    line = place.refusal()
    assert "needs 9 GB" in line and "has 5 GB" in line
    (place.clone / ".venv/lib/python3.12/site-packages/torch").mkdir(parents=True)  # the large part is there already
    assert place.setup().returncode == 0


# --------------------------------------------------------------------------------------------------- the files it reads


def make(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_no_test_sees_a_gpu():
    """Nor does what it starts: else figures that are equal to the bit here would differ where there is one."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_alone_lists_every_target():
    listed = re.findall(r"^  make (\S+)", make(), re.MULTILINE)
    assert listed == re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "gpu", "check"])
def test_make_sets_up_before_anything_else(target):
    first, *others = make("--dry-run", target).splitlines()
    assert first == "./setup.sh"
    assert others and all(line.startswith((".venv/bin/python", "page=")) for line in others)


def test_pins_are_whole_and_plain():
    """Exact versions, no address of any index, and every package that pyproject.toml names is among them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        name, version = re.fullmatch(r"([a-z0-9-]+)==([a-z0-9.]+)", line).groups()
        pins[name] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (own,) = [line for line in extras["dev"] if line.startswith("mvlm[")]
    needed = [*project["dependencies"], *extras["dev"]]
    needed += [line for name in own.removeprefix("mvlm[").removesuffix("]").split(",") for line in extras[name]]
    needed.remove(own)
    names = [re.match(r"[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-") for line in needed]
    assert [name for name in names if name not in pins] == []
