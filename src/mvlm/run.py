"""A run folder: what one script writes and the next reads.

config.yaml      the resolved configuration
run.json         versions, hardware, commit, seed, hashes of the data, the W&B run id
outcome.json     of a cell of a sweep: done, failed or killed, its error, when it began and how long it took
log.txt          and what it printed
pretrain/        the model after the stage, in the released layout; stage.json: losses, what moved, counts; metrics.csv by step
finetune/        likewise
wandb/           the offline W&B run; `wandb sync` sends it
answers/         one JSON line a question, benchmark by benchmark; answers/harness/ by that protocol
results.json     the scores, with the protocol, versions and commit that made them and a hash of the questions
index.html       scores, questions, pictures and answers to look at
wrong.html       the wrong answers, to be filtered; of another protocol all three end in its name (results-harness.json)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mvlm.data.lock import taken
from mvlm.trust import check_config, load_config, read_json, refuse_secrets

MACHINE_KEYS = (
    "runs",
    "cell",
    "sweeps",
    "seeds",
    "fail_fast",
    "features",
    "workers",
    "on_bad_sample",
    "follow_links",
    "on_divergence",
    "checkpointing",
    "checkpoint_every",
    "trainer",
    "logger",
    "evaluate",
    "controls",
    "val_every",
    "val_items",
    "benchmark",
    "benchmark_root",
    "protocol",
    "any_version",
    "hydra",
)
"""Keys that say where and how fast, not what: a run folder may be continued with others. So may one whose data or cache have moved
(`corpus.root`, or any other `root`, and of PLACED the folders): the files' hashes are compared instead, see `mvlm.fit.check_data`."""

PLACED = ("data.pretrain", "data.finetune", "data.images", "exclude")
"""Keys that name one's own files."""

REQUEUE = 75
"""Exit code of a process that was told to stop (SIGTERM, SIGUSR1), has saved itself and can be started again: EX_TEMPFAIL of sysexits.h."""

PACKAGES = ("torch", "torchvision", "transformers", "timm", "lightning", "torchmetrics", "hydra-core", "wandb")


