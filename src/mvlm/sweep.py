"""A sweep: the cells of a table, all checked before the first is trained, each then in a process of its own.

    python train.py -m sweeps=table7 seeds=3                     the rows of sweeps/table7.yaml, seeds 0, 1, 2
    python train.py -m sweeps=table7 model=nano trainer=cpu      over another model
    python train.py -m projector=pw2,ldpv2 seed=0,1              any product of choices
    python train.py -m sweeps=table7 hydra/launcher=joblib hydra.launcher.n_jobs=4 trainer.devices=1    four at a time

A cell is what its run folder's name says, so tables share cells, and so do sweeps and single runs. The same command again trains
what is missing or failed, and goes on where a killed cell stopped. Hydra's launchers run the cells: one after the other (its own),
several at a time (joblib), on SLURM (submitit_slurm) or Ray (ray). What they run is a small function that starts `train.py` and
waits, so no cell sees another's memory, devices or W&B run, and nothing live is pickled.
"""

from __future__ import annotations

import codecs
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mvlm.cli import CONF, ROOT, check_overrides, nearest
from mvlm.data.lock import taken
from mvlm.plan import physical_memory
from mvlm.run import REQUEUE, Run, differences, duration, file_hash, flatten, folder_of, write_json
from mvlm.trust import read_json

if TYPE_CHECKING:
    from mvlm.plan import Plan

SWEEPS = ROOT / "sweeps"

OWN_KEYS = ("sweeps", "seeds", "fail_fast")
"""Keys of conf/train.yaml that say what is swept; no cell gets them."""

GUESS = 0.3
"""Share of a matrix product's rate that a training is taken to reach where no cell has been measured yet."""

TEXT = 206
"""Tokens of text a sample, for the expected time, as in conf/plan.yaml."""


# -- what is swept


@dataclass(frozen=True)
class Sweep:
    """A page of sweeps/: a table."""

    name: str
    title: str
    published: str | None
    """The table of results/published.yaml whose rows have the same names."""
    rows: Mapping[str, Mapping[str, Any]]
    """What each row sets, in the table's order."""

    @classmethod
    def read(cls, name: str) -> list[Sweep]:
        """The table of that name, or those that its page names.

        Raises:
            ValueError: there is no such page, or it is not as it must be.
        """
        known = sorted(page.stem for page in SWEEPS.glob("*.yaml"))
        if name not in known:
            raise ValueError(
                f"sweeps={name}: there is no sweeps/{name}.yaml{nearest(name, known)} (there are: {', '.join(known)})"
            )
        page = OmegaConf.to_container(OmegaConf.load(SWEEPS / f"{name}.yaml"))
        if set(page) == {"sweeps"}:
            return [table for member in page["sweeps"] for table in cls.read(member)]
        if set(page) != {"title", "published", "cells"} or not isinstance(page["cells"], dict):
            raise ValueError(
                f"sweeps/{name}.yaml must have title, published (or null) and cells (name: what it sets), or `sweeps` alone"
            )
        return [cls(name, page["title"], page["published"], {str(row): sets for row, sets in page["cells"].items()})]

    def overrides(self, row: str) -> list[str]:
        """A row as words of the command line."""
        return [f"{key}={word(value)}" for key, value in self.rows[row].items()]


