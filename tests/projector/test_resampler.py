"""The resampler against its attention written out, what must not change it, and its size counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from mvlm.projector.resampler import Resampler


def test_size_by_hand():
    """Queries, the way in, four square maps of the attention with biases, the way out, three norms."""
    with torch.device("meta"):
        projector = Resampler(1024, 2048)
        tokens = projector(torch.zeros(1, 576, 1024))
    square = 2048 * 2048
    by_hand = 144 * 2048 + 1024 * 2048 + 4 * (square + 2048) + square + 3 * 2 * 2048
    assert sum(p.numel() for p in projector.parameters()) == by_hand == 23_384_064
    assert tokens.shape == (1, 144, 2048)


def test_positions_are_no_weights():
    """They can be computed again, so a checkpoint does not hold them."""
    assert not {name for name in Resampler(8, 16, grid=4).state_dict() if "position" in name}


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (576, 4), (960, 6), (2048, 16), (2560, 20), (4096, 32)])
def test_heads_are_128_wide_or_the_next_that_divide(width, heads):
    with torch.device("meta"):
        assert Resampler(8, width).attention.num_heads == heads


@torch.no_grad()
def drawn(vision_dim: int, language_dim: int, grid: int, tokens: int | None = None) -> Resampler:
    """A resampler whose weights hide nothing: norms and biases drawn, too."""
    torch.manual_seed(0)
    projector = Resampler(vision_dim, language_dim, grid, tokens)
    for parameter in projector.parameters():
        parameter.normal_(std=0.3 if parameter.ndim > 1 else 1.0)
    return projector


@torch.no_grad()
def test_the_forward_written_out():
    """256 channels, so two heads."""
    projector, features = drawn(24, 256, grid=6), torch.randn(2, 36, 24)
    weights = projector.state_dict()

    def norm(x, name):
        return layer_norm(x, (256,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    patches = norm(features @ weights["pw1.weight"].T, "norm_patch")
    places = (norm(weights["query"], "norm_query") + projector.query_position).expand(2, -1, -1)
    maps, biases = weights["attention.in_proj_weight"].chunk(3), weights["attention.in_proj_bias"].chunk(3)
    given = (places, patches + projector.patch_position, patches)
    query, key, value = (x @ m.T + b for x, m, b in zip(given, maps, biases, strict=True))
    seen = []
    for head in (slice(0, 128), slice(128, 256)):
        scores = query[..., head] @ key[..., head].transpose(1, 2) / math.sqrt(128)
        seen.append(scores.softmax(-1) @ value[..., head])
    out = torch.cat(seen, -1) @ weights["attention.out_proj.weight"].T + weights["attention.out_proj.bias"]
    wanted = norm(out, "norm") @ weights["pw2.weight"].T
    # float32 sums in another order, on values of up to 20
    torch.testing.assert_close(projector(features), wanted, atol=1e-3, rtol=0)


@torch.no_grad()
def test_patches_that_move_with_their_positions_change_nothing():
    """Attention knows no order but the positions'. Moved without them, patches are another picture."""
    projector, features = drawn(24, 32, grid=8), torch.randn(2, 64, 24)
    moved, before = torch.randperm(64), projector(features)
    without = projector(features[:, moved])
    projector.patch_position = projector.patch_position[moved]
    # float32 sums over patches in another order, on values of up to 10
    torch.testing.assert_close(projector(features[:, moved]), before, atol=1e-4, rtol=0)
    assert (without - before).abs().max() > 0.1


@torch.no_grad()
def test_queries_that_move_with_their_positions_move_the_tokens():
    projector, features = drawn(24, 32, grid=8), torch.randn(2, 64, 24)
    moved, before = torch.randperm(16), projector(features)
    projector.query.copy_(projector.query[moved])
    projector.query_position = projector.query_position[moved]
    torch.testing.assert_close(projector(features), before[:, moved], atol=1e-5, rtol=0)


def test_positions_are_sines_and_cosines_of_row_and_column():
    code = Resampler(8, 16, grid=8).query_position
    rates = [1.0, 0.1, 0.01, 0.001]  # 10000^(-i / 4)
    for place in range(16):
        row, column = divmod(place, 4)
        wanted = [f(x * rate) for f in (math.sin, math.cos) for x in (row, column) for rate in rates]
        assert code[place].tolist() == pytest.approx(wanted, abs=1e-6)  # float32


@pytest.mark.parametrize(
    ("width", "grid", "tokens"), [(64, 8, None), (576, 24, None), (2048, 24, 256), (576, 27, None)]
)
def test_a_query_is_nearest_to_the_patches_it_lies_on(width, grid, tokens):
    """The codes alone say where a token is: of all patches the one with the likest code has its centre less than a patch from
    the query's."""
    projector = Resampler(8, width, grid, tokens)
    side = math.isqrt(projector.tokens)
    nearest = (projector.query_position @ projector.patch_position.T).argmax(1)
    for query, patch in enumerate(nearest.tolist()):
        for q, p in zip(divmod(query, side), divmod(patch, grid), strict=True):
            assert abs((q + 0.5) * grid / side - (p + 0.5)) < 1, (query, patch)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"577 patch features meet 576 positions.*projector.grid"):
        Resampler(8, 16)(torch.zeros(1, 577, 8))
    with pytest.raises(ValueError, match=r"multiple of 4, and the language model's is 18"):
        Resampler(8, 18)
    with pytest.raises(ValueError, match=r"projector.tokens=144 is no square number from 1 to the 64 "):
        Resampler(8, 16, grid=8, tokens=144)
