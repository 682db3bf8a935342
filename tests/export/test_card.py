"""The card and the script say what the manifest says, and nothing that was not measured."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest

from mvlm.export.card import card, jetson
from mvlm.export.class_token import PATCH
from mvlm.export.engine import BUILD

TITLES = {"gqa": "GQA"}
PARITY = {
    "quant": "q4_k", "passed": True, "embedding_run": [0.001, 0.0021], "ties": [],
    "run": {"questions": 13, "same": 8, "tokens": 0.627, "first_logprob": 0.5224, "logprob": 3.4},
}  # fmt: skip


def about(**changes):
    return {
        "name": "it's a run",
        "quant": "q4_k",
        "tower": {"name": "vit"},
        "projector": {"type": "ldpnetv2", "in llama.cpp": "ldpv2", "image tokens": 144},
        "context": 4096,
        "files": {
            "language": {"name": "it's a run-q4_k.gguf", "bytes": 105_453_824, "sha256": "ab" * 32},
            "mmproj": {"name": "mmproj.gguf", "bytes": 41_620_096, "sha256": "cd" * 32},
        },
        "from": {"run": {"commit": "abc"}},
        "proven": True,
        "needs a mended llama.cpp": False,
        "engine": "xllamacpp 1",
        "parity": [PARITY],
        "scores": None,
        "notes": [],
    } | changes


def test_the_card_tells_what_was_measured():
    told = card(about(), TITLES)
    assert "| q4_k | 0.21% off | 8 of 13 | 62.7% | 0.522, 3.400 off | passed |" in told
    assert "105.5 MB" in told and "`abababababababab`" in told
    assert "Not measured in llama.cpp" in told and "class token" not in told


def test_the_card_tells_what_was_not():
    told = card(about(proven=False, parity=[], engine=None), TITLES)
    assert "never run" in told and "passed" not in told


def test_scores_beside_each_other():
    rows = {
        "gqa": {"pytorch": 47.92, "llama.cpp": 46.875, "questions": 96, "cut": 0},
        "mine": {"pytorch": None, "llama.cpp": 1.0, "questions": 2, "cut": 0},
    }
    told = card(about(scores={"protocol": "paper", "generated": True, "avg": None, "benchmarks": rows}), TITLES)
    assert "| GQA | 47.9 | 46.9 | 96 |" in told and "| mine | not measured | 1.0 | 2 |" in told
    assert "generated pocket benchmarks" in told


@pytest.mark.parametrize("mend", [False, True])
def test_the_script_is_one(tmp_path, mend):
    script = tmp_path / "jetson.sh"
    script.write_text(jetson(about(**{"needs a mended llama.cpp": mend})))
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "Never run on an Orin" in text and (PATCH in text) == mend
    assert "CMAKE_CUDA_ARCHITECTURES=87" in text


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("sha256sum"), reason="no bash or sha256sum here")
def test_the_script_asks_what_it_is_asked(tmp_path):
    """With a pretended llama.cpp: names with quotes and spaces arrive whole, a file of another content stops it."""
    programs = tmp_path / "llama" / "build" / "bin"
    programs.mkdir(parents=True)
    for name in ("llama-mtmd-cli", "llama-server"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (programs / name).chmod(0o755)
    told = about()
    for file in told["files"].values():
        (tmp_path / file["name"]).write_text("x")
        file["sha256"] = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
    (tmp_path / "jetson.sh").write_text(jetson(told))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(*words: str) -> subprocess.CompletedProcess:
        """From another folder, by a path that starts there."""
        env = {"LLAMA_CPP": str(tmp_path / "llama"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        command = ["bash", "../jetson.sh", *words]
        return subprocess.run(command, env=env, cwd=elsewhere, capture_output=True, text=True, check=False)

    done = call("ask", "my cat.png", "What's this?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "-m", "it's a run-q4_k.gguf", "--mmproj", "mmproj.gguf", "--jinja", "--temp", "0", "-c", "4096",
        "--image", str(elsewhere / "my cat.png"), "-p", "What's this?", "-ngl", "99",
    ]  # fmt: skip
    served = call("serve").stdout.splitlines()
    assert served[served.index("--host") + 1] == "127.0.0.1", "this device alone, unless told otherwise"
    assert served[:4] == ["-m", "it's a run-q4_k.gguf", "--mmproj", "mmproj.gguf"]
    for words, told in (
        (["speed"], "speed needs a picture"),
        (["speed", "none.png"], "none.png can't be read"),
        (["ask"], "ask needs a picture"),
        (["ask", "my cat.png"], "ask needs a question"),
    ):
        done = call(*words)
        assert done.returncode == 1 and told in done.stderr
    (elsewhere / "cat.png").touch()
    began, done = time.monotonic(), call("speed", "cat.png")
    assert done.returncode == 1 and "llama-server has ended" in done.stderr and "--port" in done.stderr
    assert time.monotonic() - began < 300, "and not after the 600 seconds that one may take to load"
    usage = call()
    assert usage.returncode == 2 and usage.stdout.count("./jetson.sh") == 3
    (tmp_path / "mmproj.gguf").write_text("y")
    assert call("ask", "a", "b").returncode == 1


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("sha256sum"), reason="no bash or sha256sum here")
def test_the_script_takes_no_llama_cpp_that_would_be_blind(tmp_path):
    """One that was built for a model without class token is left alone, a build that stopped half-way is gone on with, and one of the user's
    own that puts the token in the wrong place is refused."""
    tools, home = tmp_path / "tools", tmp_path / "home"
    for folder in (tools, home):
        folder.mkdir()
    line = "inp = ggml_concat(ctx0, inp, model.class_embedding, 1);"
    place = "tools/mtmd/models"
    git = f'for folder; do :; done; mkdir -p "$folder/{place}"; echo "{line}" >"$folder/{place}/llava.cpp"'
    cmake = (
        'if [ "$1" = --build ]; then mkdir -p "$2/bin"; for name in llama-mtmd-cli $LATER; do printf "#!/bin/sh\necho $2\n" '
        '>"$2/bin/$name"; chmod +x "$2/bin/$name"; done; [ "$LATER" ]; fi'
    )
    for name, text in {"git": git, "cmake": cmake}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)

    def call(mend: bool, **more: str) -> subprocess.CompletedProcess:
        told = about(**{"needs a mended llama.cpp": mend})
        for file in told["files"].values():
            (tmp_path / file["name"]).write_text("x")
            file["sha256"] = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
        (tmp_path / "jetson.sh").write_text(jetson(told))
        env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(home), "LATER": "llama-server"} | more
        command = ["bash", str(tmp_path / "jetson.sh"), "ask", "a", "b"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert call(False, LATER="").returncode == 1, "the build stops after its first program"
    plain, mended = call(False), call(True)
    assert plain.returncode == mended.returncode == 0, plain.stderr + mended.stderr
    built = [done.stdout.split()[-1] for done in (plain, mended)]
    assert built == [f"{home}/llama.cpp-{BUILD}/build", f"{home}/llama.cpp-{BUILD}-mended/build"]
    assert line in (home / f"llama.cpp-{BUILD}" / place / "llava.cpp").read_text()
    assert line not in (home / f"llama.cpp-{BUILD}-mended" / place / "llava.cpp").read_text()
    refused = call(True, LLAMA_CPP=f"{home}/llama.cpp-{BUILD}")
    assert refused.returncode == 1 and "misplaces the class token" in refused.stderr


def test_the_patch_mends_the_line(tmp_path):
    """The line as it stands in llama.cpp b11549."""
    file = tmp_path / "tools" / "mtmd" / "models" / "llava.cpp"
    file.parent.mkdir(parents=True)
    file.write_text("        inp = ggml_concat(ctx0, inp, model.class_embedding, 1);\n")
    subprocess.run(["bash", "-c", PATCH], env={"llama": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True)
    assert file.read_text() == "        inp = ggml_concat(ctx0, model.class_embedding, inp, 1);\n"
