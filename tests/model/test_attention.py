"""The quicker attention against torch's own, in values and gradients, and where it steps aside."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from mvlm.model import attention
from mvlm.model.attention import grouped_attention

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_values_and_gradients_equal_torch(groups, block, monkeypatch):
    """In blocks of which the last is not whole, and at once. float64, so that only the order of additions differs: 1e-12."""
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.manual_seed(0)
    query = torch.randn(2, 6, 9, 4, dtype=torch.float64)
    key, value = torch.randn(2, 2, groups, 9, 4, dtype=torch.float64).unbind(0)
    results = []
    for compute in (
        lambda q, k, v: grouped_attention(q, k, v, 0.3),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
    ):
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        out = compute(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_language_model_may_ask_for_it():
    """Training loss and gradient equal sdpa's; padded batches and generation give the same tokens (they take sdpa's own path)."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa"))
    ours = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="grouped"))
    ours.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 50, (2, 11))
    losses = [model(ids, labels=ids, use_cache=False).loss for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)  # float32 sums in another order
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    said = [
        m.eval().generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for m in (plain, ours)
    ]
    assert said[0].tolist() == said[1].tolist()
