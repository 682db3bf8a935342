"""Sweeps: what a command line names, what is refused before anything is trained, and what a cell leaves however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from mvlm import sweep, table
from mvlm.run import Run, duration, file_hash
from mvlm.sweep import Cell, Sweep, at_a_time, cells, check, main, outcome

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page.stem for page in (ROOT / "sweeps").glob("*.yaml"))
NANO = ["model=nano", "trainer=cpu", "logger=csv", "benchmark=[pope]", "controls=[]"]


# -- what a command line names


@pytest.mark.parametrize("name", PAGES)
def test_every_page_composes(name: str) -> None:
    tables = Sweep.read(name)
    found = cells([f"sweeps={name}"])
    assert sorted({row for cell in found for row in cell.rows}) == sorted(
        f"{t.name} {row}" for t in tables for row in t.rows
    )


def test_tables_6_and_7_are_eight_trainings() -> None:
    found = cells(["sweeps=tables"])
    assert len(found) == 8
    assert [cell.rows for cell in found if len(cell.rows) > 1] == [
        ("table6 (a)", "table7 2"),
        ("table6 (c)", "table7 4"),
    ]
    assert len(cells(["sweeps=table6,table7"])) == 8, "the same, by both names"


def test_a_cell_is_the_run_that_its_words_train() -> None:
    """The sweep's folder is what `python train.py` with the cell's words would take: checked by composing them alone."""
    from hydra import initialize_config_dir

    (cell,) = [c for c in cells(["sweeps=table7", *NANO, "runs=elsewhere", "seed=3"]) if c.rows == ("table7 7",)]
    assert cell.run.folder == Path("elsewhere/nano-ldpv2-v2-unfreeze_llm-s3")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert Cell.composed(cell.overrides).cfg == cell.cfg


def test_seeds_and_products() -> None:
    assert [c.name[-2:] for c in cells(["sweeps=table6", "seeds=2"])] == ["s0"] * 3 + ["s1"] * 3, "a whole table first"
    names = [c.name for c in cells(["projector=pw2,ldpv2", "seed=0,5"])]
    assert names == [f"pocket-{p}-v2-unfreeze_llm-s{s}" for p in ("pw2", "ldpv2") for s in (0, 5)]


def test_seeds_of_an_overridden_cell_differ_in_their_number_only() -> None:
    one, two = (c.name for c in cells(["recipe.warmup=0.1", "seeds=2"]))
    assert one != two and one.replace("-s0-", "-s1-") == two


def test_where_data_and_caches_lie_names_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    (here,) = cells(["recipe.warmup=0.1"])
    monkeypatch.setenv("MVLM_CACHE", "/elsewhere")
    (there,) = cells(["recipe.warmup=0.1"])
    assert here.name == there.name
    (moved,) = cells(["model=1.7b", "corpus.root=/data", "trainer=ddp"])
    assert moved.name == "1.7b-ldpv2-v2-unfreeze_llm-s0"


@pytest.mark.parametrize(
    "words, told",
    [
        (["sweeps=tabel7"], "did you mean 'table7'"),
        (["sweeps=table7", "projector=ldpv2"], "projector: the row table7 1 sets that itself"),
        (["sweeps=table6", "seeds=0"], "seeds=0: give a number of seeds from 1"),
        (["sweeps=table6", "seeds=2", "seed=1"], "not both"),
        (["sweeps=table6", "cell=mine"], "leave it out"),
        (["projector=pw2", "+projector.pool=1", "model.module.grid=3"], "cannot be composed"),
    ],
)
def test_what_is_meant_wrongly_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cells(words)


def test_a_page_of_ones_own(pages: Path) -> None:
    (pages / "mine.yaml").write_text("title: t\npublished: null\ncells:\n  a: {seed: 1}\n  b: {projektor: pw2}\n")
    with pytest.raises(ValueError, match="did you mean 'projector'"):
        cells(["sweeps=mine"])
    (pages / "mine.yaml").write_text("cells: [1]\n")
    with pytest.raises(ValueError, match="must have title"):
        cells(["sweeps=mine"])


def test_a_page_says_null_and_lists_as_pages_do(pages: Path) -> None:
    (pages / "mine.yaml").write_text(
        "title: t\npublished: null\ncells:\n"
        "  a: {recipe.clip: null, strategy.pretrain.rates.language: null, exclude: null}\n"
        "  b: {benchmark: [gqa, pope], recipe.optimizer.betas: [0.9, 0.95], recipe.cache_features: false}\n"
    )
    a, b = cells(["sweeps=mine"])
    assert a.cfg.recipe.clip is None and a.cfg.strategy.pretrain.rates.language is None and a.cfg.exclude is None
    assert [*b.cfg.benchmark] == ["gqa", "pope"] and list(b.cfg.recipe.optimizer.betas) == [0.9, 0.95]
    assert b.cfg.recipe.cache_features is False


@pytest.mark.parametrize("words", [["trainer.precision=32-true,bf16-mixed"], ["protocol=paper,harness"]])
def test_two_cells_that_one_folder_would_hold_are_refused(words: list[str]) -> None:
    """Else one of them would never be trained, and its row would show the other's scores."""
    key = words[0].split("=")[0]
    with pytest.raises(
        ValueError, match=rf"would be trained once for two cells, {key}=.* and {key}=[^:]*:(.|\n)*  {key}: "
    ):
        cells(words)
    assert len(cells(["sweeps=table6,table7"])) == 8, "the same cell in two tables is one"


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of sweeps/."""
    monkeypatch.setattr(sweep, "SWEEPS", tmp_path)
    return tmp_path


# -- what is refused before anything is trained


def test_every_wrong_cell_is_told_at_once(tmp_path: Path) -> None:
    begun = tmp_path / "nano-ldpv1-v2-freeze_llm-s0" / "pretrain" / "stage.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    other = cells(["sweeps=table6", *NANO, "recipe.warmup=0.5"])[1].cfg
    OmegaConf.save(
        OmegaConf.create(OmegaConf.to_container(other, resolve=True)),
        tmp_path / "nano-ldpv1-v2-freeze_llm-s0" / "config.yaml",
    )
    with pytest.raises(ValueError) as refused:
        check(cells(["sweeps=table6", *NANO, f"runs={tmp_path}"]), jobs=1)
    assert "1 of 3 cells cannot be trained" in str(refused.value) and "recipe.warmup: 0.5 there, 0.03 here" in str(
        refused.value
    )
    with pytest.raises(ValueError) as refused:
        check(cells(["sweeps=table6", *NANO, f"runs={tmp_path / 'new'}", "recipe.finetune.micro_batch=3"]), jobs=1)
    assert "3 of 3 cells" in str(refused.value) and str(refused.value).count("batch") >= 3
    assert not (tmp_path / "new").exists()


def test_a_cell_that_was_trained_on_other_data_is_refused(tmp_path: Path) -> None:
    """As a single run is: else an old model's scores would stand for the data as they are now."""
    file = tmp_path / "mine.json"
    file.write_text("[" + ", ".join(['{"conversations": []}'] * 9) + "]")
    words = ["model=nano", "data=custom", f"data.finetune=[{file}]", f"runs={tmp_path / 'runs'}", "evaluate=false"]
    (cell,) = cells(words)
    trained = cell.run.folder / "finetune" / "stage.json"
    trained.parent.mkdir(parents=True)
    trained.write_text("{}")
    cell.run.note(data_sha256={"finetune/mine.json": file_hash(file)})
    check([cell], jobs=1)
    file.write_text(file.read_text().replace("[]}", "[ ]}"))
    sweep.hashed.cache_clear()
    with pytest.raises(ValueError, match=r"begun with other data: finetune/mine.json changed"):
        check(cells(words), jobs=1)


