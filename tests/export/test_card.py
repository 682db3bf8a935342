"""The card and the script say what the manifest says, and nothing that was not measured."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from mvlm.export.card import card, jetson
from mvlm.export.class_token import PATCH

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

    def call(*words: str) -> subprocess.CompletedProcess:
        command = ["bash", str(tmp_path / "jetson.sh"), *words]
        env = {"LLAMA_CPP": str(tmp_path / "llama"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    done = call("ask", "my cat.png", "What's this?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "-m", "it's a run-q4_k.gguf", "--mmproj", "mmproj.gguf", "--jinja", "--temp", "0", "-c", "4096",
        "--image", "my cat.png", "-p", "What's this?", "-ngl", "99",
    ]  # fmt: skip
    served = call("serve").stdout.splitlines()
    assert served[served.index("--host") + 1] == "127.0.0.1", "this device alone, unless told otherwise"
    assert served[:4] == ["-m", "it's a run-q4_k.gguf", "--mmproj", "mmproj.gguf"]
    assert call("speed").returncode == 1 and call("speed", "no such picture").returncode == 1
    usage = call()
    assert usage.returncode == 2 and usage.stdout.count("./jetson.sh") == 3
    (tmp_path / "mmproj.gguf").write_text("y")
    assert call("ask", "a", "b").returncode == 1


def test_the_patch_mends_the_line(tmp_path):
    """The line as it stands in llama.cpp b11549."""
    file = tmp_path / "tools" / "mtmd" / "models" / "llava.cpp"
    file.parent.mkdir(parents=True)
    file.write_text("        inp = ggml_concat(ctx0, inp, model.class_embedding, 1);\n")
    subprocess.run(["bash", "-c", PATCH], env={"llama": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True)
    assert file.read_text() == "        inp = ggml_concat(ctx0, model.class_embedding, inp, 1);\n"
