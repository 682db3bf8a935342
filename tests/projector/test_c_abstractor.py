"""The C-Abstractor against its forward written out, and its size counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, conv2d, layer_norm, linear, silu

from mvlm.projector.c_abstractor import CAbstractor


def test_size_by_hand():
    """Six blocks alike, for the tower is as wide as they are: two 1x1 convolutions and a depthwise 3x3 one without bias, a
    squeeze to a quarter and back, three norms. Then positions and a perceptron."""
    with torch.device("meta"):
        projector = CAbstractor(1024, 2048)
        tokens = projector(torch.zeros(1, 576, 1024))
    block = 2 * 1024 * 1024 + 9 * 1024 + (1024 * 256 + 256) + (256 * 1024 + 1024) + 3 * 2 * 1024
    perceptron = (1024 * 2048 + 2048) + (2048 * 2048 + 2048)
    assert (block, perceptron) == (2_638_080, 6_295_552)
    assert sum(p.numel() for p in projector.parameters()) == 6 * block + 576 * 1024 + perceptron == 22_713_856
    assert tokens.shape == (1, 144, 2048)


def norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    y = layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weights[f"{name}.weight"], weights[f"{name}.bias"])
    return y.permute(0, 3, 1, 2)


def block(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """RegNet's: narrow (here: keep), look around, weigh the channels, widen (keep), add."""
    y = silu(norm(conv2d(x, weights[f"{name}.conv1.conv.weight"]), weights, f"{name}.conv1.bn"))
    y = conv2d(y, weights[f"{name}.conv2.conv.weight"], padding=1, groups=y.shape[1])
    y = silu(norm(y, weights, f"{name}.conv2.bn"))
    gate = y.mean((2, 3), keepdim=True)
    gate = silu(conv2d(gate, weights[f"{name}.se.fc1.weight"], weights[f"{name}.se.fc1.bias"]))
    y = y * torch.sigmoid(conv2d(gate, weights[f"{name}.se.fc2.weight"], weights[f"{name}.se.fc2.bias"]))
    y = norm(conv2d(y, weights[f"{name}.conv3.conv.weight"]), weights, f"{name}.conv3.bn")
    if f"{name}.downsample.conv.weight" in weights:  # the tower's width becomes the blocks'
        x = norm(conv2d(x, weights[f"{name}.downsample.conv.weight"]), weights, f"{name}.downsample.bn")
    return silu(x + y)


@pytest.mark.parametrize(("vision_dim", "grid", "tokens"), [(24, 8, 16), (32, 8, 16), (24, 9, 36), (24, 6, 36)])
@torch.no_grad()
def test_the_forward_written_out(vision_dim, grid, tokens):
    """With weights that hide nothing: norms and biases drawn, too. 9x9 patches to 6x6 tokens pools by cells that overlap."""
    torch.manual_seed(grid)
    projector = CAbstractor(vision_dim, 16, grid, tokens, depth=2, hidden=32)
    for name, parameter in projector.named_parameters():
        parameter.normal_(std=0.3 if parameter.ndim > 1 else 1.0)
        assert parameter.numel(), name
    weights, features = projector.state_dict(), torch.randn(2, grid * grid, vision_dim)

    x = (features + weights["position"]).transpose(1, 2).unflatten(2, (grid, grid))
    for name in ("before.b1", "before.b2"):
        x = block(x, weights, name)
    x = adaptive_avg_pool2d(x, int(tokens**0.5))
    for name in ("after.b1", "after.b2"):
        x = block(x, weights, name)
    x = silu(linear(x.flatten(2).transpose(1, 2), weights["pw1.weight"], weights["pw1.bias"]))
    wanted = linear(x, weights["pw2.weight"], weights["pw2.bias"])
    # float32 sums in another order, on values of up to 10
    torch.testing.assert_close(projector(features), wanted, atol=1e-4, rtol=0)


def test_tokens_may_be_chosen():
    for tokens, made in ((None, 144), (256, 256), (576, 576), (1, 1)):
        with torch.device("meta"):
            assert CAbstractor(8, 16, 24, tokens)(torch.zeros(1, 576, 8)).shape == (1, made, 16)
    with torch.device("meta"):
        assert CAbstractor(8, 16, grid=27)(torch.zeros(1, 729, 8)).shape == (1, 169, 16)


@pytest.mark.parametrize(("grid", "tokens"), [(24, 150), (8, 144), (24, 0), (24, -4), (1, None)])
def test_tokens_that_cannot_be_are_refused(grid, tokens):
    with pytest.raises(
        ValueError, match=rf"projector.tokens={tokens} is no square number from 1 to the {grid * grid} "
    ):
        CAbstractor(8, 16, grid, tokens)


def test_a_table_of_positions_fits_one_grid():
    with pytest.raises(ValueError, match=r"577 patch features meet a table of 576 positions.*projector.grid"):
        CAbstractor(8, 16)(torch.zeros(1, 577, 8))


def test_without_blocks_it_is_another_projector():
    with pytest.raises(ValueError, match=r"depth=0.*projector=avgpool"):
        CAbstractor(8, 16, depth=0)
