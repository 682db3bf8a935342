"""Small models whose every part matters: each weight is drawn large enough that a wrong one shows in the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mvlm.data import byte_tokenizer
from mvlm.data.image import Pictures
from mvlm.data.tokenizer import FastTokenizer, SentencePieceTokenizer, load_tokenizer
from mvlm.model.mobilevlm import MobileVLM
from mvlm.model.vision import Vision
from mvlm.projector.ldpv2 import LDPv2

REFERENCE = Path(__file__).parents[1] / "reference"

needs_engine = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep the size of what passes and spread it: fresh ones are so small that attention is a plain mean, a
    position changes nothing and the largest logit is a matter of rounding."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=draw)
        if name.endswith("gamma"):  # layer scale
            value.copy_(0.3 + noise.abs())
        elif "norm" in name and name.endswith("weight"):
            value.copy_(1 + 0.2 * noise)
        elif value.dim() == 1:
            value.copy_(0.2 * noise)
        elif "token" in name or "pos" in name:
            value.copy_(noise)
        else:
            value.copy_(1.5 * noise / math.sqrt(value[0].numel()))
    return model.eval()


def small(
    projector: Callable[[int, int], nn.Module] = LDPv2, words: FastTokenizer | SentencePieceTokenizer | None = None, **tower
) -> MobileVLM:
    """A tower of 96 px in patches of 4 (the 24x24 grid that llama.cpp asks for), three blocks with layer scale, and a LLaMA
    of two layers with grouped heads."""
    arguments = {"patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 3, "class_token": False} | tower
    vision = Vision("vit_small_patch14_dinov2", arguments.pop("image_size", 96), **arguments)
    config = LlamaConfig(
        vocab_size=words.vocab_size if words else 259,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=words is None,
    )
    return lively(MobileVLM(vision, projector, LlamaForCausalLM(config)))


def fitted(size: int = 96, mode: str = "letterbox") -> Pictures:
    return Pictures(size, mode, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory) -> Path:
    """The nano model's tokenizer."""
    return byte_tokenizer.build(tmp_path_factory.mktemp("words"))
