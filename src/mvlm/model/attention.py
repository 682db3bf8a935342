"""Causal attention that is quicker to train on a CPU than torch's own kernel: plain matrix products, key heads not repeated, a backward
that adds in place.

Registered with transformers as `grouped`, so a model's yaml asks for it by `attn_implementation: grouped`. It keeps the weights of the
lower half, so it is for the short texts of a laptop; with a mask, without gradients (generation) or on another device it is torch's
own attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 256
"""Queries that are computed at a time. A block sees the keys up to its end alone: a third of the products is spared at 640 positions, and
what is left stays in the cache (there 2.3 times as quick as all at once)."""


class _Grouped(torch.autograd.Function):
    """`grouped_attention`, its backward written out: sums over blocks go into one place instead of as many padded tensors."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int]) -> Tensor:
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        rows = query.reshape(batch * groups, heads // groups, length, width)
        key, value = (one.reshape(batch * groups, length, width) for one in (key, value))
        out = query.new_empty(batch, length, groups, heads // groups, width)
        later = query.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        kept = []
        for first, begin, end in _blocks(lengths):
            size = end - begin
            some = (rows[:, :, begin:end] * scale).flatten(1, 2)  # the heads of a group, one below the other
            weights = some @ key[:, first:end].mT
            # Only the block's own square hides any.
            weights.unflatten(1, (-1, size))[..., begin - first :].add_(later[:size, :size])
            weights = weights.softmax(-1)
            _block(out, begin, end).copy_(
                (weights @ value[:, first:end]).unflatten(1, (-1, size)).unflatten(0, (batch, -1))
            )
            kept += [some, weights]
        ctx.save_for_backward(key, value, *kept)
        ctx.scale, ctx.lengths = scale, lengths
        return out.flatten(2, 3).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        key, value, *kept = ctx.saved_tensors
        batch = len(gradient)
        groups = len(key) // batch
        gradient = gradient.transpose(1, 2).unflatten(2, (groups, -1))
        to_query = gradient.new_empty(gradient.shape)
        to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
        for (first, begin, end), some, weights in zip(_blocks(ctx.lengths), kept[::2], kept[1::2], strict=True):
            back = _block(gradient, begin, end).flatten(0, 1).flatten(1, 2)
            to_value[:, first:end].baddbmm_(weights.mT, back)
            back = torch._softmax_backward_data(back @ value[:, first:end].mT, weights, -1, weights.dtype)
            to_key[:, first:end].baddbmm_(back.mT, some)
            back = (back @ key[:, first:end]).mul_(ctx.scale)
            _block(to_query, begin, end).copy_(back.unflatten(1, (-1, end - begin)).unflatten(0, (batch, -1)))
        to_query = to_query.flatten(2, 3).transpose(1, 2)
        return to_query, *(one.unflatten(0, (batch, -1)) for one in (to_key, to_value)), None, None


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Of documents one after the other: where a block's document begins, and its own first and last position (exclusive)."""
    first = 0
    for length in lengths:
        for begin in range(first, first + length, BLOCK):
            yield first, begin, min(begin + BLOCK, first + length)
        first += length


def _block(rows: Tensor, begin: int, end: int) -> Tensor:
    """(B, T, K, H / K, d) -> (B, K, H / K, end - begin, d), the same memory."""
    return rows[:, begin:end].permute(0, 2, 3, 1, 4)


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int] | None = None
) -> Tensor:
    """softmax(scale * Q K^T) V over the positions up to each one's own.

    Args:
        query: (B, H, T, d); head h reads key head h // (H / K).
        key, value: (B, K, T, d)
        lengths: of the documents that lie one after the other in a row, each of which attends to itself alone; one if None.

    Returns:
        (B, H, T, d)
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
    return _Grouped.apply(query, key, value, scale, tuple(lengths or query.shape[2:3]))


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **more,
) -> tuple[Tensor, None]:
    ends = more.pop("cu_seq_lens_q", None)
    lengths = None if ends is None else ends.diff().tolist()
    whole = (attention_mask is None or lengths) and query.shape[2] == key.shape[2] and not more.get("dropout")
    if whole and query.requires_grad and query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return grouped_attention(query, key, value, scale, lengths).transpose(1, 2), None
    if lengths:
        each = zip(*(one.split(lengths, 2) for one in (query, key, value)), strict=True)
        alone = [sdpa_attention_forward(module, *one, None, scaling=scaling, **more)[0] for one in each]
        return torch.cat(alone, 1), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)


PACKS = ("grouped", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations that do no work between documents of one row; for the others a padded batch is quicker."""


def documents(lengths: Tensor, attention: str) -> dict[str, Any]:
    """What transformers' decoders are told of a row that holds several documents.

    Args:
        lengths: (B,) of the documents.
        attention: the implementation; each takes it in its own way, from the positions that begin anew or from the sums of lengths.
    """
    ends, longest = pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())
    told: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(n, device=lengths.device) for n in lengths.tolist()])[None]
    }
    if attention == "grouped" or "flash" in attention:
        told |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    if attention == "grouped":  # without one, a mask of (L, L) would be made
        told["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lengths.device)
    return told


AttentionInterface.register("grouped", _forward)
AttentionMaskInterface.register("grouped", sdpa_mask)