def word(value: Any) -> str:
    """A value of a page as the command line spells it: null, true, [gqa,pope], {r:8}."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(word, value))}]"
        case dict():
            return f"{{{','.join(f'{key}:{word(one)}' for key, one in value.items())}}}"
    return str(value)


@dataclass(frozen=True)
class Cell:
    """One training of a sweep."""

    overrides: tuple[str, ...]
    """The words of the command line that train it alone."""
    cfg: DictConfig
    run: Run
    rows: tuple[str, ...]
    """Where it stands: `table6 (a)`, `table7 2`; empty in a sweep without a table."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Of each group of conf/."""

    @classmethod
    def composed(cls, overrides: Sequence[str], rows: Sequence[str] = ()) -> Cell:
        """The configuration of a command line, and the run folder it is for. Inside `initialize_config_dir`."""
        full = compose("train", list(overrides), return_hydra_config=True)
        cfg = OmegaConf.masked_copy(full, [key for key in full if key != "hydra"])
        return cls(
            tuple(overrides),
            cfg,
            Run(folder_of(cfg, full.hydra)),
            tuple(rows),
            dict(full.hydra.runtime.choices),
        )

    @property
    def name(self) -> str:
        return self.run.folder.name

    def value(self, key: str) -> Any:
        """What the cell has of a key of a page: a choice, or a setting in plain types."""
        chosen = [choice for group, choice in self.choices.items() if group.split("@")[0] == key]
        said = OmegaConf.select(self.cfg, key)
        return chosen[0] if chosen else OmegaConf.to_container(said) if OmegaConf.is_config(said) else said

    def state(self) -> str:
        """missing, running, done, failed, killed, or unfinished: begun, and not ended by a sweep."""
        if self.run.locked:
            return "running"
        if self.finished():
            return "done"
        if (told := outcome(self.run).get("state")) in ("failed", "killed"):
            return told
        return "unfinished" if (self.run.folder / "config.yaml").exists() else "missing"

    def finished(self) -> bool:
        """Whether every stage with data is trained, and every chosen benchmark and control scored by the chosen protocol."""
        if not all(self.run.finished(stage) for stage in ("pretrain", "finetune") if list(self.cfg.data[stage])):
            return False
        scores, views = self.run.results(self.cfg.protocol).get("benchmarks", {}), {"none", *self.cfg.controls}
        return not self.cfg.evaluate or all(views <= set(scores.get(name, {})) for name in self.cfg.benchmark)


def outcome(run: Run) -> dict[str, Any]:
    """How a sweep's last attempt at a cell ended; empty without one."""
    path = run.folder / "outcome.json"
    return read_json(path) if path.exists() else {}


def cells(arguments: Sequence[str]) -> list[Cell]:
    """Every training of a command line, composed and each once: the tables' rows x seeds x products of choices.

    Raises:
        ValueError: an unknown table or key, or a choice that a row of the table and the command both make.
    """
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    said = {o.key_or_group: o.input_line.split("=", 1)[1] for o in parsed if o.key_or_group in OWN_KEYS}
    rest = [o for o in parsed if o.key_or_group not in OWN_KEYS and not o.key_or_group.startswith("hydra")]
    keys = {o.key_or_group for o in rest}
    if "cell" in keys:
        raise ValueError("cell=... names one run folder, and a sweep has several: leave it out")
    seeds = [[]]
    if "seeds" in said:
        if "seed" in keys or not said["seeds"].isdigit() or not int(said["seeds"]):
            raise ValueError(
                f"seeds={said['seeds']}: give a number of seeds from 1, or name them: seed=0,1,2 (not both)"
            )
        seeds = [[f"seed={n}"] for n in range(int(said["seeds"]))]
    tables = [t for name in said.get("sweeps", "null").split(",") if name != "null" for t in Sweep.read(name)]
    chosen: list[tuple[list[str], str]] = [([], "")]
    if tables:
        chosen = [(table.overrides(row), f"{table.name} {row}") for table in tables for row in table.rows]
        for sets, row in chosen:
            check_overrides("train", sets)
            if both := keys & {word.split("=")[0] for word in sets}:
                raise ValueError(
                    f"{', '.join(sorted(both))}: the row {row} sets that itself; leave it out, or write a page of your own in sweeps/"
                )
    free = BasicSweeper.split_arguments(rest, None)[0]
    found: dict[Path, Cell] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for seed, words, (sets, row) in product(seeds, free, chosen):
            try:
                cell = Cell.composed([*sets, *words, *seed], [row] if row else [])
            except HydraException as error:
                raise ValueError(f"{' '.join([*sets, *words])} cannot be composed: {error}") from None
            if known := found.get(cell.run.folder):
                refuse_one_folder(known, cell)
                cell = replace(known, rows=known.rows + cell.rows)
            found[cell.run.folder] = cell
    return list(found.values())


def refuse_one_folder(one: Cell, other: Cell) -> None:
    """Two cells of one name are one cell, if they say the same.

    Raises:
        ValueError: they differ in keys that make no cell of its own, so that only one of them would be trained and stand for both.
    """
    said = [flatten(OmegaConf.to_container(cell.cfg, resolve=True)) for cell in (one, other)]
    if differs := differences(*said):
        raise ValueError(
            f"{one.name} would be trained once for two cells, {' '.join(one.overrides)} and {' '.join(other.overrides)}: these keys say where "
            "and how a cell is trained and scored, and make no cell of their own. Sweep them apart, into other folders (runs=...):\n"
            + "\n".join(differs)
        )


# -- what is checked before any of it is trained


