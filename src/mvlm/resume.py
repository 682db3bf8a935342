"""A stage in its middle: kept every so many steps, so that a run that is killed anywhere goes on as if nothing had been.

A checkpoint is a folder `step-<n>` of `tensors.safetensors` and `state.json`: what learns, the optimizer's moments, and the state of
schedule, loops and data order, in Lightning's own terms. Nothing in it can run code. It is written aside and gets its name when it is
whole; its tensors' hash is in `state.json`, so one that was torn later is told and the one before it is taken. What a step draws by lot
(dropout) is seeded by the step itself (`mvlm.strategy.stage`), so there is no generator to keep.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvlm.run import REQUEUE, content, differences, file_hash, write_json

KEPT = 2
"""Checkpoints of a stage that are kept: the newest, and one before it in case the newest is torn."""

log = logging.getLogger(__name__)


class PlainCheckpoints(CheckpointIO):
    """Lightning's checkpoints as tensors and JSON.

    Args:
        config: of the experiment, flat; kept beside the tensors and compared when they are loaded.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = json.loads(json.dumps(dict(config), default=str))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write aside, flush, rename.

        Raises:
            OSError: the disk is full, say; nothing is left of this one, and those before it are untouched.
        """
        path = Path(path)
        aside = path.with_name(path.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        tensors: dict[str, Tensor] = {}
        state = _taken_apart(checkpoint, tensors)
        try:
            aside.mkdir(parents=True)
            save_file(tensors, aside / "tensors.safetensors")
            told = {"sha256": file_hash(aside / "tensors.safetensors"), "config": self.config, "state": state}
            write_json(aside / "state.json", told)
            for name in ("tensors.safetensors", "state.json"):
                with (aside / name).open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, (OSError, SafetensorError)):
                raise
            size = sum(t.nbytes for t in tensors.values()) / 1e9
            free = shutil.disk_usage(path.parent).free / 1e9
            raise OSError(
                f"{path} could not be written ({error}): it needs {size:.2f} GB and {free:.2f} GB are free there. Those before it are "
                "untouched: free some disk and repeat the command, it goes on from the last one"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any | None = None, **ignored: Any) -> dict[str, Any]:
        """Read one back.

        Raises:
            ValueError: it is torn, or of another configuration.
        """
        path = Path(path)
        if fault := torn(path):
            raise ValueError(f"{path} cannot be gone on from: {fault}")
        told = json.loads((path / "state.json").read_text())
        if differs := differences(content(told["config"]), self.config):
            raise ValueError(f"{path} is of another configuration:\n" + "\n".join(differs[:20]))
        return _put_together(told["state"], load_file(path / "tensors.safetensors"))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove one."""
        shutil.rmtree(path, ignore_errors=True)


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree in plain JSON, its tensors replaced by their names in `tensors`.

    Raises:
        TypeError: it holds something that is neither.
    """
    if isinstance(value, Tensor):
        name, here = str(len(tensors)), value.detach().cpu().contiguous()
        part = here.untyped_storage().nbytes() != here.nbytes  # safetensors takes no two names for one memory
        tensors[name] = here.clone() if part or any(here.data_ptr() == t.data_ptr() for t in tensors.values()) else here
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[_taken_apart(k, tensors), _taken_apart(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_taken_apart(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_taken_apart(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not a {type(value).__name__}")


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What was taken apart."""
    if isinstance(value, list):
        return [_put_together(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_put_together(v, tensors) for v in value["tuple"])
    return {_put_together(k, tensors): _put_together(v, tensors) for k, v in value["pairs"]}


def torn(path: Path) -> str:
    """What is wrong with a checkpoint's files; empty if they are whole."""
    try:
        told = json.loads((path / "state.json").read_text())
        file = path / "tensors.safetensors"
        found = _hash_of(file, (stat := file.stat()).st_size, stat.st_mtime_ns)
    except (OSError, ValueError) as error:
        return f"it is not whole ({error})"
    if not isinstance(told, dict) or told.get("sha256") != found:
        return "its tensors are not those that were written (another hash)"
    return ""


@cache
def _hash_of(file: Path, size: int, changed: int) -> str:
    """A file's hash, computed once: whoever looks for the newest checkpoint loads it next, and it may have gigabytes."""
    return file_hash(file)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that it has behind it."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Those of a stage, the newest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage. Torn ones are told."""
    for path in checkpoints(folder):
        if not (fault := torn(path)):
            return path
        log.warning("%s is left out: %s", path, fault)
    return None


class Rows(CSVLogger):
    """metrics.csv, which a stage that goes on begins with the rows before its checkpoint."""

    def go_on(self, step: int) -> None:
        """Keep the rows of the steps before `step`."""
        file = Path(self.log_dir) / "metrics.csv"
        before = list(csv.DictReader(file.open(newline=""))) if file.exists() else []
        written = self.experiment  # made when first asked for, and empties the file
        for row in before:
            if int(row["step"]) < step:
                written.metrics.append({key: value for key, value in row.items() if value != ""})


class Keeper(Callback):
    """Saves a stage every `every` optimizer steps, and when the process is told to stop; then ends it with REQUEUE.

    Args:
        folder: of the stage.
        every: None saves only when told to stop.
    """

    def __init__(self, folder: Path, every: int | None) -> None:
        self.folder, self.every = folder, every
        self.told, self.saved = 0, 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._before = on_signals(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told = number

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """Between two steps: the one before is logged and counted, the next has not begun."""
        step = trainer.global_step
        if index % trainer.accumulate_grad_batches:
            return
        told = self._any_told(trainer, module)
        if step and step != self.saved and (told or (self.every and step % self.every == 0)):
            self.saved = step
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(self.folder / f"step-{step}")
            if trainer.is_global_zero:
                for old in checkpoints(self.folder)[KEPT:]:
                    shutil.rmtree(old, ignore_errors=True)
        if told:
            if trainer.is_global_zero:
                done = f"saved at step {step}" if self.saved == step else f"stopped at step {step}, nothing saved"
                print(f"\ntold to stop ({signal.Signals(told).name}): {done}; the same command goes on")
            raise SystemExit(REQUEUE)

    def _any_told(self, trainer: L.Trainer, module: L.LightningModule) -> int:
        """The signal, also where another process alone got it."""
        if trainer.world_size == 1:
            return self.told
        told = torch.tensor(self.told, device=module.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def teardown(self, *ignored: Any, **more: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def on_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle SIGTERM and SIGUSR1, by which clusters announce that a job's time is up; the handlers before. Only the main thread can."""
    try:
        return {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:
        return {}


def ends_with_requeue(number: int, frame: FrameType | None) -> None:
    """A handler for the times when there is nothing to save: answers are kept one by one."""
    raise SystemExit(REQUEUE)
