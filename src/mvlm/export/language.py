"""The language model as a GGUF file: any LLaMA that transformers builds.

One table of names, NAMES, read both ways: to write a file, and to read a quantised one back into PyTorch. The rows of
the query and key matrices change places on the way, since llama.cpp rotates neighbouring rows of a head and
transformers rows of its two halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mvlm.export import container
from mvlm.export.container import Opened, Stored, vector, weights

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.layers.#.input_layernorm": "blk.#.attn_norm",
    "model.layers.#.self_attn.q_proj": "blk.#.attn_q",
    "model.layers.#.self_attn.k_proj": "blk.#.attn_k",
    "model.layers.#.self_attn.v_proj": "blk.#.attn_v",
    "model.layers.#.self_attn.o_proj": "blk.#.attn_output",
    "model.layers.#.post_attention_layernorm": "blk.#.ffn_norm",
    "model.layers.#.mlp.gate_proj": "blk.#.ffn_gate",
    "model.layers.#.mlp.up_proj": "blk.#.ffn_up",
    "model.layers.#.mlp.down_proj": "blk.#.ffn_down",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""transformers -> llama.cpp; `#` is a layer's number. A head that is tied to the embedding is not stored."""


def check(language: nn.Module) -> None:
    """Raises ValueError if llama.cpp's LLaMA computes something else than this language model."""
    if type(language) is not LlamaForCausalLM:
        raise ValueError(
            f"the language model is a {type(language).__name__} and export writes LlamaForCausalLM alone: "
            "take a LLaMA-like one (MobileLLaMA, Vicuna, SmolLM2)"
        )
    config: LlamaConfig = language.config
    rope = config.rope_parameters.get("rope_type", "default")
    faults = [f"hidden_act={config.hidden_act} (silu)"] * (config.hidden_act != "silu")
    faults += [f"rope_type={rope} (default)"] * (rope != "default")
    faults += ["attention_bias=true (false)"] * bool(config.attention_bias) + ["mlp_bias=true (false)"] * bool(
        config.mlp_bias
    )
    if faults:
        raise ValueError(
            f"export writes the plain LLaMA, and this one has {', '.join(faults)}: "
            "its file would load in llama.cpp and compute something else"
        )


def metadata(config: LlamaConfig, name: str) -> dict[str, Any]:
    """The file's table, but for its vocabulary."""
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    return {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": np.uint32(1),  # mostly float16; quantise.py sets its own
        "general.quantization_version": np.uint32(2),
        "llama.block_count": np.uint32(config.num_hidden_layers),
        "llama.context_length": np.uint32(config.max_position_embeddings),
        "llama.embedding_length": np.uint32(config.hidden_size),
        "llama.feed_forward_length": np.uint32(config.intermediate_size),
        "llama.vocab_size": np.uint32(config.vocab_size),
        "llama.attention.head_count": np.uint32(config.num_attention_heads),
        "llama.attention.head_count_kv": np.uint32(config.num_key_value_heads),
        "llama.attention.key_length": np.uint32(head),
        "llama.attention.value_length": np.uint32(head),
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "llama.rope.dimension_count": np.uint32(head),
        "llama.rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
    }


def tensors(language: LlamaForCausalLM) -> list[Stored]:
    """The file's tensors."""
    state = language.state_dict()
    return [
        (vector if state[ours].dim() == 1 else weights)(
            theirs, _interleaved(state[ours], heads) if heads else state[ours]
        )
        for ours, theirs, heads in _names(language)
    ]


def write(path: Path, language: LlamaForCausalLM, name: str, vocabulary: dict[str, Any]) -> None:
    """The float16 file.

    Args:
        vocabulary: from `mvlm.export.tokenizer`.
    """
    container.write(path, metadata(language.config, name) | vocabulary, tensors(language))


@torch.no_grad()
def read_back(language: LlamaForCausalLM, file: Opened) -> None:
    """Put a file's values, dequantised, in the place of the model's own."""
    state = language.state_dict()
    for ours, theirs, heads in _names(language):
        value = file.value(theirs)
        state[ours].copy_(_halved(value, heads) if heads else value)


def _names(language: LlamaForCausalLM) -> Iterator[tuple[str, str, int]]:
    """(ours, theirs, heads whose rows change places or 0) of every tensor; a name without a row is a fault of ours."""
    config = language.config
    for ours in language.state_dict():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        words = ours.removesuffix(".weight").split(".")
        number = next(filter(str.isdecimal, words), "")
        theirs = NAMES[".".join("#" if word == number else word for word in words)].replace("#", number)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(words[-1], 0)
        yield ours, f"{theirs}.weight", heads


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Row i of a head's first half and row i of its second become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _halved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `_interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
