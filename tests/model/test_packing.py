"""Samples one after the other in one row: the loss, every gradient and the isolation of a padded batch, for each kind of attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, modeling_flash_attention_utils

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN, Batch
from mvlm.data.collate import collate
from mvlm.data.dataset import Sample
from mvlm.model import attention, mobilevlm
from mvlm.model.mobilevlm import MobileVLM
from mvlm.model.vision import Vision
from mvlm.projector.ldpv2 import LDPv2

WORDS = 97


def joined(kind: str, width: int = 48) -> MobileVLM:
    """4x4 patches, 4 image tokens; three query heads to a key head, more positions than a block of queries has."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    language = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, attn_implementation="eager", **sizes))
    language.config._attn_implementation = kind  # past the question whether this machine has its kernel
    tower = Vision("vit_small_patch14_dinov2", 56, depth=2, embed_dim=24, num_heads=2, class_token=False)
    return MobileVLM(tower, LDPv2, language).double()


@pytest.fixture
def batch() -> Batch:
    """Four lengths; a picture in the first, in the last, and none between; nothing of the third is learned."""
    draw = torch.Generator().manual_seed(1)
    samples = []
    for number, (length, picture) in enumerate([(9, True), (5, False), (3, False), (14, True)]):
        words = torch.randint(3, WORDS, (length,), generator=draw).tolist()
        ids = [1, *[IMAGE_TOKEN] * 4 * picture, *words]
        learned = [i if k > len(ids) // 2 and number != 2 else IGNORE_INDEX for k, i in enumerate(ids)]
        pixels = torch.randn(3, 56, 56, generator=draw) if picture else None
        samples.append(Sample(str(number), "made", ids, learned, pixels=pixels))
    batch = collate(samples)
    return replace(batch, pixels=batch.pixels.double())


@pytest.fixture
def by_definition(monkeypatch):
    """What needs a GPU is put in by its definition, so that what is told to it, and by which way through transformers, can be tested here:
    flash's function for documents of many lengths by torch's attention of each alone, flex's kernel by torch's own uncompiled code, whose
    backward torch otherwise keeps for GPUs."""

    def each_alone(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        lengths = cu_seqlens_q.diff().tolist()
        assert causal and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q)
        each = zip(*(one.transpose(0, 1).split(lengths, 1) for one in (q, k, v)), strict=True)
        attend = partial(scaled_dot_product_attention, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return torch.cat([attend(*one) for one in each], 1).transpose(0, 1)

    def not_these(*args, **more):
        raise AssertionError("only documents of many lengths are asked for")

    monkeypatch.setattr(
        modeling_flash_attention_utils, "_lazy_imports", lambda *args, **more: (not_these, each_alone, *[not_these] * 3)
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def loss_and_gradients(model: MobileVLM, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model(batch)
    return loss.total, torch.autograd.grad(
        loss.total, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )


@pytest.mark.usefixtures("by_definition")
@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("kind", ["grouped", "sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_loss_and_gradients_are_those_of_a_padded_batch(batch, kind, block, monkeypatch):
    """All but the loss is float64, so what may differ is the loss' rounding to float32, 6e-8 of it. (The blocks are grouped's.)"""
    monkeypatch.setattr(attention, "BLOCK", block)
    model = joined(kind)
    monkeypatch.setattr(mobilevlm, "PACKS", ())
    padded, wanted = loss_and_gradients(joined("eager"), batch)
    monkeypatch.setattr(mobilevlm, "PACKS", (kind,))
    rows = []
    watch = model.language.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    packed, found = loss_and_gradients(model, batch)
    watch.remove()
    assert rows == [(1, int(batch.attention_mask.sum()))], "no position of padding reaches the language model"
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, dtype, tolerance",
    [
        ("flex_attention", torch.float32, 0.005),
        ("flex_attention", torch.bfloat16, 0.05),
        ("flash_attention_2", torch.bfloat16, 0.05),
    ],
)
def test_the_kernels_of_a_gpu_do_so_too(batch, kind, dtype, tolerance):
    """Heads of 16, the narrowest that they take, beside float64 on the processor. There bfloat16 changes the loss by 1e-5 and no
    gradient by more than 1.2 % of its size (a GPU's float32 convolution has 10 bits, too); without borders between the samples the loss
    is off by 6e-4 and gradients by half of their size."""
    if kind == "flash_attention_2":
        pytest.importorskip("flash_attn")
    loss, wanted = loss_and_gradients(joined("eager", 96), batch)
    model = joined(kind, 96).to("cuda", dtype)
    there = replace(batch, pixels=batch.pixels.to(dtype)).to("cuda")
    found, ours = loss_and_gradients(model, there)
    assert float(found) == pytest.approx(float(loss), rel=2e-4)
    for one, right in zip(ours, wanted, strict=True):
        assert (one is None) == (right is None)
        if one is not None:
            assert (one.cpu().double() - right).norm() <= tolerance * right.norm()


def test_no_sample_sees_another(batch):
    """Another first sample, another loss of it, and the same of all others: each alone loses what it loses in the row."""
    model = joined("grouped")

    def alone(number: int) -> float:
        real = batch.attention_mask[number]
        cut = {
            name: getattr(batch, name)[number : number + 1, real] for name in ("input_ids", "labels", "attention_mask")
        }
        picture = {0: batch.pixels[:1], 3: batch.pixels[1:]}.get(number)
        return model(replace(batch, **cut, pixels=picture)).total.item()

    each = [alone(number) for number in range(4)]
    assert each[2] == 0 and len({round(loss, 6) for loss in each}) == 4
    assert model(batch).total.item() == pytest.approx(sum(each), rel=1e-6)
    other = replace(batch, input_ids=batch.input_ids.clone())
    other.input_ids[0, 8] = (other.input_ids[0, 8] + 1) % WORDS
    change = model(other).total.item() - model(batch).total.item()
    batch = other
    assert abs(change) > 1e-3 and alone(0) - each[0] == pytest.approx(change, abs=1e-4)


def test_dropout_of_attention_is_kept_in_a_row(batch):
    """Where weights are to be dropped, torch's own attention does it, document by document."""
    model = joined("grouped").train()
    steady = {model(batch).total.item() for _ in range(2)}
    for layer in model.language.model.layers:
        layer.self_attn.attention_dropout = 0.5
    dropped = {model(batch).total.item() for _ in range(2)}
    assert len(steady) == 1 and len(dropped) == 2
