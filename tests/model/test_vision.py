"""timm's CLIP against the official tower, and what the tower is made of."""

from __future__ import annotations

import pytest
import torch

from mvlm.model.vision import Vision


def test_features_are_the_official_ones(released, ldpnet):
    with torch.no_grad():
        features = released.model.encode(released.pixels)
    stored = released if "vision_features" in released.tensors else ldpnet  # mlp2x_gelu has ldpnet's tower
    # float32 sums in another order: 4e-6 seen, on values of up to 7
    torch.testing.assert_close(features, stored.tensors["vision_features"], atol=1e-4, rtol=0)


def test_every_hidden_state_has_the_official_norm(released):
    """Block by block, class token included; the last block and its place in the checkpoint are otherwise never seen."""
    tower, norms = released.model.vision.tower, []
    hooks = [
        module.register_forward_hook(lambda _, __, output: norms.append(float(output.double().norm())))
        for module in (tower.norm_pre, *tower.blocks)
    ]
    with torch.no_grad():
        tower.forward_features(released.pixels[:1])
    for hook in hooks:
        hook.remove()
    assert norms == pytest.approx(released.facts["vision_hidden_state_norms"], rel=1e-6)


def test_plain_gelu_is_another_tower(ldpnetv2):
    """The trap that the names `quickgelu` are about: everything loads, and the features are off."""
    arguments = ldpnetv2.model.vision.arguments | {"act_layer": "gelu"}
    other = Vision(**arguments).eval()
    other.load_state_dict(ldpnetv2.model.vision.state_dict())
    with torch.no_grad():
        features = other(ldpnetv2.pixels)
    assert (features - ldpnetv2.tensors["vision_features"]).abs().max() > 0.01  # a hundred times the tolerance above


@pytest.fixture(scope="module", params=[True, False], ids=["class token", "none"])
def small(request) -> Vision:
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depth": 5, "num_heads": 2, "class_token": request.param}
    return Vision("vit_small_patch14_dinov2", 56, **arguments).eval()


def test_the_last_block_is_not_run(small):
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        before = small(pixels)
        for name, parameter in small.named_parameters():
            if small.part(name) == "unused":
                parameter.fill_(torch.nan)
        assert torch.equal(small(pixels), before)
    assert before.shape == (2, 16, 16) and small.grid == 4 and small.width == 16


def test_parts_of_the_tower(small):
    parts = {name: small.part(name) for name, _ in small.named_parameters()}
    blocks = [{part for name, part in parts.items() if f"blocks.{n}." in name} for n in range(5)]
    assert blocks == [{"lower"}, {"lower"}, {"upper"}, {"upper"}, {"unused"}]
    outside = {name: part for name, part in parts.items() if "blocks" not in name}
    assert {name for name, part in outside.items() if part == "unused"} == {"tower.norm.weight", "tower.norm.bias"}
    assert set(outside.values()) == {"lower", "unused"}


def test_unused_is_what_gets_no_gradient(small):
    """The second way to tell the parts: ask autograd."""
    small.zero_grad()
    small(torch.randn(1, 3, 56, 56)).sum().backward()
    for name, parameter in small.named_parameters():
        assert (parameter.grad is None) == (small.part(name) == "unused"), name


@pytest.mark.parametrize(
    "count, half, learns, fused",
    [(2, True, False, False), (9, True, False, False), (2, False, False, True), (9, True, True, True)],
)
def test_few_pictures_at_a_time_take_plain_products(count, half, learns, fused) -> None:
    """On a processor in bfloat16 alone, where nothing learns; with the same features but for rounding."""
    torch.manual_seed(0)
    vision = Vision("vit_small_patch14_dinov2", 56, depth=2, embed_dim=48, num_heads=4).requires_grad_(learns).eval()
    pixels = torch.randn(count, 3, 56, 56)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = vision(pixels)
    assert vision.tower.blocks[0].attn.fused_attn == fused
    torch.testing.assert_close(found.float(), vision(pixels), rtol=0.02, atol=0.02 if half else 1e-6)
