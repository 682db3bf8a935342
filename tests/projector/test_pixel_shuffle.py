"""The shuffle against torch's and against three releases of transformers' models; the perceptron against InternVL's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pixel_unshuffle
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from mvlm.projector.grid import to_map, to_tokens
from mvlm.projector.pixel_shuffle import PixelShuffle, space_to_depth


def test_size_by_hand():
    """A norm of 4 x 1024 channels, a layer from these to 2048, a layer from 2048 to 2048, biases with both."""
    with torch.device("meta"):
        projector = PixelShuffle(1024, 2048)
        tokens = projector(torch.zeros(1, 576, 1024))
    by_hand = 2 * 4096 + (4096 * 2048 + 2048) + (2048 * 2048 + 2048)
    assert sum(p.numel() for p in projector.parameters()) == by_hand == 12_595_200
    assert tokens.shape == (1, 144, 2048)


def test_channels_come_patch_by_patch():
    """A 4x4 grid whose patch 0, 1, ... holds (0, 100), (1, 101), ...: each token is two rows of two whole patches."""
    patches = torch.arange(16.0).view(1, 16, 1) + torch.tensor([0.0, 100.0])
    tokens = space_to_depth(patches, 2)[0]
    assert tokens[0].tolist() == [0, 100, 1, 101, 4, 104, 5, 105]
    assert tokens[3].tolist() == [10, 110, 11, 111, 14, 114, 15, 115]


@pytest.mark.parametrize(("grid", "factor"), [(8, 2), (24, 2), (24, 3), (6, 6), (5, 1)])
def test_torchs_pixel_unshuffle_in_another_order(grid, factor):
    """torch counts channels as (channel, row, column of the patch), this one as (row, column, channel)."""
    patches = torch.randn(2, grid * grid, 5)
    other = to_tokens(pixel_unshuffle(to_map(patches), factor))
    wanted = other.unflatten(2, (5, factor, factor)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(space_to_depth(patches, factor), wanted)


@pytest.mark.parametrize("grid", [8, 24])
def test_the_releases_shuffle_alike(grid):
    patches = torch.randn(2, grid * grid, 5)
    here = space_to_depth(patches, 2)
    for theirs in (Idefics3Connector, SmolVLMConnector):
        assert torch.equal(here, theirs.pixel_shuffle(None, patches, 2))
    assert torch.equal(here, InternVLModel.pixel_shuffle(None, patches.unflatten(1, (grid, grid)), 0.5).flatten(1, 2))


@torch.no_grad()
def test_the_perceptron_is_internvls():
    torch.manual_seed(0)
    sizes = {"vision_config": SimpleNamespace(hidden_size=24), "text_config": SimpleNamespace(hidden_size=32)}
    theirs = InternVLMultiModalProjector(SimpleNamespace(**sizes, downsample_ratio=0.5, projector_hidden_act="gelu"))
    for parameter in theirs.parameters():
        parameter.normal_()
    ours = PixelShuffle(24, 32)
    names = {"layer_norm": "norm", "linear_1": "pw1", "linear_2": "pw2"}
    ours.load_state_dict(
        {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": value for k, value in theirs.state_dict().items()}
    )
    patches = torch.randn(2, 64, 24)
    shuffled = InternVLModel.pixel_shuffle(None, patches.unflatten(1, (8, 8)), 0.5).flatten(1, 2)
    assert torch.equal(ours(patches), theirs(shuffled)), "the same operations on the same numbers"


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"27x27 grid can't be shuffled 2x2.*a divisor of 27.*e.g. 26 or 28"):
        PixelShuffle(8, 16)(torch.zeros(1, 729, 8))
    assert PixelShuffle(8, 16, factor=3)(torch.zeros(1, 729, 8)).shape == (1, 81, 16)
    with pytest.raises(ValueError, match=r"577 patch features are no square grid.*class token"):
        PixelShuffle(8, 16)(torch.zeros(1, 577, 8))