def check(sweep: Sequence[Cell], jobs: int | None) -> dict[str, Plan]:
    """What each cell costs, by name.

    Args:
        jobs: cells at a time on this machine; None if they run elsewhere, whose memory is not known here.

    Raises:
        ValueError: what is wrong with which cells: another configuration in the folder, a batch that cannot be split, too
            few samples, missing files, too little memory.
    """

    wrong, made = [], {}
    looked_at: set = set()
    for cell in sweep:
        try:
            made[cell.name] = check_cell(cell, jobs, looked_at)
        except (ValueError, OSError, HydraException) as error:
            wrong.append(f"  {cell.name} ({' '.join(cell.overrides)}): {error}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(sweep)} cells cannot be trained, so none was begun:\n" + "\n".join(wrong)
        )
    return made


def check_cell(cell: Cell, jobs: int | None, looked_at: set) -> Plan:
    """One cell's cost; `looked_at` keeps which benchmark files were read for a cell before. See `check`."""
    from mvlm import build, fit, score, settings
    from mvlm.data.corpus import sources_of
    from mvlm.data.sampler import split
    from mvlm.plan import plan

    settings.check(cell.cfg)
    cfg, world = cell.cfg, fit.world_size(cell.cfg.trainer)
    if differs := cell.run.differs(cfg):
        raise ValueError(f"{cell.run.folder} holds another configuration:\n" + "\n".join(differs[:5]))
    for stage in build.STAGES:
        split(cfg.recipe[stage].batch, cfg.recipe[stage].micro_batch, world)
    made = plan(cfg, world, TEXT)
    for stage, planned in made.stages.items():
        if planned.steps < 2:
            raise ValueError(
                f"{stage} has 1 step, and its learning rate is zero (warm-up): a smaller recipe.{stage}.batch, or more data"
            )
    if jobs is not None:
        fits(cfg, made, world, jobs)
    files = build.corpus(cfg)  # the pocket world is made here, before several cells want it at once
    hashes = {"exclude": hashed(cfg.exclude)} if cell.run.begun and cfg.exclude else {}
    for stage in build.STAGES:
        sources = sources_of(files, list(cfg.data[stage]), cfg.data.get("images"))
        if cell.run.begun:
            hashes |= fit.by_source(stage, ((source.name, hashed(source.annotations)) for source in sources))
    fit.check_data(cell.run, hashes)
    scored = {"folder": cfg.benchmark_root, "protocol": cfg.protocol, "any_version": cfg.any_version}
    key = (files.root, *scored.values(), *cfg.benchmark)
    if cfg.evaluate and key not in looked_at:
        score.opened(cfg, cfg.benchmark, files, **scored)
        looked_at.add(key)
    return made


@cache
def hashed(file: str | Path) -> str:
    """SHA-256 of a file, read once for all cells."""
    return file_hash(Path(file))


def fits(cfg: DictConfig, made: Plan, world: int, jobs: int) -> None:
    """Compare a cell's memory by `mvlm.plan` with the machine's.

    Raises:
        ValueError: it is more.
    """
    import torch

    from mvlm import build, engine
    from mvlm.plan import states

    on_gpu = build.on_gpu(cfg.trainer.accelerator)
    kind, there = (
        ("GPU", torch.cuda.get_device_properties(0).total_memory) if on_gpu else ("machine", physical_memory())
    )
    split = {"zero2": 2, "zero3": 3, "fsdp2": 3, "auto": 3}  # auto takes FSDP2 where nothing else fits
    named = engine.name(OmegaConf.to_container(cfg.trainer, resolve=True)["strategy"])
    zero = split.get(named, 0) if world > 1 else 0
    if on_gpu and jobs > 1 and world > 1:
        raise ValueError(
            f"{jobs} cells at a time get one GPU each, and trainer.devices={cfg.trainer.devices} wants {world}: trainer.devices=1"
        )
    for name, stage in made.stages.items():
        learning = sum(stage.learning.values())
        held = sum(states(stage.parameters, learning, world, zero)) + (0 if zero else 2 * (stage.parameters - learning))
        work = stage.micro_batch * (stage.activations.checkpointed + stage.activations.logits)
        needed = (held + work) * (1 if on_gpu else jobs * world)
        if needed > there:
            raise ValueError(
                f"{name} needs about {needed / 2**30:.1f} GiB (weights, gradients and optimizer {held / 2**30:.1f}, a micro-batch of "
                f"{stage.micro_batch} {work / 2**30:.1f}{'' if on_gpu else f', {jobs * world} processes at a time'}) and this {kind} has "
                f"{there / 2**30:.1f}: more devices with trainer=fsdp, fewer cells at a time, "
                f"or a smaller recipe.{name}.micro_batch"
            )


