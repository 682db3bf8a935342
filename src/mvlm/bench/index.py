"""Annotations at the paper's size: the index of a generated file beside `json.load` of the same file, each in a process of its own."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mvlm.data.byte_tokenizer import build as build_tokenizer
from mvlm.data.dataset import LlavaDataset
from mvlm.data.held_out import hold_out
from mvlm.data.image import Pictures
from mvlm.data.mixture import Mixture
from mvlm.data.prompt import template
from mvlm.data.sampler import LengthGroupedSampler, RandomOrder
from mvlm.data.tokenizer import load_tokenizer

PICTURES = 20_000
"""Distinct pictures, at most; samples share them, as those of several sources do."""
WORKERS = 4
READ = 20_000
"""Samples that each process reads at random."""


def write(file: Path, samples: int, seed: int = 0) -> None:
    """A LLaVA-format file of about 1.3 kB a sample, and its pictures beside it.

    A sample has 2 to 8 questions, 3 in the mean, with answers of a log-normal length (median 200 characters); one in twenty has no
    picture.
    """
    rng, pictures = np.random.default_rng(seed), min(PICTURES, samples)
    vocabulary = ["".join(map(chr, rng.integers(97, 123, length))) for length in rng.integers(2, 10, 5000)]
    text = " ".join(vocabulary[k % 5000] for k in rng.zipf(1.2, 500_000).tolist())
    names = [f"{k // 100:04}/{k:012}.png" for k in range(pictures)]
    for name in track(names, "drawing pictures", transient=True):
        (path := file.parent / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.new("RGB", (2, 2)).save(path)

    def some(length: int) -> str:
        begin = int(rng.integers(len(text) - 4000))
        return text[begin : begin + length]

    with open(file, "w", encoding="utf-8") as out:
        for number in track(range(samples), f"writing {samples:,} samples", transient=True):
            turns = []
            for turn in range(min(8, 1 + int(rng.geometric(0.5)))):
                asked = ("<image>\n" if turn == 0 and number % 20 else "") + some(int(rng.integers(30, 90)))
                answer = some(min(4000, int(rng.lognormal(5.3, 0.9)) + 1))
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            record = {"id": f"{number:012}"} | ({"image": names[rng.integers(pictures)]} if number % 20 else {})
            out.write(("[" if number == 0 else ",\n") + json.dumps(record | {"conversations": turns}))
        out.write("]\n")


def memory() -> dict[str, float]:
    """MB of this process: `own`, pages that no other process can share and that must stay; `pss`, with its part of shared pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {key: int(value.split()[0]) for key, value in (line.split(":") for line in lines)}
    return {"own": kilobytes["Private_Dirty"] / 1024, "pss": kilobytes["Pss"] / 1024}


@contextmanager
def measured(told: dict[str, float], what: str) -> Iterator[None]:
    """Seconds, and the MB that are there afterwards and were not before."""
    before, began = memory(), perf_counter()
    yield
    told[f"{what}_seconds"] = round(perf_counter() - began, 3)
    told |= {f"{what}_{kind}_mb": round(now - before[kind], 1) for kind, now in memory().items()}


def _open(file: Path) -> LlavaDataset:
    return LlavaDataset(
        *(file, file.parent / "pictures", template("chatml"), load_tokenizer(build_tokenizer(file.parent))),
        *(Pictures(14, "pad", (0, 0, 0), (1, 1, 1)),),
        image_tokens=1,
        cache=file.parent,
    )


def _read(dataset: LlavaDataset | Mixture, seed: int) -> float:
    """Samples a second, read at random as a worker does before it decodes the picture."""
    numbers = np.random.default_rng(seed).integers(len(dataset), size=READ).tolist()
    began = perf_counter()
    for number in numbers:
        found, place = dataset.find(number)
        found.record(place)
    return READ / (perf_counter() - began)


def build(file: Path) -> dict[str, float]:
    """The index is made."""
    told: dict[str, float] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with measured(told, "build"):
        _open(file)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return told | {"build_peak_mb": round(peak, 1)}


