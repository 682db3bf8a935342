"""The loader of one stage as a LightningDataModule: micro-batches in order, resumable at any optimizer step."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from mvlm.batch import Batch, Skipped
from mvlm.data.collate import collate_step
from mvlm.data.dataset import LlavaDataset, Sample
from mvlm.data.image import PictureError
from mvlm.data.mixture import Mixture
from mvlm.data.sampler import LengthGroupedSampler, RandomOrder, StepBatches, split

SKIP_LIMIT = 0.001
"""Share of a stage's samples that may be left out as bad; above it the run stops."""

log = logging.getLogger(__name__)


MOST_WORKERS = 8
"""A device's, chosen by `auto`."""


def worker_count(wanted: int | Literal["auto"], devices: int, step_bytes: int, shared: str = "/dev/shm") -> int:
    """How many processes load for a device.

    Args:
        wanted: a number is taken as it is. `auto`: as many as a GPU has cores, less one for the training itself, MOST_WORKERS at most, and no
            more than fill half of the shared memory: each keeps two steps there, and torch would end with a bus error.
        devices: GPUs of this machine, which share all that; 0 if the processor trains, or nothing is decoded. `auto` is 0 then.
        step_bytes: of the pictures of an optimizer step on a device.
        shared: folder of the shared memory.

    Raises:
        ValueError: neither `auto` nor a number from 0.
    """
    if wanted != "auto":
        if not isinstance(wanted, int) or wanted < 0:
            raise ValueError(f"workers={wanted} counts processes that load: auto, 0 (in the training itself) or more")
        return wanted
    if not devices:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = shutil.disk_usage(shared).free if os.path.exists(shared) else 0
    room = free // (4 * devices * step_bytes)
    if not room:
        log.warning(
            "workers=auto: the training process decodes the pictures itself, and the GPU waits. A worker needs %.2f GB of shared memory (2 steps, "
            "half of it left free, %d devices), and %s has %.2f: give the container more (docker run --shm-size), or take a smaller "
            "global batch",
            4 * devices * step_bytes / 1e9, devices, shared, free / 1e9,
        )  # fmt: skip
    return min(room, MOST_WORKERS, max(1, cores // devices - 1))


class StepData(L.LightningDataModule):
    """Micro-batches for a Trainer with `accumulate_grad_batches=data.accumulation` and `use_distributed_sampler=False`.

    A worker loads the micro-batches of a whole step, so that each knows the labelled tokens of all of them.

    Every step has the same number of micro-batches, and a checkpoint keeps the step: `trainer.fit(...,
    ckpt_path=...)` goes on with the very samples that an uninterrupted run would have seen next.

    Args:
        dataset: what is trained on.
        global_batch: samples of an optimizer step, over all devices.
        micro_batch: samples that one device takes at a time.
        world_size: devices.
        rank: which one this is; None asks the trainer.
        workers: processes that load beside the training; 0 loads in it.
        seed: of the order.
        order: `random`; `grouped` by modality and length (the reference's multi-task stage); or `text_first`, grouped likewise, the
            dialogues without a picture before all others.
        start_step: optimizer step to begin with.
        pad_id: id that pads the texts.
        pin_memory: put batches where a GPU can fetch them by itself.

    Raises:
        ValueError: the global batch cannot be split exactly, or there is no such order.
    """

    def __init__(
        self,
        dataset: LlavaDataset | Mixture,
        global_batch: int,
        micro_batch: int,
        *,
        world_size: int = 1,
        rank: int | None = None,
        workers: int = 0,
        seed: int = 0,
        order: Literal["random", "grouped", "text_first"] = "random",
        start_step: int = 0,
        pad_id: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.dataset, self.global_batch, self.micro_batch, self.seed = dataset, global_batch, micro_batch, seed
        self.world_size, self.rank, self.start_step = world_size, rank, start_step
        self._before = start_step  # steps that the trainer does not count
        self.accumulation = split(global_batch, micro_batch, world_size)
        if order in ("grouped", "text_first"):
            parts = self.accumulation * world_size
            self.order = LengthGroupedSampler(
                dataset.lengths, micro_batch, parts, seed, text_first=order == "text_first"
            )
        elif order == "random":
            self.order = RandomOrder(len(dataset), seed)
        else:
            raise ValueError(f"the order is random, grouped or text_first, not {order!r}")
        self._loading = {
            "num_workers": workers,
            "pin_memory": pin_memory,
            "collate_fn": partial(collate_step, pad_id=pad_id),
            "generator": torch.Generator(),  # else it draws from the one that training uses
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch; the last incomplete batch is one of them."""
        return -(-len(self.dataset) // self.global_batch)

    def train_dataloader(self) -> StepLoader:
        """The micro-batches of this device."""
        rank = self.rank if self.rank is not None else (self.trainer.global_rank if self.trainer else 0)
        batches = StepBatches(self.order, self.global_batch, self.micro_batch, self.world_size, rank)
        batches.seek(self.start_step)
        return StepLoader(self.dataset, batches, self._loading)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the optimizer steps done, and all that the order depends on."""
        done = self.trainer.global_step if self.trainer else 0
        return {"step": self._before + done} | self._order_facts()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the steps of a checkpoint.

        Raises:
            ValueError: the order would be another one, so samples would be seen twice or never.
        """
        facts = self._order_facts()
        if changed := {k: (state_dict.get(k), facts[k]) for k in facts if state_dict.get(k) != facts[k]}:
            told = ", ".join(f"{name} was {before!r} and is {now!r}" for name, (before, now) in changed.items())
            raise ValueError(f"cannot go on inside this data: {told}; restore it or start the stage anew")
        self.start_step = state_dict["step"]

    def _order_facts(self) -> dict[str, Any]:
        facts = {"samples": len(self.dataset), "global_batch": self.global_batch, "seed": self.seed}
        facts["order"] = type(self.order).__name__
        if isinstance(self.order, LengthGroupedSampler):
            facts["text_first"] = self.order.text_first
            facts["micro_batch"] = self.micro_batch  # grouping balances micro-batches, so their size shapes the order
        return facts


class StepLoader:
    """An iterable of single micro-batches, those of a step one after the other. Each pass is the next epoch.

    Its length is that of a whole epoch, also where a pass begins in the middle of one: Lightning adds the batches
    before a checkpoint to those it fetches.
    """

    def __init__(self, dataset: Dataset[Sample], batches: StepBatches, loading: dict[str, Any]) -> None:
        self.dataset, self.batches, self.loading = _Steps(dataset), batches, loading

    def __len__(self) -> int:
        return self.batches.steps * self.batches.accumulation

    def __iter__(self) -> Iterator[Batch]:
        done = self.batches.epoch * self.batches.steps + self.batches.start
        remaining = len(self.batches)
        loader, told = iter(DataLoader(self.dataset, batch_sampler=self.batches, **self.loading)), None
        while True:
            try:
                micro_batches = next(loader)
            except StopIteration:
                return
            except (PictureError, ConnectionError) as error:  # a worker's comes with its traceback before it
                told = type(error)(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip())
                error.__traceback__ = None
            if told:
                # Nothing holds it then: the workers end here, else each keeps the process for 5 seconds when that ends.
                del loader
                raise told
            remaining -= 1
            if remaining == 0:  # before the last batches are handed out: Lightning counts them and asks no further
                self.batches.seek(done + 1)
            done += 1
            yield from micro_batches


class Skips(Callback):
    """Counts the samples of a stage that are left out as bad (`on_bad_sample=skip`), each once, whatever process or device met it.

    A batch brings what was met in loading its step (`Batch.step_skipped`), and the devices tell each other after each step. So the
    count is of what was trained on, independent of the number of workers and of what these loaded ahead. A checkpoint keeps it.

    Args:
        stage: named in errors.
        mixture: what is trained on. What was left out before training counts from the start.
        limit: share of the samples.

    Raises:
        ValueError: more than the limit are left out; now, or in a later step.
    """

    def __init__(self, stage: str, mixture: Mixture, limit: float = SKIP_LIMIT) -> None:
        self.stage, self.total, self.limit = stage, mixture.total, limit
        self.found: dict[tuple[str, int], Skipped] = {}
        self.add(mixture.skipped)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Count some; those that are known already once."""
        self.found |= {(one.source, one.record): one for one in skipped if (one.source, one.record) not in self.found}
        if len(self.found) > self.limit * self.total:
            counts = "; ".join(
                f"{source} {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"
                for source, kinds in self.counts.items()
            )
            raise ValueError(
                f"{self.stage}: {len(self.found)} of {self.total} samples are bad, more than {self.limit * self.total:g}, the limit "
                f"({self.limit:.1%}): {counts}. The first: {'; '.join(map(str, self._first(3)))}. "
                "Repair or remove them: python doctor.py finds all"
            )

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """source -> reason -> samples."""
        counted = Counter((one.source, one.kind) for one in self.found.values())
        return {
            source: {kind: n for (of, kind), n in sorted(counted.items()) if of == source}
            for source in sorted({source for source, _ in counted})
        }

    def summary(self) -> dict[str, Any]:
        """What a stage's record keeps: their number, of how many, by source and reason, and the first ones."""
        return {
            "total": len(self.found),
            "of": self.total,
            "limit": self.limit,
            "counts": self.counts,
            "first": [asdict(one) for one in self._first(5)],
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        if (index + 1) % trainer.accumulate_grad_batches:  # the last micro-batch of a step knows of all
            return
        new = [one for one in batch.step_skipped if (one.source, one.record) not in self.found]
        if trainer.world_size > 1:
            number = torch.tensor(len(new), device=module.device)
            dist.all_reduce(number)
            if number.item():
                everyone: list[list[Skipped]] = [[]] * trainer.world_size
                dist.all_gather_object(everyone, new)
                new = [one for some in everyone for one in some]
        for one in new if trainer.is_global_zero else []:
            log.warning("%s: left out: %s", self.stage, one)
        self.add(new)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skipped": [asdict(one) for one in self.found.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting after a checkpoint."""
        self.add(Skipped(**one) for one in state_dict["skipped"])

    def _first(self, number: int) -> list[Skipped]:
        return list(self.found.values())[:number]


class _Steps(Dataset[list[Sample]]):
    """Lets a DataLoader fetch micro-batches: its "sample" is a list of them."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> list[Sample]:
        return [self.dataset[k] for k in indices]
