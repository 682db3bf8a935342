"""The decoding bench: both ways say the same, and the limit is what a hand counts."""

from __future__ import annotations

import pytest
import torch

from mvlm.bench import decode
from mvlm.plan import meta_model

KEYS = ["target=decode", "model=nano", "rounds=2", "precision=float32"]


@pytest.fixture
def cfg(configure):
    return configure(*KEYS, page="bench")


def test_both_ways_decode_alike_in_float32(cfg, monkeypatch, capsys):
    monkeypatch.setattr(decode, "TOKENS", 24)
    measured = decode.run(cfg)
    assert measured["same"] == 24
    ours, peer = measured["ways"].values()
    assert all(len(way["seconds"]) == 2 and way["tokens_per_second"] > 0 for way in (ours, peer))
    # Both are rounded to two places, and their rates are above 10 a second at this size.
    assert measured["ratio"] == pytest.approx(ours["tokens_per_second"] / peer["tokens_per_second"], rel=0.02)
    assert ours["share"] == pytest.approx(ours["tokens_per_second"] / measured["limit"], rel=0.02, abs=0.001)
    assert "ratio of the medians" in capsys.readouterr().out


def test_a_differing_token_is_seen(cfg, monkeypatch):
    monkeypatch.setattr(decode, "TOKENS", 8)
    honest = decode.peer
    monkeypatch.setattr(
        decode, "peer", lambda *some: [token + (place == 3) for place, token in enumerate(honest(*some))]
    )
    assert decode.run(cfg)["same"] == 3


@pytest.mark.parametrize(
    "model, weights, past",
    [
        # SmolLM2-135M: 49,152 words of 576, 30 layers of q and o 576 x 576, k and v 576 x 192, three of 576 x 1,536, two norms; the
        # head is the table. Keys and values: 30 layers, 3 heads of 64.
        ("pocket", 49152 * 576 + 576 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576), 2 * 30 * 192),
        # MobileLLaMA-1.4B: 32,000 words of 2,048, a head of its own, 24 layers of four 2,048 x 2,048 and three 2,048 x 5,632.
        ("1.7b", 32000 * 2048 + 2048 + 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048), 2 * 24 * 2048),
    ],
)
def test_the_bytes_of_a_token(configure, model, weights, past):
    net = meta_model(configure("target=decode", f"model={model}", page="bench").model.module)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        language = net.language.to(dtype)
        assert decode.weight_bytes(language) == size * weights
        # Token n of 2 to 256 sees prompt + n - 1 positions, its own among them.
        seen = [209 + n - 1 for n in range(2, 257)]
        assert decode.past_bytes(language, 209) == size * past * sum(seen) / len(seen)


def test_an_unknown_precision_is_refused(configure):
    with pytest.raises(ValueError, match="precision=bf16: target=decode knows"):
        decode.run(configure("target=decode", "model=nano", "precision=bf16", page="bench"))
