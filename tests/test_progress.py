"""What a log says of a stage that trains."""

from __future__ import annotations

import re
import warnings
from itertools import count
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from mvlm import progress


class Halving(L.LightningModule):
    """Its loss halves at each micro-batch: 1/2, 1/4, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.count = torch.nn.Parameter(torch.ones(())), 0

    def training_step(self, batch, index):
        self.count += 1
        loss = self.weight * 0.5**self.count
        self.log("finetune/loss", loss, prog_bar=True)
        self.log("finetune/rate", 1e-3, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder, way: progress.Lines | None = None) -> None:
    """Two epochs of five micro-batches."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    told = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [way or progress.Lines("finetune")]
    trainer = L.Trainer(**told, max_epochs=2, callbacks=callbacks, default_root_dir=folder)
    trainer.fit(Halving(), torch.utils.data.DataLoader(range(5)))


def lines(capsys: pytest.CaptureFixture) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("finetune")]


def test_a_log_gets_a_line_at_first_and_one_at_the_end(tmp_path, capsys) -> None:
    """Ten micro-batches take far less than the time between two lines."""
    fit(tmp_path)
    first, last = lines(capsys)
    assert first == "finetune: 1 of 10 micro-batches (10%), loss 0.5"
    assert re.fullmatch(r"finetune: 10 of 10 micro-batches \(100%\), \S+ s each, 0 s left, loss 0\.0009766", last)


def test_a_log_is_told_as_time_goes(tmp_path, capsys, monkeypatch) -> None:
    """A micro-batch takes 10 s by this clock."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=count(0, 10).__next__))
    monkeypatch.setattr(progress, "EVERY", 25.0)
    fit(tmp_path)
    told = [re.search(r": (\d+) of 10 .* (\S+) s each, (.+) left", line) for line in lines(capsys)[1:]]
    assert [one.groups() for one in told] == [("4", "10", "60 s"), ("7", "10", "30 s"), ("10", "10", "0 s")]


@pytest.mark.parametrize(("terminal", "kind"), [(True, progress.Bar), (False, progress.Lines)])
def test_only_a_terminal_gets_a_bar(monkeypatch, terminal: bool, kind: type) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert type(progress.progress("finetune")) is kind


def test_other_processes_are_silent(tmp_path, capsys) -> None:
    quiet = progress.Lines("finetune")
    quiet.disable()  # as Lightning does in all but the first
    fit(tmp_path, quiet)
    assert not lines(capsys)
