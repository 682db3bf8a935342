"""In which order samples are seen, and how a global batch is split over devices and micro-batches.

An order is a pure function of (seed, epoch), so a run can go on at any step without having loaded what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Sampler


class Order(Protocol):
    """A permutation of the samples for each epoch."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> np.ndarray:
        """int64 (N,): indices of the samples in the order of an epoch (the first is 0)."""
        ...


class RandomOrder:
    """Every epoch its own random order."""

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def order(self, epoch: int) -> np.ndarray:
        """Indices of the samples in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epoch + 1):
            drawn = torch.randperm(self.samples, generator=generator)
        return drawn.numpy()


class LengthGroupedSampler:
    """Batches of samples of like length and, with `by_modality`, with pictures only or without: little padding,
    random still.

    The reference's own order, to the index: with the same seed, epoch e is its pass e. Where it raises for want of
    one of the two modalities, this groups by length alone.

    Args:
        lengths: (N,), words of each sample, negative where it has no picture (`LlavaDataset.lengths`).
        batch_size: samples of a micro-batch.
        world_size: micro-batches of an optimizer step, over all devices.
        seed: of the order.
        by_modality: keep samples with and without pictures apart.
        text_first: all steps without pictures come before those with (a curriculum, not the reference's order).

    Raises:
        ValueError: a length is zero, so it has no sign.
    """

    def __init__(
        self,
        lengths: np.ndarray | Sequence[int],
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        by_modality: bool = True,
        text_first: bool = False,
    ) -> None:
        self.lengths, self.batch_size, self.world_size = np.asarray(lengths), batch_size, world_size
        if len(empty := np.flatnonzero(self.lengths == 0)):
            raise ValueError(f"sample {empty[0]} has length 0: its sign is to say whether it has a picture")
        self.seed, self.by_modality, self.text_first = seed, by_modality, text_first

    def __len__(self) -> int:
        return len(self.lengths)

    def order(self, epoch: int) -> np.ndarray:
        """Indices of the samples in the order of an epoch. Earlier epochs are drawn again, as their draws come
        first."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epoch + 1):
            drawn = self._draw(generator)
        return drawn

    def _draw(self, generator: torch.Generator) -> np.ndarray:
        with_picture, without = np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths < 0)
        if not self.by_modality or not len(with_picture) or not len(without):
            return self._by_length(np.arange(len(self)), generator)
        size = self.batch_size * self.world_size
        steps, mixed = [], []
        for indices in (with_picture, without):
            grouped = self._by_length(indices, generator)
            last = (len(grouped) - 1) // size * size
            steps.append(grouped[:last].reshape(-1, size))
            mixed.append(grouped[last:])
        steps, mixed = np.concatenate(steps), np.concatenate(mixed)
        shuffled = steps[torch.randperm(len(steps), generator=generator).numpy()]
        if self.text_first:
            shuffled = shuffled[np.argsort(self.lengths[shuffled[:, 0]] > 0, kind="stable")]
        # The two ends meet in a step of both kinds: a whole one goes to the very front, what is left to the very end.
        front = size if len(mixed) >= size else 0
        return np.concatenate([mixed[:front], shuffled.ravel(), mixed[front:]])

    def _by_length(self, indices: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """A random permutation cut into steps; within a step longest first, dealt to micro-batches of like total
        length."""
        size = self.batch_size * self.world_size
        drawn = indices[torch.randperm(len(indices), generator=generator).numpy()]
        whole = len(drawn) // size * size
        return np.concatenate([self._deal(drawn[:whole].reshape(-1, size)), self._deal(drawn[None, whole:])])

    def _deal(self, steps: np.ndarray) -> np.ndarray:
        """Each step's samples to its micro-batches, each to the one with the least words so far that still has room.

        (steps, samples) to one after the other, micro-batch by micro-batch. All steps are dealt at once, a sample of each at a time.
        """
        longest_first = np.argsort(-np.abs(self.lengths[steps]), axis=1, kind="stable")
        steps, hands = np.take_along_axis(steps, longest_first, axis=1), self.world_size
        if steps.shape[1] % hands:
            return np.concatenate([steps[:, k::hands] for k in range(hands)], axis=1).ravel()
        room, every = steps.shape[1] // hands, np.arange(len(steps))
        totals, held = np.zeros((len(steps), hands), np.int64), np.zeros((len(steps), hands), np.int64)
        dealt = np.empty((len(steps), hands, room), steps.dtype)
        for indices in steps.T:
            least = np.where(held < room, totals, np.iinfo(np.int64).max).argmin(axis=1)
            dealt[every, least, held[every, least]] = indices
            held[every, least] += 1
            totals[every, least] += np.abs(self.lengths[indices])
        return dealt.ravel()


class StepBatches(Sampler[list[list[int]]]):
    """For each optimizer step the micro-batches of one device, as lists of indices.

    A step takes `global_batch` samples of the order. They are cut into micro-batches, which go round the devices; so
    which samples a step has depends on neither the devices nor the micro-batch. The epoch's last step takes what is
    left, dealt evenly over as many micro-batches as any other step has, so all devices stay in step; should there be
    fewer samples than micro-batches, the epoch's first ones fill up.

    Args:
        order: gives the order of an epoch.
        global_batch: samples of an optimizer step.
        micro_batch: samples that one device takes at a time.
        world_size, rank: number of devices, and which this is.

    Raises:
        ValueError: there is no sample, or the global batch cannot be split exactly.
    """

    def __init__(self, order: Order, global_batch: int, micro_batch: int, world_size: int = 1, rank: int = 0) -> None:
        if len(order) == 0:
            raise ValueError("there is no sample to make batches of")
        if not 0 <= rank < world_size:
            raise ValueError(f"{rank=} is none of {world_size} devices")
        self.order, self.global_batch, self.micro_batch = order, global_batch, micro_batch
        self.world_size, self.rank = world_size, rank
        self.accumulation = split(global_batch, micro_batch, world_size)
        self.steps = -(-len(order) // global_batch)
        self.epoch, self.start = 0, 0

    def seek(self, step: int) -> None:
        """Begin at a step counted from the start of the training; nothing before it is loaded."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        self.epoch, self.start = divmod(step, self.steps)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[list[int]]]:
        order = np.asarray(self.order.order(self.epoch))
        for step in range(self.start, self.steps):
            chosen = order[step * self.global_batch : (step + 1) * self.global_batch]
            parts = self.accumulation * self.world_size
            if len(chosen) < parts:
                chosen = np.concatenate([chosen, np.resize(order, parts - len(chosen))])
            cuts = [k * len(chosen) // parts for k in range(parts + 1)]
            micro = [chosen[a:b].tolist() for a, b in pairwise(cuts)]
            yield micro[self.rank :: self.world_size]


def split(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches that each device adds up to one step.

    Raises:
        ValueError: they do not multiply to the global batch; the message names the nearest sizes that do.
    """
    if min(global_batch, micro_batch, world_size) < 1:
        raise ValueError(f"batch sizes and devices must be positive: {global_batch=}, {micro_batch=}, {world_size=}")
    at_once = micro_batch * world_size
    if global_batch % at_once == 0:
        return global_batch // at_once
    near = [size for size in (global_batch // at_once * at_once, -(-global_batch // at_once) * at_once) if size]
    advice = f"take a global batch of {' or '.join(map(str, near))}"
    if global_batch % world_size == 0:
        each = global_batch // world_size
        fits = min((m for m in range(1, each + 1) if each % m == 0), key=lambda m: (abs(m - micro_batch), m))
        advice += f", or a micro-batch of {fits}"
    raise ValueError(
        f"a global batch of {global_batch} cannot be split into micro-batches of {micro_batch} on {world_size} "
        f"device{'s' if world_size > 1 else ''} ({at_once} at once): {advice}"
    )
