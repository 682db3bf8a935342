"""The start from words: what its whitening is folded into, and that a projector learns words with and without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvlm.projector.avgpool import AvgPool
from mvlm.projector.c_abstractor import CAbstractor
from mvlm.projector.ldpv1 import LDPv1
from mvlm.projector.ldpv2 import LDPv2
from mvlm.projector.learnable_pe import LearnablePE
from mvlm.projector.pixel_shuffle import PixelShuffle
from mvlm.projector.pw2 import PW2
from mvlm.projector.resampler import Resampler
from mvlm.strategy.align import align, fold, foldable, whitening

PAPERS = [PW2(24, 32), LDPv1(24, 32), AvgPool(24, 32), LearnablePE(24, 32, grid=8), LDPv2(24, 32)]
OTHERS = [PixelShuffle(24, 32), Resampler(24, 32, grid=8), CAbstractor(24, 32, grid=8, depth=1, hidden=24)]
"""The last one's perceptron has as many inputs as the tower has channels, and takes something else."""


def towers(pictures: int) -> torch.Tensor:
    """Features as towers make them: correlated, and one channel large and nearly constant. (P, 64, 24)"""
    features = torch.randn(pictures, 64, 24) @ torch.randn(24, 24)
    features[..., 5] = 100 + features[..., 5]
    return features


@pytest.mark.parametrize("projector", PAPERS, ids=lambda p: type(p).__name__)
@torch.no_grad()
def test_whitening_is_folded_into_the_papers_projectors(projector: nn.Module):
    torch.manual_seed(0)
    projector, features = copy.deepcopy(projector), towers(30)
    mean, matrix = whitening(features)
    white = (features - mean) @ matrix
    wanted = projector(white)
    layer = foldable(projector, features, mean, matrix)
    assert torch.equal(projector(white), wanted), "looking changes nothing"
    fold(layer, mean, matrix)
    # float32: the large channel costs two digits of seven
    torch.testing.assert_close(projector(features), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projector", OTHERS, ids=lambda p: type(p).__name__)
def test_others_have_no_such_layer(projector: nn.Module):
    torch.manual_seed(0)
    features = towers(30)
    assert foldable(projector, features, *whitening(features)) is None


@pytest.mark.parametrize(("projector", "whitened"), [(AvgPool(24, 32), True), (PixelShuffle(24, 32), False)])
def test_words_are_learned_either_way(projector: nn.Module, whitened: bool):
    """Two things in two colours, four patches of each along a direction of its own: hard to miss (0.99 seen), and half the words right by chance."""
    torch.manual_seed(0)
    words = {word: torch.randn(1, 32) for word in ("red", "blue", "dog", "cat")}
    looks = {f"{colour} {thing}": torch.randn(24) for colour in ("red", "blue") for thing in ("dog", "cat")}
    cells = [[list(looks)[k] for k in torch.randint(4, (16,)).tolist()] for _ in range(40)]
    shown = torch.stack([torch.stack([looks[phrase] for phrase in picture]) for picture in cells])
    rows = shown.view(40, 4, 4, 24).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    features = 3 * rows + towers(40)
    reached = align(copy.deepcopy(projector), features, cells, words.__getitem__, steps=150, held_out=0.2)
    assert reached.whitened is whitened and reached.named > 0.9