def use(file: Path) -> dict[str, Any]:
    """The index is opened, an epoch's orders are made, and workers get the dataset."""
    told: dict[str, Any] = {}
    _open(file.with_name("small.json"))  # what the first use of the libraries loads is not the index'
    with measured(told, "open"):
        dataset = _open(file)
    with measured(told, "mix"):
        mixture, held_out = hold_out(Mixture([dataset]), 8)
    with measured(told, "grouped"):
        grouped = LengthGroupedSampler(mixture.lengths, batch_size=16, world_size=8).order(0)
    with measured(told, "shuffled"):
        shuffled = RandomOrder(len(mixture)).order(0)
    assert len(grouped) == len(shuffled) == len(mixture)
    told |= {"samples": len(dataset), "held_out": len(held_out), "read_per_second": round(_read(mixture, 0))}
    told["pickled_bytes"] = len(ForkingPickler.dumps(mixture))
    spawn = get_context("spawn")
    with ProcessPoolExecutor(WORKERS, spawn, initializer=_begin, initargs=(spawn.Barrier(WORKERS),)) as pool:
        told["workers"] = list(pool.map(_work, [mixture] * WORKERS, range(WORKERS)))
    return told


def _begin(barrier: Any) -> None:
    global _barrier, _before
    _barrier, _before = barrier, memory()


def _work(mixture: Mixture, number: int) -> dict[str, float]:
    """Of a worker that got the dataset: what it reads, and its memory while all have their pages mapped."""
    _barrier.wait()
    rate = _read(mixture, number)
    _barrier.wait()
    now = memory()
    _barrier.wait()
    return {"read_per_second": round(rate)} | {f"{kind}_mb": round(now[kind] - _before[kind], 1) for kind in now}


def peer(file: Path) -> dict[str, float]:
    """`json.load`, as the reference has it."""
    told: dict[str, float] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with measured(told, "load"), open(file, encoding="utf-8") as opened:
        records = json.load(opened)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return told | {"load_peak_mb": round(peak, 1), "samples": len(records)}


def _alone(step: Callable[[Path], dict[str, Any]], file: Path) -> dict[str, Any]:
    """A step in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(step, file).result()


def run(cfg: DictConfig) -> dict[str, Any]:
    """Make a file of `cfg.samples` samples, index it, use it, and load it whole; print seconds and memory.

    The files lie in `cfg.out` meanwhile (2.7 kB a sample) and are removed. They were just written, so the system has them in memory.

    Returns:
        What was measured, in plain types. `*_own_mb` and `*_pss_mb` are what a step added: see `memory`.
    """
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cfg.out) as folder:
        file = Path(folder).absolute() / "data.json"
        write(file.with_name("small.json"), 10)
        write(file, cfg.samples)
        told = {"what": f"{cfg.samples:,} samples, {file.stat().st_size / 1e9:.2f} GB", "bytes": file.stat().st_size}
        for step in (build, use, peer):
            told |= {step.__name__: _alone(step, file)}
        told["index_bytes"] = sum(path.stat().st_size for path in file.parent.glob("index/data-*.arrow"))
    _show(told)
    return told | {"workers": WORKERS, "cores": len(os.sched_getaffinity(0))}


def _show(told: dict[str, Any]) -> None:
    build, use, peer = told["build"], told["use"], told["peer"]
    rate, workers = use["samples"] / build["build_seconds"], use["workers"]
    table = Table(title=told["what"], title_justify="left")
    for column in ("step", "seconds", "own MB", "PSS MB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for what, times, step in (
        (f"build once ({rate:,.0f} samples a second; peak {build['build_peak_mb']:,.0f} MB)", build, "build"),
        ("open", use, "open"),
        ("mix and hold out", use, "mix"),
        ("order by length", use, "grouped"),
        ("order at random", use, "shuffled"),
        (f"json.load (peak {peer['load_peak_mb']:,.0f} MB)", peer, "load"),
    ):
        table.add_row(
            what, f"{times[f'{step}_seconds']:,.2f}", *(f"{times[f'{step}_{k}_mb']:,.0f}" for k in ("own", "pss"))
        )
    for worker in workers:
        read = f"one of {len(workers)} workers, {worker['read_per_second']:,} samples a second"
        table.add_row(read, "", f"{worker['own_mb']:,.0f}", f"{worker['pss_mb']:,.0f}")
    Console().print(table)
    sent = f"a worker is sent {use['pickled_bytes']:,} bytes"
    Console().print(
        f"read at random by one process: {use['read_per_second']:,} samples a second; {sent}", soft_wrap=True
    )