def pace(sweep: Sequence[Cell], made: Mapping[str, Plan]) -> tuple[float, str]:
    """FLOP/s that a cell can be expected to reach, and where that is from: cells done here before, else a matrix product."""
    measured = []
    for cell in sweep:
        told = outcome(cell.run)
        if told.get("state") == "done" and not told["resumed"]:  # of a resumed cell only the rest's time is known
            measured.append((sum(stage.flops for stage in made[cell.name].stages.values()), told["seconds"]))
    if measured:
        flops, seconds = map(sum, zip(*measured, strict=True))
        return flops / seconds, f"by {len(measured)} done before"
    return GUESS * matrix_rate(), f"a guess: {GUESS:.0%} of a matrix product's rate here"


@cache
def matrix_rate(side: int = 2048) -> float:
    """FLOP/s of a matrix product on this machine, in the precision that training would use."""
    import torch

    from mvlm import build

    device = build.device()
    one = torch.rand(side, side, device=device, dtype=build.autocast_type(build.precision()) or torch.float32)
    rates = []
    for _ in range(4):
        began = time.perf_counter()
        (one @ one).sum().item()
        rates.append(2 * side**3 / (time.perf_counter() - began))
    return max(rates)


# -- one cell, in the process that a launcher gives it


def train(cfg: DictConfig) -> str:
    """Start `train.py` for the cell that Hydra has set up, wait for it, and leave its outcome in its run folder.

    Returns:
        The cell's state: done, failed or killed; `running` if another process has it.
    """
    hydra = HydraConfig.get()
    cell = Cell(tuple(hydra.overrides.task), cfg, Run(folder_of(cfg, hydra)), ())
    if (before := cell.state()) in ("done", "running"):
        return before
    resumed = (cell.run.folder / "config.yaml").exists()
    jobs, rank = at_a_time(hydra.launcher), int(os.environ.get("SLURM_PROCID", 0))
    cell.run.folder.mkdir(parents=True, exist_ok=True)
    began, clock = datetime.now().astimezone().isoformat(timespec="seconds"), time.monotonic()
    state, error = "killed", "interrupted"
    environment = {"PYTHONUNBUFFERED": "1", **os.environ}
    if jobs and jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    try:
        with (
            a_gpu(cell.run.folder.parent, jobs) as gpu,
            Log(cell.run.folder / f"log{rank or ''}.txt", show=jobs == 1) as log,
        ):
            command = [sys.executable, str(ROOT / "train.py"), *cell.overrides]
            code = log.follow(
                subprocess.Popen(command, stdout=log.file, stderr=subprocess.STDOUT, env=environment | gpu)
            )
        if code < 0:
            error = f"by {signal.Signals(-code).name}"
        elif code == REQUEUE:
            error = "told to stop; it goes on when it is started again"
        elif code > 0:
            state, error = "failed", log.last_line() or f"exit code {code}"
        elif cell.finished():
            state, error = "done", None
        else:
            state, error = "failed", "ended without an error and without its scores"
    finally:
        if rank == 0:
            seconds = round(time.monotonic() - clock, 1)
            facts = {"state": state, "error": error, "began": began, "seconds": seconds, "resumed": resumed}
            write_json(cell.run.folder / "outcome.json", facts)
    return state


class Log:
    """What a cell prints, kept in its run folder and shown while it comes. The cell writes the file itself, and so outlives us."""

    def __init__(self, path: Path, show: bool) -> None:
        self.path, self.show = path, show

    def __enter__(self) -> Log:
        self.file = self.path.open("ab")
        self.start = self.file.tell()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def follow(self, child: subprocess.Popen) -> int:
        """Wait for a process, showing what it writes; its exit code. What ends us meanwhile ends it, too."""
        try:
            with self.path.open("rb") as written:
                written.seek(self.start)
                text = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character
                while True:
                    ended = child.poll()
                    if self.show and (more := written.read()):
                        print(text.decode(more), end="", flush=True)
                    if ended is not None:
                        return ended
                    time.sleep(0.2)
        except BaseException:
            child.terminate()
            child.wait()
            raise

    def last_line(self) -> str:
        """The last thing that was said: an error's one line, or the end of a traceback."""
        said = self.path.read_bytes()[self.start :].decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(said) if line.strip()), "")


