"""Samples to batches: padding on the right, and the token count that weighs the micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvlm.batch import IGNORE_INDEX, Batch
from mvlm.data.dataset import Sample


def collate(samples: Sequence[Sample], pad_id: int = 0) -> Batch:
    """A micro-batch of its samples, `step_tokens` set to its own labelled tokens.

    The attention mask follows the lengths. (The reference masks every position whose id is the pad id, so it also
    hides an `<unk>` inside a text.)

    Raises:
        ValueError: no sample, or pictures of which only some come as features.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    lengths = torch.tensor([len(s.input_ids) for s in samples])
    pixels = [s.pixels for s in samples if s.pixels is not None]
    features = [s.features for s in samples if s.features is not None]
    if pixels and features:
        raise ValueError(
            f"{len(pixels)} pictures come as pixels and {len(features)} as features ({[s.id for s in samples]}): "
            "compute the features of all pictures, or of none"
        )
    batch = Batch(
        input_ids=_pad([s.input_ids for s in samples], pad_id),
        labels=_pad([s.labels for s in samples], IGNORE_INDEX),
        attention_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        pixels=torch.stack(pixels) if pixels else None,
        features=torch.stack(features) if features else None,
        ids=[s.id for s in samples],
        step_skipped=[s.skipped for s in samples if s.skipped],
    )
    batch.step_tokens = batch.label_tokens
    return batch


def collate_step(micro_batches: Sequence[Sequence[Sample]], pad_id: int = 0) -> list[Batch]:
    """The micro-batches of one optimizer step on this device, each knowing the labelled tokens and the skipped samples of all."""
    batches = [collate(samples, pad_id) for samples in micro_batches]
    tokens = sum(batch.label_tokens for batch in batches)
    skipped = [sample for batch in batches for sample in batch.step_skipped]
    for batch in batches:
        batch.step_tokens, batch.step_skipped = tokens, skipped
    return batches


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths to (B, T) int64."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
