"""The three released kinds of MobileVLM at toy size, and what the official code computed from them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mvlm.model.checkpoint import from_released

REFERENCE = Path(__file__).parents[1] / "reference"
KINDS = ("ldpnetv2", "ldpnet", "mlp2x_gelu")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """As the reference arrays were made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def load(kind: str) -> SimpleNamespace:
    model = from_released(REFERENCE / "checkpoints" / kind, vision=REFERENCE / "vision_tower")
    model.vision.requires_grad_(False)
    pixels = load_file(REFERENCE / "tensors" / "pixel_values.safetensors")
    pixels = torch.stack([pixels["img0.png.pad"], pixels["img1.png.pad"]])
    return SimpleNamespace(
        kind=kind,
        folder=REFERENCE / "checkpoints" / kind,
        model=model,
        tensors=load_file(REFERENCE / "tensors" / f"{kind}.safetensors"),
        facts=json.loads((REFERENCE / "model" / f"{kind}.json").read_text()),
        pixels=pixels,
        features=model.encode(pixels),
    )


@pytest.fixture(params=KINDS)
def released(request) -> SimpleNamespace:
    """`model` (shared between tests: copy it before changing it); the official `tensors` and `facts`; the two pictures'
    `pixels` and the `features` that the model makes of them."""
    return load(request.param)


@pytest.fixture
def ldpnetv2() -> SimpleNamespace:
    return load("ldpnetv2")


@pytest.fixture
def ldpnet() -> SimpleNamespace:
    return load("ldpnet")