def at_a_time(launcher: DictConfig) -> int | None:
    """Cells that a launcher runs at once on this machine; None if it runs them elsewhere."""
    if "BasicLauncher" in launcher._target_:
        return 1
    if "n_jobs" in launcher:
        return launcher.n_jobs if (launcher.n_jobs or 0) > 0 else os.cpu_count() or 1
    return None


@contextmanager
def a_gpu(folder: Path, jobs: int | None) -> Iterator[dict[str, str]]:
    """One GPU of several for a cell, where several cells run at a time: the environment that shows it no other.

    A GPU is taken by a lock on a file, which goes with the process that holds it. Waits while all are taken.
    """
    if not jobs or jobs == 1:
        yield {}
        return
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        yield {}
        return
    while True:
        for name in names:
            with open(folder / f".gpu-{name}", "a") as file:
                if taken(file):
                    yield {"CUDA_VISIBLE_DEVICES": name}
                    return
        time.sleep(1)


# -- all of it


def main(arguments: Sequence[str]) -> int:
    """Train what a command line sweeps and is not done yet. Returns the exit code: 0 if every cell is done.

    Raises:
        ValueError: see `cells` and `check`; an unknown launcher.
    """
    console = Console(highlight=False)
    sweep = cells(arguments)
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        hydra = GlobalHydra.instance().hydra
        try:
            master = hydra.compose_config("train", list(arguments), RunMode.MULTIRUN)
        except HydraException as error:
            raise ValueError(
                f"{error}\nLaunchers other than basic are packages: pip install -e '.[joblib]', '.[slurm]' or '.[ray]'"
            ) from None
        jobs = at_a_time(master.hydra.launcher)
        made = check(sweep, jobs)
        rate, known_by = pace(sweep, made)
        todo = [cell for cell in sweep if cell.state() not in ("done", "running")]
        expected = {cell.name: sum(stage.flops for stage in made[cell.name].stages.values()) / rate for cell in sweep}
        console.print(plan_table(sweep, made, expected))
        total = sum(expected[cell.name] for cell in todo) / (jobs or 1)
        console.print(
            f"{len(todo)} of {len(sweep)} to train" + (f", about {duration(total)} in all ({known_by})" if todo else "")
        )
        os.environ.setdefault("WANDB_RUN_GROUP", group_of(arguments))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed, and the cell ended
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks()),
            task_function=train,
            config=master,
        )
        size = 1 if jobs == 1 else jobs if jobs and master.fail_fast else max(1, len(todo))
        for first in range(0, len(todo), size):
            batch = todo[first : first + size]
            if jobs == 1:
                console.rule(f"{first + 1} of {len(todo)}: {batch[0].name}")
            try:
                returned = [job.return_value for job in launcher.launch([cell.overrides for cell in batch], first)]
            except RuntimeError as error:  # of submitit: no SLURM here
                if "slurm" not in str(error).lower():
                    raise
                raise ValueError(f"{error} Start it where sbatch and srun are, or leave out hydra/launcher=") from None
            if master.fail_fast and set(returned) & {"failed", "killed"}:
                break
    console.print(end_table(sweep))
    states = [cell.state() for cell in sweep]
    return 0 if set(states) <= {"done"} else 1


def group_of(arguments: Sequence[str]) -> str:
    """What a sweep's W&B runs are grouped by: its table, or its words."""
    said = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    words = " ".join(argument for argument in arguments if not argument.startswith("hydra"))
    return said.get("sweeps") or re.sub(r"[^\w.]+", "-", words)  # other signs W&B's filters read as their own


def a_table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in ("cell", "state", "took"))
    return table


def plan_table(sweep: Sequence[Cell], made: Mapping[str, Plan], expected: Mapping[str, float]) -> Table:
    """What is going to be trained."""
    table = a_table("cell", "row", "state", "steps", "about")
    for cell in sweep:
        stages, state = made[cell.name].stages.values(), cell.state()
        steps = sum(stage.steps for stage in stages)
        time_left = "" if state == "done" else duration(expected[cell.name])
        table.add_row(cell.name, "\n".join(cell.rows), state, f"{steps:,}", time_left)
    return table


def end_table(sweep: Sequence[Cell]) -> Table:
    """What became of it."""
    table = a_table("cell", "state", "took", "error")
    for cell in sweep:
        told, state = outcome(cell.run), cell.state()
        took = duration(told["seconds"]) if "seconds" in told else ""
        table.add_row(cell.name, state, took, escape(told.get("error") or "") if state != "done" else "")
    return table
