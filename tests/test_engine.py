"""Several processes train as one: the same losses, samples and weights with every engine, each group at its own rate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mvlm import build, fit
from mvlm.model.checkpoint import load_checkpoint
from mvlm.run import Run
from mvlm.strategy.stage import Stage


@pytest.fixture
def processes(tmp_path: Path):
    """`processes(2, work)`: what `work(rank)` returned in so many processes that know one another, forks of this one."""

    def run(count: int, work: Callable[[int], Any], patience: float = 60) -> list[Any]:
        store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        ends, started = [], []
        for rank in range(count):
            here, there = get_context("fork").Pipe(duplex=False)
            process = get_context("fork").Process(target=one, args=(rank, count, store, there, work))
            process.start()
            there.close()
            ends.append(here)
            started.append(process)
        try:
            said = [end.recv() if end.poll(patience) else TimeoutError(f"no word in {patience} s") for end in ends]
        finally:
            for process in started:
                process.join(1)
                process.kill()
        if failed := [word for word in said if isinstance(word, Exception)]:
            raise failed[0]
        return said

    def one(rank: int, count: int, store: Path, end, work: Callable[[int], Any]) -> None:
        import faulthandler

        faulthandler.dump_traceback_later(25, exit=True)
        os.environ["LOCAL_RANK"] = str(rank)  # Lightning then starts no others
        try:
            if count > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
            end.send(work(rank))
        except BaseException as error:
            import traceback

            end.send(RuntimeError(f"rank {rank}: {traceback.format_exc()}"))

    return run


WORDS = [
    "model=nano",
    "strategy=sharegpt4v",
    "trainer=cpu",
    "trainer.precision=32-true",
    "recipe.finetune.order=random",
]


def train(configure, folder: Path, *words: str) -> dict[str, Any]:
    """Both stages by `fit.stage`; what each step was made of on this process."""
    cfg = configure(*WORDS, f"runs={folder.parent}", f"cell={folder.name}", *words)
    L.seed_everything(0, verbose=False)
    run, files, text = Run.open(cfg), build.corpus(cfg), build.tokenizer(cfg)
    model = build.model(cfg)
    data = {stage: build.mixture(cfg, stage, files, text, model.image_tokens) for stage in build.STAGES}
    seen: dict[str, list] = {stage: [] for stage in build.STAGES}
    norms: dict[str, list] = {stage: [] for stage in build.STAGES}
    step, clip = Stage.training_step, Stage.configure_gradient_clipping

    def norm(stage: Stage) -> float:
        grads = [p.grad for p in stage.model.parameters() if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        return float(torch.stack([g.square().sum() for g in whole]).sum().sqrt())

    def recorded_step(self, batch, index):
        seen[self.name].append((batch.ids, batch.pixels is not None or batch.features is not None))
        return step(self, batch, index)

    def recorded_clip(self, *arguments, **more):
        before = norm(self)
        clip(self, *arguments, **more)
        norms[self.name].append((before, norm(self)))

    Stage.training_step, Stage.configure_gradient_clipping = recorded_step, recorded_clip
    try:
        for stage in build.STAGES:
            fit.stage(cfg, run, stage, model, data, files, text)
    finally:
        Stage.training_step, Stage.configure_gradient_clipping = step, clip
    facts = {s: json.loads((run.folder / s / "stage.json").read_text()) for s in build.STAGES if run.finished(s)}
    return {"seen": seen, "norms": norms, "facts": facts}


def test_try(configure, tmp_path, processes):
    import time

    for engine, n in (("auto", 1), ("ddp", 2), ("fsdp2", 2)):
        t = time.time()
        told = processes(
            n,
            lambda rank, engine=engine, n=n: train(
                configure, tmp_path / engine, f"trainer.devices={n}", f"trainer.strategy={engine}"
            ),
        )
        print(engine, time.time() - t)
        for x in told:
            for s in build.STAGES:
                print(
                    [h["loss"] for h in x["facts"][s]["history"]],
                    x["norms"][s],
                    x["seen"][s],
                    x["facts"][s]["moved"],
                    x["facts"][s]["engine"],
                )
