"""The peer of the benchmark loop: transformers' own `generate()` gives the same answers, and one that differs is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvlm.bench import evaluate

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model=nano", "target=evaluate", "precision=float32", "questions=10", "rounds=2", "max_new_tokens=5")


@pytest.fixture
def cfg(configure, monkeypatch):
    """Random weights wide enough apart that the model rambles; the usual 0.02 says nothing at all."""

    def talkative(model, cfg):
        generator = torch.Generator().manual_seed(1)
        for weight in model.language.parameters():
            torch.nn.init.normal_(weight.data, std=0.3, generator=generator)

    monkeypatch.setattr(evaluate.build, "pretrained", talkative)
    return configure(*SMALL, "benchmark=[gqa,sqa]", page="bench")


def test_both_ways_answer_alike_in_float32(cfg):
    """SQA has lettered prompts, so prompts of several lengths are padded."""
    measured = evaluate.run(cfg)
    assert measured["questions"] == 20 and measured["flips"] == 0
    assert measured["answer_tokens"] > 1
    assert all(len(rounds) == 2 for rounds in measured["seconds"].values())
    peer, ours = (measured["questions_per_second"][way] for way in reversed(measured["seconds"]))
    # Both are rounded to two places; the rates are above 1 a second at this size.
    assert measured["ratio"] == pytest.approx(ours / peer, rel=0.02)


def test_a_differing_answer_is_counted(cfg, monkeypatch):
    honest = evaluate.one_at_a_time

    def careless(*args, **kwargs):
        for number, (key, text) in enumerate(honest(*args, **kwargs)):
            yield key, text + " indeed" if number == 3 else text

    monkeypatch.setattr(evaluate, "one_at_a_time", careless)
    measured = evaluate.run(cfg)
    assert measured["flips"] == 1 and len(measured["flipped"]) == 1


@pytest.mark.slow  # a script of its own; CI runs it
def test_the_script_keeps_what_it_measured(tmp_path, nano_cache):
    env = os.environ | {"MVLM_CACHE": str(nano_cache)}
    command = [sys.executable, str(ROOT / "bench.py"), *SMALL, f"out={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "ratio of the median rounds" in done.stdout
    (kept,) = tmp_path.glob("evaluate-*.json")
    content = json.loads(kept.read_text())
    assert len(content["measured"]) == 1 and content["versions"]["torch"] and content["hardware"]["cores"]
    refused = subprocess.run([*command[:-1], "target=nothing"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (
        refused.returncode
        and "there is no such target (there are: decode, device, evaluate, index, soak, start, train)" in refused.stderr
    )