PATIENCE = 600
"""Seconds that a process waits for the first one to open the run folder."""


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    if isinstance(tree, Mapping):
        return {k: v for key, sub in tree.items() for k, v in flatten(sub, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree}


def write_json(path: Path, content: Any) -> None:
    """Write aside, then rename: a file that has its name is whole."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    aside.replace(path)


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h, 2.1 days."""
    for size, unit, digits in ((86_400, "days", 1), (3_600, "h", 1), (60, "min", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def first_process() -> bool:
    """Whether this is the first of the processes that train together, whatever started them: Lightning, torchrun or SLURM."""
    return not any(int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


AXES = ("model", "projector", "data", "strategy")
"""The choices that name a cell."""


def content(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of the experiment, resolved and flat; where and how fast it runs is left out."""
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    return {k: placeless(v) if k in PLACED else v for k, v in flatten(plain).items() if not of_machine(k)}


def placeless(value: Any) -> Any:
    """The names of one's own files and folders, without where they lie."""
    if isinstance(value, list):
        return [placeless(one) for one in value]
    return Path(value).name if isinstance(value, str) else value


def of_machine(word: str) -> bool:
    """Whether a dotted key, or a word of the command line, says where or how fast, not what."""
    key = word.lstrip("+~").split("=")[0]
    return key.split(".")[0] in MACHINE_KEYS or key.endswith(".root")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two flat configurations say otherwise, a line a key."""
    keys = sorted(key for key in there | here if there.get(key) != here.get(key))
    return [f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys]


def overridden(hydra: DictConfig) -> list[str]:
    """The words of the command line that change the experiment beyond its axes and seed, sorted."""
    named = tuple(f"{axis}=" for axis in (*AXES, "seed"))
    return sorted(
        word for word in hydra.overrides.task if not (word.lstrip("+~").startswith(named) or of_machine(word))
    )


def cell_name(cfg: DictConfig, hydra: DictConfig | None = None) -> str:
    """`pocket-ldpv2-v2-unfreeze_llm-s0`: the axes and the seed, and six digits of a hash if anything else was overridden.

    The hash is of the content but for the seed: seeds of one cell differ in their number alone.

    Args:
        hydra: Hydra's own node; that of the running script if None.
    """
    hydra = hydra or HydraConfig.get()
    name = "-".join([*(hydra.runtime.choices[axis] for axis in AXES), f"s{cfg.seed}"])
    if not overridden(hydra):
        return name
    hashed = {k: v for k, v in content(cfg).items() if k != "seed"}
    return f"{name}-{hashlib.sha256(json.dumps(hashed, sort_keys=True, default=str).encode()).hexdigest()[:6]}"


def folder_of(cfg: DictConfig, hydra: DictConfig | None = None) -> Path:
    """The run folder of a configuration; `hydra` as in `cell_name`. Names that are numbers on the command line are names."""
    return Path(str(cfg.runs)) / str(cfg.cell or cell_name(cfg, hydra))


def beside(protocol: str) -> str:
    """What the names of another protocol's files and figures end in, so that they stand beside the paper's."""
    return "" if protocol == "paper" else f"-{protocol}"


def commit_told(commit: str | None) -> str:
    """A commit's seven digits, and whether the code was changed after it."""
    return re.sub(r"^([0-9a-f]{7})[0-9a-f]*", r"\1", commit or "")


class Run:
    """The run folder of a configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        # The configuration that this process was started with, which may name whatever it likes.
        self._own: dict[str, Any] | None = None

    @classmethod
    def open(cls, cfg: DictConfig) -> Run:
        """Make the folder of a configuration, or find it again. Of processes that train together the first one does so.

        Raises:
            ValueError: the folder holds another configuration (the message lists what differs), another process trains there, or
                the configuration holds a secret.
        """
        resolved = OmegaConf.to_container(cfg, resolve=True)
        refuse_secrets(resolved)
        run = cls(folder_of(cfg))
        run._own = resolved
        if not first_process():
            run.wait()
            return run
        if differs := run.differs(cfg):
            raise ValueError(
                f"{run.folder} holds a run of another configuration:\n" + "\n".join(differs[:20]) + "\n"
                "Give this one another name (cell=my-name), or remove the folder."
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        run.lock()
        OmegaConf.save(OmegaConf.create(resolved), run.folder / "config.yaml")
        if not (run.folder / "run.json").exists():
            run.note(**manifest(), seed=cfg.seed, wandb_id=uuid.uuid4().hex[:8])
        return run

    @classmethod
    def find(cls, folder: str | Path) -> Run:
        """An existing run folder.

        Raises:
            ValueError: it is none.
        """
        run = cls(Path(folder))
        if not (run.folder / "config.yaml").exists():
            others = sorted(str(p.parent) for p in Path("runs").glob("*/config.yaml"))
            raise ValueError(
                f"{folder} is no run folder (no config.yaml in it); there are: {', '.join(others) or 'none yet'}"
            )
        return run

    def differs(self, cfg: DictConfig) -> list[str]:
        """What the folder's configuration says otherwise than this one; nothing if nothing was trained or answered by it yet.

        Pictures are not hashed: if the folder that they were in is still there, another one holds others."""
        if not self.begun or not (self.folder / "config.yaml").exists():
            return []
        there, here = self.config_dict(), OmegaConf.to_container(cfg, resolve=True)
        other = differences(content(there), content(here))
        was, now = (said.get("data", {}).get("images") for said in (there, here))
        if was and now and Path(was).exists() and os.path.realpath(was) != os.path.realpath(now):
            other.append(f"  data.images: {was!r} there, which is still there, {now!r} here")
        return other

    @property
    def begun(self) -> bool:
        """Whether anything was trained or answered here."""
        return any(next(self.folder.glob(made), None) for made in ("*/stage.json", "*/step-*", "answers/*"))

    def wait(self) -> None:
        """Until the first process has opened the folder.

        Raises:
            ValueError: it has not in PATIENCE seconds.
        """
        began = time.monotonic()
        while not (self.folder / "run.json").exists():
            if time.monotonic() - began > PATIENCE:
                raise ValueError(
                    f"the first process has not opened {self.folder} in {PATIENCE} s: is it the same folder on all nodes?"
                )
            time.sleep(0.1)

    def lock(self) -> None:
        """Keep the folder to this process (of several that train together: to the first) until it ends, however it ends.

        The system itself drops the lock with the process, so a killed one leaves none behind.

        Raises:
            ValueError: another process has it.
        """
        if not first_process():
            return
        me = f"process {os.getpid()} on {platform.node()}"
        held = open(self.folder / ".lock", "a+")  # noqa: SIM115 (closed when the process ends)
        if not taken(held):
            held.seek(0)
            owner = held.read()
            held.close()
            if owner == me:  # an earlier look at the same folder, in a notebook say
                return
            raise ValueError(f"{self.folder} is being trained by {owner}: wait for it, or end it")
        held.truncate(0)
        held.write(me)
        held.flush()
        self._lock = held

    @property
    def locked(self) -> bool:
        """Whether a living process trains here."""
        if not (self.folder / ".lock").exists():
            return False
        with open(self.folder / ".lock", "a+") as file:
            return not taken(file, shared=True)

    @property
    def config(self) -> DictConfig:
        """The configuration it was made with.

        Raises:
            ValueError: it is not this process' own, and it would do here what a run folder must not, see `mvlm.trust`.
        """
        if self._own is not None:
            return OmegaConf.create(self._own)
        path = self.folder / "config.yaml"
        return check_config(load_config(path), path)

    def config_dict(self) -> dict[str, Any]:
        """The same in plain types, nested as it is, and only to be read."""
        return OmegaConf.to_container(load_config(self.folder / "config.yaml"))

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says."""
        path = self.folder / "run.json"
        return read_json(path) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add to run.json; of processes that train together the first one does so."""
        if first_process():
            write_json(self.folder / "run.json", self.facts | facts)

    def results(self, protocol: str = "paper") -> dict[str, Any]:
        """The scores by a protocol; empty if there are none."""
        path = self.folder / f"results{beside(protocol)}.json"
        return read_json(path) if path.exists() else {}

    def finished(self, stage: str) -> bool:
        """Whether a stage was trained to its end and saved."""
        return (self.folder / stage / "stage.json").exists()

    def stage_facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage's stage.json says."""
        return read_json(self.folder / stage / "stage.json")

    def last_stage(self) -> Path:
        """The folder of the model as it stands.

        Raises:
            ValueError: no stage was finished.
        """
        for stage in ("finetune", "pretrain"):
            if self.finished(stage):
                return self.folder / stage
        raise ValueError(
            f"{self.folder} holds no finished stage: run train.py with its configuration again, it goes on where it stopped"
        )


def processor(proc: Path = Path("/proc")) -> str:
    """The board's name, or the processor's; with its family and model, as a virtual machine's name may hide the generation."""
    board, cpus = proc / "device-tree/model", proc / "cpuinfo"
    if board.exists():
        return board.read_text().strip("\0 \n")
    told = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.+)$", cpus.read_text() if cpus.exists() else "", re.M)
    )
    if "model name" not in told:
        return platform.processor() or platform.machine()
    return told["model name"] + (f", family {told['cpu family']}, model {told['model']}" if len(told) == 3 else "")


def manifest() -> dict[str, Any]:
    """What produced a run, apart from its configuration."""
    import torch

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
