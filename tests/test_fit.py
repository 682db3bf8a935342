"""Validation while a stage trains: seen by the loggers, not by the training; refused where it cannot be."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from mvlm import build, fit
from mvlm.benchmark.metric import BenchmarkMetric
from mvlm.data.datamodule import Skips


@pytest.fixture
def train(finetuned):
    """`train(runs, "val_every=2")`: the history and the rows of metrics.csv of a training into a run folder of its own."""

    def trained(runs: Path, *words: str) -> tuple[list[dict], list[dict[str, str]]]:
        folder = finetuned(runs, f"cell=c{len(list(runs.iterdir()))}", *words)
        history = json.loads((folder / "stage.json").read_text())["history"]
        with (folder / "metrics.csv").open() as file:
            return history, list(csv.DictReader(file))

    return trained


def test_validation_is_logged_and_changes_no_loss(train, tmp_path: Path) -> None:
    """Bit for bit, on one thread: a draw by lot, a mode or a gradient left changed would show in the dropout or in the weights."""
    plain, _ = train(tmp_path)
    watched, rows = train(tmp_path, "val_every=2", "val_items=4")
    assert watched == plain and len(plain) == 5
    told = [row for row in rows if row.get("val/avg")]
    assert [int(row["step"]) + 1 for row in told] == [2, 4], "once a step, not a micro-batch"
    six = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")
    for row in told:
        assert float(row["val/avg"]) == pytest.approx(sum(float(row[f"val/{name}"]) for name in six) / 6)
        assert all(float(row[f"val/{name}_items"]) >= 4 for name in six)


def test_no_average_without_all_six(train, tmp_path: Path) -> None:
    _, rows = train(tmp_path, "val_every=5", "val_items=3", "benchmark=[pope,gqa]")
    told = [row for row in rows if row.get("val/pope")]
    assert told and all(row["val/gqa_items"] and "val/avg" not in row for row in told)


@pytest.mark.parametrize(
    "words, told",
    [
        (["val_every=0"], "val_every=0 and val_items=64 count optimizer steps and questions: at least 1"),
        (["val_every=5", "val_items=0"], "val_items=0"),
        (["val_every=5", "trainer.strategy=deepspeed_stage_3"], "keeps a piece of the weights on each device"),
        (["val_every=5", "benchmark_root=/nowhere"], "/nowhere/gqa"),
    ],
)
def test_validation_that_cannot_be_is_refused(configure, words: list[str], told: str) -> None:
    cfg = configure("model=nano", *words)
    with pytest.raises(ValueError, match=told):
        fit.validation(cfg, build.corpus(cfg))


def test_it_is_off_by_default(configure) -> None:
    cfg = configure("model=nano")
    assert fit.validation(cfg, build.corpus(cfg)) == []
    (one,) = fit.validation(configure("model=nano", "val_every=5", "benchmark=[pope]"), build.corpus(cfg))
    assert isinstance(one, BenchmarkMetric)


@pytest.mark.parametrize("cached", [True, False])
def test_bad_samples_are_skipped_by_policy(train, tmp_path: Path, monkeypatch, cached: bool) -> None:
    """A torn and a missing picture among 20, one sample a step: by `skip` the steps are as planned, stage.json says what was left out,
    and the loss is of the others; by `stop` nothing begins that cannot end; above the limit the run stops."""
    names = [f"{k}.png" for k in range(18)] + ["torn.png", "gone.png"]
    for name in names[:18]:
        Image.new("RGB", (20, 12), "red").save(tmp_path / name)
    (tmp_path / "torn.png").write_bytes(b"torn")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": k, "image": name, "conversations": turns} for k, name in enumerate(names)]
    (tmp_path / "pets.json").write_text(json.dumps(records))
    words = (
        "data=custom", f"data.finetune=[{tmp_path / 'pets.json'}]", f"data.images={tmp_path}", "features=null",
        "recipe.finetune.batch=1", "recipe.finetune.micro_batch=1", f"recipe.cache_features={str(cached).lower()}",
    )  # fmt: skip
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"record 19 \(id 19\): picture .*gone\.png is missing"):
        train(tmp_path / "runs", *words)
    with pytest.raises(
        ValueError,
        match=r"[12] of 20 samples are bad, more than 0\.02, the limit \(0\.1%\): .*pets.* 1 missing picture",
    ):
        train(tmp_path / "runs", *words, "on_bad_sample=skip")
    monkeypatch.setattr(fit, "Skips", partial(Skips, limit=0.2))
    history, _ = train(tmp_path / "runs", *words, "on_bad_sample=skip")
    (facts,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/finetune/stage.json"))
    told = facts["skipped"]
    assert told["counts"] == {next(iter(facts["samples"])): {"missing picture": 1, "not a picture": 1}}
    assert (told["total"], told["of"], facts["held_out"]) == (2, 20, 2)
    assert [entry["loss"] for entry in history].count(0) == 1, "the torn one's own step, in which nothing is learned"
    assert len(history) == facts["steps"] == 17
    records[19]["image"] = "0.png"
    (tmp_path / "pets.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"record 18 \(id 18\): .*torn\.png: this is not a picture"):
        train(tmp_path / "runs", *words)


def test_layers_computed_again_change_no_loss(train, tmp_path: Path, monkeypatch) -> None:
    """Bit for bit with dropout in the adapters; and that they are computed twice is counted."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, real = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or real(self, x))
    counts, histories = [], []
    for word in ("false", "true"):
        histories.append(train(tmp_path, f"checkpointing={word}")[0])
        counts.append(sum(calls))
        calls.clear()
    assert histories[0] == histories[1]
    assert counts == [10 * 2, 2 * 10 * 2], "10 micro-batches through 2 layers"
