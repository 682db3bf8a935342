"""A run folder: what one script writes and the next reads.

config.yaml      the resolved configuration
run.json         versions, hardware, commit, seed, hashes of the data, the W&B run id
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
import subprocess
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

MACHINE_KEYS = (
    "runs",
    "cell",
    "workers",
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
"""Keys that say where and how fast, not what: a run folder may be continued with others."""
PACKAGES = ("torch", "torchvision", "transformers", "timm", "lightning", "torchmetrics", "hydra-core", "wandb")


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


AXES = ("model", "projector", "data", "strategy")
"""The choices that name a cell."""


def cell_name(cfg: DictConfig) -> str:
    """`pocket-ldpv2-v2-unfreeze_llm-s0`: the axes and the seed, and six digits of a hash if anything else was overridden."""
    hydra = HydraConfig.get()
    name = "-".join([*(hydra.runtime.choices[axis] for axis in AXES), f"s{cfg.seed}"])
    free = (*AXES, "seed", *MACHINE_KEYS)
    keys = [override.lstrip("+~").split("=")[0] for override in hydra.overrides.task]
    if all(key in free or key.split(".")[0] in MACHINE_KEYS for key in keys):
        return name
    content = {
        k: v
        for k, v in flatten(OmegaConf.to_container(cfg, resolve=True)).items()
        if k.split(".")[0] not in MACHINE_KEYS
    }
    return f"{name}-{hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:6]}"


class Run:
    """The run folder of a configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def open(cls, cfg: DictConfig) -> Run:
        """Make the folder of a configuration, or find it again.

        Raises:
            ValueError: the folder holds another configuration; the message lists what differs.
        """
        run = cls(Path(cfg.runs) / (cfg.cell or cell_name(cfg)))
        wanted = OmegaConf.to_container(cfg, resolve=True)
        config = run.folder / "config.yaml"
        if config.exists():
            there = OmegaConf.to_container(OmegaConf.load(config))
            old, new = (
                {k: v for k, v in flatten(t).items() if k.split(".")[0] not in MACHINE_KEYS} for t in (there, wanted)
            )
            differs = [
                f"  {k}: {old.get(k)!r} there, {new.get(k)!r} here"
                for k in sorted(old | new)
                if old.get(k) != new.get(k)
            ]
            if differs:
                raise ValueError(
                    f"{run.folder} holds a run of another configuration:\n" + "\n".join(differs[:20]) + "\n"
                    "Give this one another name (cell=my-name), or remove the folder."
                )
        run.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(wanted), config)
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

    @property
    def config(self) -> DictConfig:
        """The configuration it was made with."""
        return OmegaConf.load(self.folder / "config.yaml")

    def config_dict(self) -> dict[str, Any]:
        """The same in plain types, nested as it is."""
        return OmegaConf.to_container(self.config)

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        write_json(self.folder / "run.json", self.facts | facts)

    def finished(self, stage: str) -> bool:
        """Whether a stage was trained to its end and saved."""
        return (self.folder / stage / "stage.json").exists()

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
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
