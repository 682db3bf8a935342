"""The language model's file against transformers' own reader of GGUF, and back into PyTorch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mvlm.export import language, tokenizer
from mvlm.export.container import Opened

from .conftest import llama


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_model(bench, tmp_path, tied):
    """Another reader, which turns the rows of queries and keys back by its own code: the same weights in the same places."""
    model = llama(tied=tied)
    words = tokenizer.vocabulary(bench.words, bench.words_folder, 259)
    language.write(tmp_path / "x.gguf", model, "small", words)
    there = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").state_dict()
    for name, value in model.state_dict().items():
        stored = value if value.dim() == 1 else value.half().float()
        assert torch.equal(there[name].float(), stored), name
    config = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").config
    for key in ("hidden_size", "num_key_value_heads", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(config, key) == pytest.approx(getattr(model.config, key)), key
    assert config.rope_parameters["rope_theta"] == 5000


def test_read_back_is_the_inverse(bench, tmp_path):
    model, other = llama(), llama()
    language.write(tmp_path / "x.gguf", model, "small", tokenizer.vocabulary(bench.words, bench.words_folder, 259))
    for value in other.parameters():
        value.data.zero_()
    language.read_back(other, Opened(tmp_path / "x.gguf"))
    for (name, value), there in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(there, value if value.dim() == 1 else value.half().float()), name


def test_what_llama_cpp_computes_otherwise_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match=r"is a Qwen2ForCausalLM and export writes LlamaForCausalLM alone"):
        language.check(other)
    scaled = llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, attention_bias=True)
    with pytest.raises(ValueError, match=r"rope_type=linear \(default\), attention_bias=true \(false\)"):
        language.check(scaled)
    language.check(llama())
