"""A model small enough for every test, with a tower and a projector of one layer each and a real LLaMA decoder."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mvlm.batch import IMAGE_TOKEN
from mvlm.model.mobilevlm import MobileVLM

VOCABULARY = 64
STOPS = frozenset({2, 7, 20, 33, 41})


class Tower(nn.Module):
    """(I, 3, 4, 4) -> (I, 4, 6): one linear layer a 2 x 2 patch. Counts the pictures it is shown."""

    width, grid, image_size = 6, 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, self.width, 2, 2)
        self.shown = 0

    def forward(self, pixels):
        self.shown += len(pixels)
        return self.patch(pixels).flatten(2).transpose(1, 2)


def tiny_model(attention: str = "sdpa") -> MobileVLM:
    """Random weights, wide enough apart that prompts get different answers (the usual 0.02 gives all the same)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        attn_implementation=attention,
    )
    return MobileVLM(Tower(), nn.Linear, LlamaForCausalLM(config)).eval()


def encode_prompt(text: str, has_image: bool) -> list[int]:
    """Two ids, the picture and its line break, an id a letter, and one id: the shape of every template."""
    return [1, 5, *([IMAGE_TOKEN] * 4 + [3] if has_image else []), *(8 + ord(sign) % 50 for sign in text), 6]


def decode(ids) -> str:
    return " ".join(map(str, ids))


class Pixels:
    """A file's bytes decide its pixels; counts what it opens."""

    def __init__(self) -> None:
        self.opened = Counter()

    def __call__(self, image) -> torch.Tensor:
        content = image.read() if hasattr(image, "read") else image.read_bytes()
        self.opened[content] += 1
        generator = torch.Generator().manual_seed(int.from_bytes(content[:4], "big"))
        return torch.randn(3, 4, 4, generator=generator)


@pytest.fixture
def loop() -> dict:
    """The arguments of `answers` that come from the data's side."""
    return {"encode_prompt": encode_prompt, "decode": decode, "pictures": Pixels(), "stop_ids": STOPS}


@pytest.fixture
def model() -> MobileVLM:
    return tiny_model()


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The above by name: a conftest cannot be imported reliably."""
    return SimpleNamespace(model=tiny_model, encode_prompt=encode_prompt, decode=decode, Pixels=Pixels, stops=STOPS)
