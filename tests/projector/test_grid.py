"""Tokens as a grid and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d

from mvlm.projector.grid import average_pool, side, to_map, to_tokens


def test_tokens_lie_row_by_row():
    tokens = torch.arange(12.0).view(1, 12, 1)[:, :9]
    assert to_map(tokens)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_there_and_back():
    tokens = torch.randn(2, 49, 5)
    assert torch.equal(to_tokens(to_map(tokens)), tokens) and side(tokens) == 7


@pytest.mark.parametrize(("grid", "k"), [(8, 2), (9, 3), (12, 4), (6, 6), (5, 1)])
def test_pooling_is_torchs(grid, k):
    tokens = torch.randn(2, grid * grid, 5)
    wanted = to_tokens(avg_pool2d(to_map(tokens), k))
    torch.testing.assert_close(average_pool(tokens, k), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [2, 577, 575])
def test_no_square(n):
    with pytest.raises(ValueError, match=f"{n} patch features are no square grid"):
        side(torch.zeros(1, n, 3))


def test_grids_offered_instead_can_be_pooled():
    with pytest.raises(ValueError, match=r"7x7 grid can't be pooled 3x3.*e.g. 6 or 9"):
        average_pool(torch.zeros(1, 49, 3), 3)
