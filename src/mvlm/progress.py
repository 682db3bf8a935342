"""How far a stage is: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from mvlm.benchmark.evaluate import EVERY
from mvlm.run import duration


def progress(stage: str) -> ProgressBar:
    """The way that suits what the process writes to."""
    return Bar(stage) if sys.stdout.isatty() else Lines(stage)


def told_values(values: dict[str, Any]) -> dict[str, Any]:
    """Of what was logged, the loss and the gap between true and other pictures."""
    shown = {key.split("/")[-1]: value for key, value in values.items()}
    return {key: shown[key] for key in ("loss", "sight") if key in shown}


class Bar(TQDMProgressBar):
    """Of a whole stage in micro-batches: rate, time left, loss, sight."""

    def __init__(self, stage: str) -> None:
        super().__init__(leave=True)
        self.stage = stage

    def get_metrics(self, trainer, module) -> dict[str, Any]:
        return told_values(super().get_metrics(trainer, module))

    def on_train_epoch_start(self, trainer, *_) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(
            f"{self.stage}, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        )


class Lines(ProgressBar):
    """The same for a file or a pipe, where a bar would be kept in each of its states: a line for the first micro-batch, one every
    `EVERY` seconds, and one at the end. The rate is this process' own, also where it goes on from a checkpoint."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.enabled = stage, True
        self.first = self.done = self.told = 0
        self.began = self.now = self.last = 0.0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_batch_end(self, trainer, module, outputs, batch, index: int) -> None:
        self.done, self.now = trainer.current_epoch * self.total_train_batches + index + 1, time.monotonic()
        if not self.first:
            self.first, self.began = self.done, self.now
            self.tell(trainer, module)
        elif self.now - self.last >= EVERY and self.done < trainer.max_epochs * self.total_train_batches:
            self.tell(trainer, module)

    def on_train_end(self, trainer, module) -> None:
        if self.done > self.told:
            self.tell(trainer, module)

    def tell(self, trainer, module) -> None:
        self.told, self.last = self.done, self.now
        total, more = trainer.max_epochs * self.total_train_batches, self.done - self.first
        line = f"{self.stage}: {self.done} of {total} micro-batches ({self.done / total:.0%})"
        if more:
            seconds = (self.now - self.began) / more
            line += f", {seconds:.3g} s each, {duration(seconds * (total - self.done))} left"
        values = told_values(self.get_metrics(trainer, module))
        if self.enabled:
            print(line + "".join(f", {key} {float(value):.4g}" for key, value in values.items()), flush=True)
