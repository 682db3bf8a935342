"""Fewer bits: llama.cpp's own table of types, and blocks that gguf's second implementation reads and makes."""

from __future__ import annotations

from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from mvlm.export import engine as far
from mvlm.export import language, tokenizer
from mvlm.export.container import Opened
from mvlm.export.quantise import kind

from .conftest import llama

WIDTHS = {"attn_q": 0, "attn_k": 0, "attn_v": 0, "attn_output": 0, "ffn_gate": 0, "ffn_up": 0, "ffn_down": 1}


@pytest.mark.parametrize(
    "quant, hidden, inner, layers, tied, counts",
    [
        # What llama.cpp's llama-quantize (0c1e570) made of models of these sizes
        ("q8_0", 256, 512, 11, True, {Q.Q8_0: 78}),
        ("q4_0", 256, 512, 11, True, {Q.Q6_K: 1, Q.Q4_0: 77}),
        ("q4_k", 256, 512, 11, True, {Q.Q6_K: 11, Q.Q4_K: 67}),
        ("q4_k", 256, 768, 24, True, {Q.Q6_K: 25, Q.Q4_K: 144}),
        ("q4_k", 256, 768, 24, False, {Q.Q6_K: 25, Q.Q4_K: 145}),
        ("q4_0", 96, 160, 3, True, {Q.Q8_0: 1, Q.Q4_0: 21}),
        ("q4_k", 96, 160, 3, False, {Q.Q5_0: 20, Q.Q8_0: 3}),
        ("q4_k", 288, 512, 5, True, {Q.Q8_0: 3, Q.Q5_0: 28, Q.Q4_K: 3, Q.Q6_K: 2}),
    ],
)
def test_types_are_llama_quantizes_own(quant, hidden, inner, layers, tied, counts):
    names = [(f"blk.{n}.{name}.weight", (hidden, inner)[wide]) for n in range(layers) for name, wide in WIDTHS.items()]
    names += [("token_embd.weight", hidden)] + [("output.weight", hidden)] * (not tied)
    assert Counter(kind(name, width, quant, layers, tied) for name, width in names) == counts


def test_rows_that_no_block_fits_stay_float16():
    assert kind("blk.0.attn_q.weight", 40, "q4_0", 2, True) == Q.F16


@pytest.mark.parametrize("quant, most", [("q8_0", 0.008), ("q4_0", 0.1), ("q4_k", 0.08)])
def test_a_file_with_fewer_bits(engine, bench, tmp_path, quant, most):
    """Read by gguf's decoder, a second implementation: near the float16 file, by what so few bits allow (4 bits a weight have
    steps of an eighth of a block's largest: an error of about 0.29 steps a weight)."""
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    language.write(tmp_path / "f16.gguf", model, "small", tokenizer.vocabulary(bench.words, bench.words_folder, 259))
    counts = far.Engine().quantise(tmp_path / "f16.gguf", tmp_path / "q.gguf", quant)
    whole, less = Opened(tmp_path / "f16.gguf"), Opened(tmp_path / "q.gguf")
    assert whole.names() == less.names() and sum(counts.values()) == 23
    for key in ("llama.rope.freq_base", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "llama.block_count"):
        assert less.get(key) == whole.get(key)
    assert less.get("general.file_type") == {"q8_0": 7, "q4_0": 2, "q4_k": 15}[quant]
    for name in whole.names():
        there, here = whole.value(name), less.value(name)
        if there.dim() == 1:
            assert torch.equal(there, here)
        else:
            assert 0 < (there - here).norm() / there.norm() < most, name
    if quant == "q8_0":  # here gguf's encoder is the same, bit for bit
        rows = whole.value("blk.0.attn_q.weight").numpy()
        ours = [t.data for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors if t.name == "blk.0.attn_q.weight"]
        assert np.array_equal(gguf.quantize(rows, Q.Q8_0), ours[0])


def test_threads_make_the_same_bytes(engine, bench, tmp_path):
    """Also where they do not divide the rows: 64, 160 and 259 by 3."""
    vocabulary = tokenizer.vocabulary(bench.words, bench.words_folder, 259)
    language.write(tmp_path / "f16.gguf", bench.model.language, "small", vocabulary)
    counts = [far.Engine(threads=n).quantise(tmp_path / "f16.gguf", tmp_path / f"{n}.gguf", "q4_0") for n in (1, 3)]
    assert counts[0] == counts[1]
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()
