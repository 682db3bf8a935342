"""The class token: which order a build of llama.cpp computes is found out, and what an unfaithful one computes is known."""

from __future__ import annotations

import pytest
import torch

from mvlm.export.class_token import has_class_token, misordered, positions
from mvlm.export.gate import EMBEDDING, RESIZED, embeddings, pictures

from .conftest import changed, small


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch16_clip_quickgelu_224"])
def test_the_build_at_hand_is_told(engine, bench, tmp_path, name):
    """One of the two orders, exactly; so the file is right either way, and it is known whether this build can run it."""
    model = small(name=name, class_token=True)
    with_token = bench.with_model(model)
    gate = with_token.gate()
    parity = gate.check_embeddings(*with_token.write(tmp_path))
    assert parity.passed and parity.class_token in ("faithful", "misordered")
    assert parity.embedding[0] < EMBEDDING / 2 and max(parity.embedding) < RESIZED / 2
    # what is compared from here on is what such a build sees
    features = model.encode if parity.class_token == "faithful" else lambda pixels: misordered(model.vision, pixels)
    torch.testing.assert_close(gate.seen, embeddings(model, bench.look, gate.files, features))
    assert gate.check_embeddings(*with_token.write(tmp_path)).class_token == parity.class_token


def test_a_wrong_token_is_neither_order(engine, bench, tmp_path):
    with_token = bench.with_model(small(class_token=True))
    files = with_token.write(tmp_path, vision_tensors=changed("class_embd", torch.zeros_like))
    parity = with_token.gate().check_embeddings(*files)
    assert not parity.passed and parity.class_token == "faithful", "no excuse is found for it"


def test_the_orders_differ(bench):
    """By far more than any bound: mistaking one for the other is impossible."""
    model = small(class_token=True)
    assert has_class_token(model.vision) and not has_class_token(bench.model.vision)
    pixels = bench.look(pictures(96)[0])[None]
    with torch.no_grad():
        right, wrong = model.encode(pixels), misordered(model.vision, pixels)
    assert right.shape == wrong.shape
    assert (right - wrong).norm() / right.norm() > 20 * EMBEDDING


def test_a_tower_that_gives_the_token_no_position_gets_a_row_of_zeros():
    model = small(class_token=True, no_embed_class=True)
    table = positions(model.vision.tower)
    assert table.shape == (577, 48) and not table[0].any()
    assert torch.equal(table[1:], model.vision.tower.pos_embed[0])
    assert positions(small(class_token=True).vision.tower).shape == (577, 48)
    assert positions(small().vision.tower).shape == (576, 48)
