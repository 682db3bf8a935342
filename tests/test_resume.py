"""A stage that is killed anywhere goes on as if nothing had been: the same samples, losses and weights, to the bit."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from mvlm import resume
from mvlm.replay import replay
from mvlm.strategy.stage import Stage

ROOT = Path(__file__).resolve().parents[1]


class Killed(BaseException):
    """As sudden as a kill: no handler of errors sees it."""


@pytest.fixture
def train(finetuned):
    """`train(runs)`: into one run folder; what is there is gone on from."""
    return lambda runs, *words: finetuned(runs, "cell=c", "checkpoint_every=1", *words)


@pytest.fixture
def dies(monkeypatch):
    """Make a training die at a micro-batch, before or after its loss is known."""

    def arrange(at: int | None, seen: list | None = None) -> None:
        count, real = iter(range(10**6)), plain

        def training_step(self, batch, index):
            if next(count) == at:
                raise Killed
            if seen is not None:
                seen.append((self.global_step, batch.ids))
            return real(self, batch, index)

        monkeypatch.setattr(Stage, "training_step", training_step)

    plain = Stage.training_step
    return arrange


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def whole(train, dies, tmp_path_factory, made={}):  # noqa: B006  once for all tests
    """An uninterrupted training's folder."""
    if not made:
        dies(None, made.setdefault("seen", []))
        made["folder"] = train(tmp_path_factory.mktemp("whole"))
    dies.seen = made["seen"]
    return made["folder"]


def told(folder: Path) -> dict:
    facts = json.loads((folder / "stage.json").read_text())
    return {key: facts[key] for key in ("history", "moved", "steps", "skipped", "samples")}


