"""What makes training on a processor quicker and leaves its result alone but for rounding: `results/PERFORMANCE.md` has what each brings."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from ctypes import c_int, c_size_t, c_void_p

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mvlm.model.mobilevlm import MobileVLM

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Of glibc's mallopt."""


def quicken(model: MobileVLM) -> None:
    """Prepare a model, and this process, for training on one processor (DDP would not take the table's gradient). Names and weights stay as
    they are."""
    keep_memory()
    for module in model.language.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = RMSNorm
    words = model.language.get_input_embeddings()
    # A head that shares the table gives its gradient in full; the few rows of the words are then added to that.
    words.sparse = words.weight is model.language.get_output_embeddings().weight


def keep_memory() -> None:
    """Have the C library keep what is freed, for the next step, and in huge pages: a page that the system gives anew costs more than to
    fill it. The process' resident memory stays at its peak; its virtual size grows by half of the machine's memory."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, -1)
    # Room for half of the machine's memory is asked for, marked and given back before any of it is used, so later tensors lie in it.
    library.malloc.restype, library.malloc.argtypes, library.free.argtypes = c_void_p, [c_size_t], [c_void_p]
    library.madvise.argtypes = [c_void_p, c_size_t, c_int]
    size = os.sysconf("SC_PHYS_PAGES") // 2 * (page := os.sysconf("SC_PAGE_SIZE"))
    if room := library.malloc(size):  # none where the system promises no more than it has
        whole = room + -room % page
        library.madvise(whole, room + size - whole, mmap.MADV_HUGEPAGE)
        library.free(room)


class RMSNorm(LlamaRMSNorm):
    """LLaMA's, with half the passes over memory in training. Under autocast it gives out what the products after it take."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and hidden.dtype == torch.float32):
            return super().forward(hidden)
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        return _RMSNorm.apply(hidden, self.weight, self.variance_epsilon, half)


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) over the last axis, of any shape; dx = s (g - n mean(g n)) with s the factor, n = s x, g = w dy."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, eps: float, half: torch.dtype) -> Tensor:
        size = hidden.shape[-1]
        factor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, factor)
        return torch.mul(hidden * factor, weight, out=torch.empty_like(hidden, dtype=half))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, factor = ctx.saved_tensors
        normal, gradient = hidden * factor, gradient.to(hidden.dtype)
        to_weight = torch.linalg.vecdot(gradient.flatten(0, -2), normal.flatten(0, -2), dim=0)
        gradient = gradient * weight
        mean = torch.linalg.vecdot(gradient, normal).unsqueeze(-1).div_(hidden.shape[-1])
        return normal.mul_(mean).neg_().add_(gradient).mul_(factor), to_weight, None, None