def test_a_cluster_that_is_not_here_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r'Could not detect "srun".* leave out hydra/launcher='):
        main([*NANO, f"runs={tmp_path}", "evaluate=false", "hydra/launcher=submitit_slurm"])


def test_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nano cell's states: 16 bytes a learning parameter, 4 a frozen one; two cells at a time need twice that."""
    (cell, *_) = cells(["sweeps=table6", *NANO])
    made = check([cell], jobs=1)[cell.name]
    stage = made.stages["finetune"]
    learning = sum(stage.learning.values())
    held = 16 * learning + 4 * (stage.parameters - learning)
    work = stage.micro_batch * (stage.activations.checkpointed + stage.activations.logits)
    monkeypatch.setattr(sweep, "physical_memory", lambda: held + work)
    check([cell], jobs=1)
    monkeypatch.setattr(sweep, "physical_memory", lambda: held + work - 1)
    with pytest.raises(ValueError, match="finetune needs about"):
        check([cell], jobs=1)
    monkeypatch.setattr(sweep, "physical_memory", lambda: 2 * (held + work) - 1)
    with pytest.raises(ValueError, match="2 processes at a time"):
        check([cell], jobs=2)
    check([cell], jobs=None)  # it will run on another machine


# -- what a cell leaves. A script stands for train.py, so no model is trained: it does what the key `max` of the recipe says


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
said = dict(word.split("=", 1) for word in sys.argv[1:])
print("working", os.environ["WANDB_RUN_GROUP"], flush=True)
does = said["recipe.warmup"]
if does == "0.1":
    sys.exit("error: the data are gone")
