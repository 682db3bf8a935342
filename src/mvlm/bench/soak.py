"""A long training and a long sweep at nano size: whether memory, open files and pace stay what they were.

One process trains `cfg.soak_steps` optimizer steps with two loading processes; then one sweep trains `cfg.soak_cells` cells one after the
other. Memory is the process' own and its children's, in proportion where they share (Pss). Slopes are least squares over the last nine tenths.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import psutil
from omegaconf import DictConfig
from rich.console import Console

from mvlm.cli import ROOT


def looked_at(pid: int) -> tuple[float, int]:
    """MB of memory and open files of a process and all that descend from it; those that end meanwhile count nothing."""
    memory, files = 0, 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for one in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                pss, held = one.memory_full_info().pss, one.num_fds()
                memory, files = memory + pss, files + held
    return memory / 2**20, files


def slope(values: Sequence[float], per: float, positions: Sequence[float]) -> float:
    """Growth a `per` positions, by least squares over the last nine tenths."""
    begin = len(values) // 10
    return float(np.polyfit(np.asarray(positions[begin:]) / per, np.asarray(values[begin:]), 1)[0])


def watched(command: Sequence[str], progress: Any, seconds: float) -> list[tuple[float, int, float, int]]:
    """Run a command and look at it every so often: (seconds, progress, MB, files).

    Raises:
        RuntimeError: it failed.
    """
    began, seen = perf_counter(), []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                done = progress()
                seen.append((perf_counter() - began, done, *looked_at(process.pid)))
                sleep(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said.read()[-1500:]}")
    return seen


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train and sweep, and print what grew.

    Returns:
        For `training` and `sweep`: how much was done, MB at the beginning and the end, its growth per 1,000 steps (per 10 cells),
        likewise open files, and the pace of the first and the last quarter.
    """
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        rows, every = Path(folder) / "soak" / "finetune" / "metrics.csv", 4
        words = [
            "model=nano", "trainer=cpu", "logger=csv", "evaluate=false", "workers=2", f"runs={folder}", "data.pretrain=[]",
            "recipe.finetune.batch=1", "recipe.finetune.micro_batch=1", f"recipe.finetune.epochs={-(-cfg.soak_steps // 18)}",
        ]  # fmt: skip

        def steps() -> int:
            return sum(1 for _ in rows.open()) - 1 if rows.exists() else 0

        seen = [one for one in watched(["train.py", *words, "cell=soak"], steps, every) if one[1] > 0]
        measured["training"] = _told(seen, 1000, "steps")

    with tempfile.TemporaryDirectory() as folder:
        words = ["model=nano", "trainer=cpu", "logger=csv", "evaluate=false", "data.pretrain=[]", f"runs={folder}"]
        seeds = "seed=" + ",".join(map(str, range(cfg.soak_cells)))

        def cells() -> int:
            return len(list(Path(folder).glob("*/finetune/stage.json")))

        seen = [one for one in watched(["train.py", "-m", *words, seeds], cells, 1) if one[1] > 0]
        # The sweep's own process between two cells: the lowest of what was seen while as many were done.
        lowest = [
            min((one for one in seen if one[1] == done), key=lambda one: one[2])
            for done in sorted({one[1] for one in seen})
        ]
        measured["sweep"] = _told(lowest, 10, "cells")
    Console().print(*(_line(name, told) for name, told in measured.items()), sep="\n")
    return measured


def _told(seen: Sequence[tuple[float, int, float, int]], per: int, what: str) -> dict[str, Any]:
    when, done, memory, files = (np.array(column, float) for column in zip(*seen, strict=True))
    quarter = max(1, len(seen) // 4)
    pace = [(done[b] - done[a]) / (when[b] - when[a]) for a, b in ((0, quarter), (-1 - quarter, -1))]
    return {
        "done": int(done[-1]), "what": what, "looks": len(seen), "per": per,
        "megabytes": [round(memory[len(seen) // 10]), round(memory[-1])], "megabytes_slope": round(slope(memory, per, done), 2),
        "files": [int(files[len(seen) // 10]), int(files[-1])], "files_slope": round(slope(files, per, done), 2),
        "pace": [round(float(one), 3) for one in pace],
    }  # fmt: skip


def _line(name: str, told: dict[str, Any]) -> str:
    (a, b), (c, d), (e, f) = told["megabytes"], told["files"], told["pace"]
    return (
        f"{name}: {told['done']} {told['what']}; memory {a} to {b} MB ({told['megabytes_slope']:+} a {told['per']}), open files {c} to {d} "
        f"({told['files_slope']:+}), pace {e} to {f} {told['what']}/s"
    )
