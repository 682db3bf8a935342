"""Causal attention that is quicker to train on a CPU than torch's own kernel: plain matrix products, key heads not repeated.

Registered with transformers as `grouped`, so a model's yaml asks for it by `attn_implementation: grouped`. It keeps the (T, T) weights,
so it is for the short texts of a laptop; with a mask, without gradients (generation) or on another device it is torch's own attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * Q K^T) V over the positions up to each one's own.

    Args:
        query: (B, H, T, d); head h reads key head h // (H / K).
        key, value: (B, K, T, d)

    Returns:
        (B, H, T, d)
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    rows = query.reshape(batch * groups, heads // groups * length, width)  # the heads of a group, one below the other
    hidden = query.new_full((length, length), float("-inf")).triu(1).repeat(heads // groups, 1)
    weights = torch.baddbmm(hidden, rows, key.flatten(0, 1).mT, alpha=scale).softmax(-1)
    return (weights @ value.flatten(0, 1)).reshape(query.shape)


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
    whole = attention_mask is None and query.shape[2] == key.shape[2] and not more.get("dropout")
    if not whole or not query.requires_grad or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return grouped_attention(query, key, value, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", _forward)
AttentionMaskInterface.register("grouped", sdpa_mask)
