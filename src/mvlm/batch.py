"""What passes between the data and the model, shape by shape. Both import this file and never each other.

The shape letters used in every docstring of the package:

    B  samples of a micro-batch        T   positions of the padded sequence
    I  pictures of a micro-batch       N   patches the vision tower gives for one picture (576 = 24 x 24)
    S  side of a picture in pixels     M   tokens the projector makes of them (144 = 12 x 12)
    Dv width of the vision tower       D   width of the language model
    V  size of the vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not learned (the value torch's cross-entropy skips)."""

IMAGE_TOKEN = -200
"""Id of a position that a picture's token fills. The data writes M of them for each picture, so T is known before the model runs.
The value is the reference's own (MobileVLM, `mobilevlm/constants.py`); no tokenizer gives a negative id."""


@dataclass(frozen=True)
class Skipped:
    """A sample that is left out, and why."""

    source: str
    record: int
    """Its place in the annotation file, from 0."""
    id: str
    kind: str
    """The reason in a few words, to count by."""
    reason: str

    def __str__(self) -> str:
        return f"source {self.source}, record {self.record} (id {self.id}): {self.reason}"


@dataclass
class Batch:
    """A micro-batch, padded on the right.

    Exactly one of `pixels` and `features` is set when the micro-batch holds pictures; `features` are what a frozen tower
    gave for them earlier. Pictures stand in the order in which their placeholders stand in `input_ids`.
    """

    input_ids: Tensor
    """(B, T) int64; IMAGE_TOKEN at the M positions of each picture."""
    labels: Tensor
    """(B, T) int64; IGNORE_INDEX where nothing is learned. Not shifted: position t is predicted from positions < t."""
    attention_mask: Tensor
    """(B, T) bool; False at padding."""
    pixels: Tensor | None = None
    """(I, 3, S, S) float32, normalised."""
    features: Tensor | None = None
    """(I, N, Dv), the tower's output for the same pictures."""
    step_tokens: int = 0
    """Labelled tokens of all micro-batches that this device adds up to one optimizer step: the weight of the loss."""
    ids: list[str] = field(default_factory=list)
    """Ids of the samples, for messages and replays."""
    step_skipped: list[Skipped] = field(default_factory=list)
    """Samples of all those micro-batches that could not be read: each is one token without a label in its place."""

    @property
    def label_tokens(self) -> int:
        """Positions of this micro-batch whose prediction counts; the first of a row is predicted from nothing."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def pin_memory(self) -> Batch:
        """The batch in memory from which a GPU copies while the host goes on (a data loader calls this, with `pin_memory=True`)."""
        return replace(self, **{k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device (Lightning calls this)."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)
