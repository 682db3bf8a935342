"""The README's commands are run, at nano size, in the order they stand there; its files exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


LESS = {
    "sweeps=table7": "sweeps=table6",
    "sweeps=tables": "sweeps=table6",
    "seeds=3": "seeds=1",
    "seed=0,1": "seed=0",
    "hydra.launcher.n_jobs=8": "hydra.launcher.n_jobs=2",
    "models=[1.7b:ldpv2,1.7b:pw2]": "models=[nano:pw2]",
}
"""Sweeps are run with fewer cells: the same words, three rows for seven, one seed for three. The device's bench with one small model."""

SMALLER = {"pocket-ldpv2-v2-unfreeze_llm-s0": "nano-pw2-v1-freeze_llm-s1"}
"""For exports the run with another projector: nano's grid of 8x8 is not the one that llama.cpp's ldpv2 has."""


def commands() -> list[list[str]]:
    """Every `python ...` line of the README's code blocks, comments cut off."""
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.slow  # a hundred seconds; CI runs it
def test_the_commands_run(nano_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    shutil.copy(ROOT / "tests/reference/images/img0.png", tmp_path / "pictures/own.png")
    shutil.copy(ROOT / "tests/reference/images/img1.png", tmp_path / "cat.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    (tmp_path / "mine.json").write_text(json.dumps([{"id": 1, "image": "own.png", "conversations": turns}] * 8))
    env = os.environ | {"MVLM_CACHE": str(nano_cache), "OMP_NUM_THREADS": "1"}
    ran = commands()
    assert len(ran) >= 6, "the README shows its commands"
    for words in ran:
        if "serve=true" in words:  # it would never end; tests/export/test_talk.py runs it
            continue
        renamed = [LESS.get(w, w) if words[0] == "bench.py" else w for w in words[1:]]
        if "gguf" in " ".join(words) or words[0] == "export.py":
            renamed = [w.replace(*pair) for w in renamed for pair in SMALLER.items()]
        renamed = [w.replace("pocket-", "nano-") for w in renamed]
        if "-m" in renamed:
            renamed = [LESS.get(w, w) for w in renamed if not w.startswith("model=")]
        command = words if words[0] == "-m" else [str(ROOT / words[0]), *renamed]
        if words[0] == "train.py":
            command += ["model=nano", "logger=csv", "benchmark=[gqa]", "controls=[]"]
        if words[0] == "doctor.py" or (words[0] == "report.py" and words[1].startswith("sweep=")):
            command += ["model=nano"]
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