@pytest.mark.parametrize("at", [0, 3, 5, 8])
def test_killed_at_a_micro_batch(train, dies, whole, tmp_path, at) -> None:
    """5 steps of 2 micro-batches: killed before anything, in the middle of a step's sum, between steps, in the last step."""
    first, second = [], []
    dies(at, first)
    with pytest.raises(Killed):
        train(tmp_path)
    dies(None, second)
    folder = train(tmp_path)
    assert told(folder) == told(whole)
    assert weights(folder) == weights(whole) and weights(whole)
    assert rows(folder) == rows(whole)
    begun = second[0][0]
    assert begun == (at // 2 if at > 1 else 0), "it went on from the step it died in"
    assert [one for one in first if one[0] < begun] + second == dies.seen and len(dies.seen) == 10
    assert resume.checkpoints(folder) == [], "a finished stage keeps none"


def test_the_newest_whole_one_is_taken(train, dies, whole, tmp_path, caplog) -> None:
    """The last checkpoint loses a byte: it is told, and the one before it gives the same weights in the end."""
    dies(6)
    with pytest.raises(Killed):
        train(tmp_path)
    last, before = resume.checkpoints(tmp_path / "c" / "finetune")
    assert (last.name, before.name) == ("step-3", "step-2"), "older ones are pruned"
    file = last / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    dies(None)
    folder = train(tmp_path)
    assert "step-3 is left out: its tensors are not those that were written" in caplog.text
    assert weights(folder) == weights(whole)


def test_told_to_stop(train, monkeypatch, whole, tmp_path) -> None:
    """A signal in a step: the step is ended, all is saved, and the exit code asks to be started again."""
    real = Stage.training_step

    def training_step(self, batch, index):
        if self.global_step == 2:
            signal.raise_signal(signal.SIGUSR1)
        return real(self, batch, index)

    handler = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(Stage, "training_step", training_step)
        train(tmp_path, "checkpoint_every=null")
    assert ended.value.code == resume.REQUEUE == 75 and signal.getsignal(signal.SIGUSR1) == handler
    assert [p.name for p in resume.checkpoints(tmp_path / "c" / "finetune")] == ["step-3"]
    assert weights(train(tmp_path)) == weights(whole)


def test_a_full_disk_leaves_the_one_before(train, dies, monkeypatch, whole, tmp_path) -> None:
    real, count = resume.save_file, iter(range(10))

    def full(tensors, path):
        if next(count) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    with (
        monkeypatch.context() as patched,
        pytest.raises(OSError, match=r"step-3 could not be written .*No space left.* GB are free there"),
    ):
        patched.setattr(resume, "save_file", full)
        train(tmp_path)
    folder = tmp_path / "c" / "finetune"
    assert [p.name for p in resume.checkpoints(folder)] == ["step-2", "step-1"] and not list(folder.glob("*.part"))
    assert weights(train(tmp_path)) == weights(whole)


def test_a_checkpoint_is_tensors_and_json(tmp_path) -> None:
    io = resume.PlainCheckpoints({"seed": 0})
    shared = torch.arange(6.0)
    tree = {"a": [shared, shared.view(2, 3).T], 3: ("x", None, 1.5, float("inf")), "deep": {"b": {True: shared[:0]}}}
    io.save_checkpoint(tree, tmp_path / "step-1")
    assert {p.name for p in (tmp_path / "step-1").iterdir()} == {"tensors.safetensors", "state.json"}
    back = io.load_checkpoint(tmp_path / "step-1")
    assert back[3] == tree[3] and back["a"][1].equal(tree["a"][1]) and back["deep"]["b"][True].shape == (0,)
    with pytest.raises(TypeError, match="not a set"):
        io.save_checkpoint({"a": {1}}, tmp_path / "step-2")
    assert not (tmp_path / "step-2").exists()


def test_another_configuration_is_refused(tmp_path) -> None:
    resume.PlainCheckpoints({"seed": 0, "recipe.clip": 1.0}).save_checkpoint({}, tmp_path / "step-1")
    with pytest.raises(ValueError, match=r"another configuration:\n  recipe.clip: 1.0 there, 2.0 here"):
        resume.PlainCheckpoints({"seed": 0, "recipe.clip": 2.0}).load_checkpoint(tmp_path / "step-1")


def test_names_alone_make_no_checkpoint(tmp_path, caplog) -> None:
    for name in ("step-7.part", "step-x", "step-9"):
        (tmp_path / name).mkdir()
    assert resume.newest(tmp_path) is None and "step-9 is left out: it is not whole" in caplog.text
    shutil.rmtree(tmp_path / "step-9")
    assert resume.newest(tmp_path) is None


SCRIPT = """
import os, random, runpy, signal, sys, time
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from mvlm import build, fit, score
torch.set_num_threads(1)
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # as in conftest.py
main = runpy.run_path("train.py")["main"]

def start(cell):
    if (child := os.fork()) == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        with initialize_config_dir(os.path.abspath("conf"), version_base="1.3"):
            words = [*sys.argv[1:], f"cell={cell}"]
            HydraConfig.instance().set_config(compose("train", words, return_hydra_config=True))
            cfg = compose("train", words)
        main(cfg)
        os._exit(0)
    return child

began = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
took = time.monotonic() - began
draw, kills, cells = random.Random(0), 0, 0
while kills < KILLS:
    child = start(f"killed{cells}")
    end = time.monotonic() + draw.uniform(0, took / 2)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.002)
    if ended[0]:
        assert ended[1] == 0, ended
        cells += 1
        continue
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
assert os.waitpid(start(f"killed{cells}"), 0)[1] == 0
print(kills, cells + 1)
"""
"""A whole run, uninterrupted; then the same again and again, killed at moments drawn by lot and repeated until it has ended by itself."""


@pytest.mark.slow
def test_killed_at_twenty_random_moments(nano_cache, tmp_path) -> None:
    """In both stages, between them, while a checkpoint is written and while the benchmarks are answered."""
    words = [
        "model=nano",
        "trainer=cpu",
        "trainer.precision=32-true",
        "logger=csv",
        "checkpoint_every=1",
        f"runs={tmp_path}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("KILLS", "20"), *words],
        cwd=ROOT, env={**os.environ, "MVLM_CACHE": str(nano_cache)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kills, cells = map(int, done.stdout.split())
    assert kills == 20 and cells >= 1
    whole = tmp_path / "whole"
    for number in range(cells):
        run = tmp_path / f"killed{number}"
        for stage in ("pretrain", "finetune"):
            assert told(run / stage) == told(whole / stage)
            assert weights(run / stage) == weights(whole / stage)
            assert rows(run / stage) == rows(whole / stage)
        for file in sorted((whole / "answers").rglob("*.jsonl")):
            beside = run / "answers" / file.relative_to(whole / "answers")
            assert sorted(beside.read_text().splitlines()) == sorted(file.read_text().splitlines()), file.name
        scored = [json.loads((r / "results.json").read_text()) for r in (run, whole)]
        assert scored[0]["benchmarks"] == scored[1]["benchmarks"] and scored[0]["avg"] == scored[1]["avg"]


# ------------------------------------------------------------------------------------------------------- divergence


def diverges(monkeypatch, at: set[int], how) -> None:
    real = Stage.training_step

    def training_step(self, batch, index):
        loss = real(self, batch, index)
        return how(self, loss) if self.global_step in at or -1 in at else loss

    monkeypatch.setattr(Stage, "training_step", training_step)


def poisoned(stage: Stage, loss):
    """A gradient that is no number under a loss that is one."""
    return loss + (next(p for g in stage.groups for p in g["params"]).sum() * 0).sqrt()


def test_a_gradient_that_is_no_number_stops_before_any_weight_changes(train, monkeypatch, tmp_path) -> None:
    diverges(monkeypatch, {2}, poisoned)
    with pytest.raises(
        ValueError,
        match=r"finetune, step 3 diverged: its loss is [\d.]+ and the norm of its gradient nan.*doctor.py replay=",
    ):
        train(tmp_path)
    folder = tmp_path / "c" / "finetune"
    replayed = json.loads((folder / "diverged-3.json").read_text())
    assert len(replayed["ids"]) > 1 and [one["step"] for one in replayed["losses"]] == [1, 2]
    assert resume.newest(folder).name == "step-2"

    rows = replay(folder / "diverged-3.json")
    assert sorted(row[0] for row in rows) == sorted(replayed["ids"])
    # Within 2 %: the step itself had dropout in its adapters.
    assert sum(row[2] * row[3] for row in rows) / sum(row[2] for row in rows) == pytest.approx(
        replayed["loss"], rel=0.02
    )
    (folder / "diverged-3.json").write_text(json.dumps(replayed | {"ids": ["another"]}))
    with pytest.raises(ValueError, match=r"has the samples .* now, and had \['another'\]"):
        replay(folder / "diverged-3.json")


def test_a_first_step_that_diverged_is_shown_from_what_the_stage_began_with(train, monkeypatch, tmp_path) -> None:
    """The projector that the start from words made, too: another one gives other losses."""
    diverges(monkeypatch, {0}, poisoned)
    with pytest.raises(ValueError, match="step 1 diverged"):
        train(tmp_path, "recipe.start=words", "recipe.cache_features=true")
    folder = tmp_path / "c" / "finetune"
    told = json.loads((folder / "diverged-1.json").read_text())

    def mean(rows: list) -> float:
        return sum(row[2] * row[3] for row in rows) / sum(row[2] for row in rows)

    began = mean(replay(folder / "diverged-1.json"))
    assert began == pytest.approx(told["loss"], rel=0.02)
    (folder / "start.safetensors").unlink()
    other = mean(replay(folder / "diverged-1.json"))
    assert abs(other - told["loss"]) > abs(began - told["loss"])


def test_such_a_step_is_skipped_by_policy(train, monkeypatch, tmp_path) -> None:
    """Only that one: it has no effect on a weight, the others have theirs, and the record counts it."""
    diverges(monkeypatch, {2}, poisoned)
    folder = train(tmp_path, "on_divergence=skip")
    facts = json.loads((folder / "stage.json").read_text())
    assert [one["step"] for one in facts["skipped_steps"]] == [3] and len(facts["history"]) == 5
    assert all(t.isfinite().all() for file in folder.glob("*.safetensors") for t in load_file(file).values())


def test_skipping_has_an_end(train, monkeypatch, tmp_path) -> None:
    diverges(monkeypatch, {-1}, poisoned)
    with pytest.raises(ValueError, match=r"step 5 diverged.*5 in a row are too many"):
        train(tmp_path, "on_divergence=skip")


def test_a_spike_is_far_above_the_middle_of_many(configure) -> None:
    stage = object.__new__(Stage)
    L.LightningModule.__init__(stage)
    stage.history = [{"loss": 1.0}] * 31
    assert not stage._diverged(50.0, 1.0), "too few steps to say"
    stage.history = [{"loss": 1.0}] * 32
    assert "32 steps before have 1 in the middle" in stage._diverged(4.5, 1.0)
    assert not stage._diverged(3.9, 1.0)
    stage.history = [{"loss": 0.01}] * 32
    assert not stage._diverged(1.9, 1.0), "small losses jump by large factors"
    assert "nan" in stage._diverged(float("nan"), 1.0)