if does == "0.2":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "0.3":
    time.sleep(60)
if does == "0.4":
    sys.exit(0)
if does == "0.5":
    sys.exit(75)
(folder,) = [p for p in Path(said["runs"]).iterdir() if p.is_dir()]
(folder / "config.yaml").write_text("seed: 0")
for stage in ("pretrain", "finetune"):
    (folder / stage).mkdir()
    (folder / stage / "stage.json").write_text("{}")
(folder / "results.json").write_text(json.dumps({"benchmarks": {"pope": {"none": {}}}}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs folder of sweeps whose cells do what STAND_IN does."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "check", lambda cells, jobs: {cell.name: SimpleNamespace(stages={}) for cell in cells})
    monkeypatch.setattr(sweep, "pace", lambda cells, made: (1.0, "nothing"))
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "runs"
    signal.signal(signal.SIGTERM, before)
    os.environ.pop("WANDB_RUN_GROUP", None)


@pytest.mark.parametrize(
    "does, state, error",
    [
        ("0.0", "done", None),
        ("0.1", "failed", "error: the data are gone"),
        ("0.2", "killed", "by SIGKILL"),
        ("0.5", "killed", "told to stop; it goes on when it is started again"),
        ("0.4", "failed", "ended without an error and without its scores"),
    ],
)
def test_an_outcome_is_what_happened(
    stand_in: Path, capfd: pytest.CaptureFixture, does: str, state: str, error: str | None
) -> None:
    words = [*NANO, f"runs={stand_in}", f"recipe.warmup={does}"]
    assert main(words) == (state != "done")
    (cell,) = cells(words)
    told = outcome(cell.run)
    assert (told["state"], told["error"], told["resumed"]) == (state, error, False)
    assert cell.state() == state
    assert (cell.run.folder / "log.txt").read_text().startswith("working")
    assert "working" in capfd.readouterr().out, "shown while it comes"


def test_the_group_is_the_sweep(stand_in: Path) -> None:
    main([*NANO, f"runs={stand_in}", "recipe.warmup=0.1", "projector=pw2"])
    assert "recipe.warmup-0.1" in next(stand_in.glob("*/log.txt")).read_text().splitlines()[0]


def test_one_failure_does_not_stop_the_others_unless_so_told(stand_in: Path) -> None:
    words = [*NANO, f"runs={stand_in}", "recipe.warmup=0.1", "projector=pw2,ldpv1,ldpv2"]
    assert main([*words, "fail_fast=true"]) == 1
    assert len(list(stand_in.glob("*/outcome.json"))) == 1
    assert main(words) == 1
    assert len(list(stand_in.glob("*/outcome.json"))) == 3


def test_what_is_done_or_running_is_left_alone(stand_in: Path) -> None:
    words = [*NANO, f"runs={stand_in}", "recipe.warmup=0.0"]
    assert main(words) == 0
    (cell,) = cells(words)
    before = (cell.run.folder / "log.txt").read_text()
    assert main(words) == 0 and (cell.run.folder / "log.txt").read_text() == before
    (cell.run.folder / "results.json").unlink()
    assert cell.state() == "unfinished", "an outcome is no proof"
    with subprocess.Popen(
        [sys.executable, "-c", f"from mvlm.run import Run; run = Run('{cell.run.folder}'); run.lock(); print('has it', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline().strip() == "has it"
        assert cell.state() == "running" and main(words) == 1
        assert (cell.run.folder / "log.txt").read_text() == before
        with pytest.raises(ValueError, match=f"is being trained by process {other.pid}"):
            Run(cell.run.folder).lock()
        other.kill()
        other.wait()
    assert cell.state() != "running", "a killed process holds nothing"
    first, again = Run(cell.run.folder), Run(cell.run.folder)
    first.lock()
    again.lock()  # one process may open it twice
    assert again.locked


def test_ending_the_sweep_ends_its_cell(stand_in: Path) -> None:
    words = [*NANO, f"runs={stand_in}", "recipe.warmup=0.3"]

    def end() -> None:
        while not list(stand_in.glob("*/log.txt")) or not next(stand_in.glob("*/log.txt")).read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 143 and time.monotonic() - began < 50, "the cell alone would sleep a minute"
    (cell,) = cells(words)
    assert cell.state() == "killed" and outcome(cell.run)["error"] == "interrupted"


# -- small things


def test_launchers_are_known_by_what_they_are() -> None:
    basic = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
    assert at_a_time(OmegaConf.create(basic)) == 1
    assert at_a_time(OmegaConf.create({"_target_": "x.JoblibLauncher", "n_jobs": 3})) == 3
    assert at_a_time(OmegaConf.create({"_target_": "x.JoblibLauncher", "n_jobs": -1})) == os.cpu_count()
    assert at_a_time(OmegaConf.create({"_target_": "x.SlurmLauncher", "partition": "gpu"})) is None


def test_cells_that_run_together_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs (as torch is made to say) two cells get one each, and a third waits until one of them is free."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def nap(seconds: float) -> None:
        raise TimeoutError

    with sweep.a_gpu(tmp_path, 1) as alone:
        assert alone == {}, "a cell alone may use all of them"
    with sweep.a_gpu(tmp_path, 3) as first, sweep.a_gpu(tmp_path, 3) as second:
        assert [first, second] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
        monkeypatch.setattr(sweep.time, "sleep", nap)
        with pytest.raises(TimeoutError), sweep.a_gpu(tmp_path, 3):
            pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with sweep.a_gpu(tmp_path, 2) as given:
        assert given == {"CUDA_VISIBLE_DEVICES": "4"}, "those that were given to us"


def test_durations_are_told_as_people_do() -> None:
    assert [duration(s) for s in (7.4, 89, 600, 7200, 200_000)] == ["7 s", "89 s", "10 min", "2.0 h", "2.3 days"]


# -- the real thing


@pytest.mark.slow
def test_a_table_with_a_failure_and_a_kill(pages: Path, tmp_path: Path) -> None:
    """Three cells: one trains, one fails after all checks, one is killed in its first stage. The same command again goes on."""
    (pages / "three.yaml").write_text(
        "title: three\npublished: null\ncells:\n  good: {projector: ldpv2}\n"
        "  fails: {projector: pw2, recipe.max_length: 5}\n  killed: {projector: avgpool}\n"
    )
    runs = tmp_path / "runs"
    words = ["sweeps=three", *NANO, f"runs={runs}", "evaluate=true"]
    good, fails, killed = cells(words)

    def kill() -> None:
        lock = killed.run.folder / ".lock"
        while not (killed.run.folder / "pretrain").exists():
            time.sleep(0.05)
        os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert main(words) == 1
    assert [c.state() for c in (good, fails, killed)] == ["done", "failed", "killed"]
    assert "no label" in outcome(fails.run)["error"]
    assert outcome(killed.run)["error"] == "by SIGKILL"
    results = json.loads((good.run.folder / "results.json").read_text())
    kept = (good.run.folder / "results.json").stat().st_mtime_ns
    assert main(words) == 1
    assert [c.state() for c in (good, fails, killed)] == ["done", "failed", "done"]
    assert outcome(killed.run)["resumed"] and (good.run.folder / "results.json").stat().st_mtime_ns == kept
    told = next(table.tables("three", model="nano", runs=runs, overrides=NANO[1:], draws=100))["rows"]
    assert [(row["row"], row["cells"][0]["state"]) for row in told] == [
        ("good", "done"),
        ("fails", "failed"),
        ("killed", "done"),
    ]
    assert told[0]["scores"]["pope"]["mean"] == results["benchmarks"]["pope"]["none"]["value"]
    assert told[1]["scores"]["pope"]["mean"] is None and "no label" in told[1]["cells"][0]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_other_launchers_train_the_same_cells(launcher: str, tmp_path: Path) -> None:
    if launcher == "ray":
        pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")
    words = [*NANO, f"runs={tmp_path}", "projector=pw2,ldpv2", f"hydra/launcher={launcher}"]
    words += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done = subprocess.run(
        [sys.executable, "train.py", "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for cell in cells(words):
        assert cell.state() == "done" and not outcome(cell.run)["resumed"]
