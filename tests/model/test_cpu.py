"""What is quicker on a processor computes the same."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mvlm import build
from mvlm.data.collate import collate
from mvlm.model import cpu
from mvlm.model.cpu import RMSNorm, quicken


def norms(size: int = 24) -> tuple[torch.nn.Module, RMSNorm]:
    plain, ours = LlamaRMSNorm(size, eps=1e-5), LlamaRMSNorm(size, eps=1e-5)
    torch.nn.init.normal_(plain.weight)
    ours.load_state_dict(plain.state_dict())
    ours.__class__ = RMSNorm
    return plain, ours


def test_norm_and_its_gradient_are_llamas() -> None:
    """float32 has 24 bits; the mean of 24 numbers rounds a few of them away: 1e-5 of the largest."""
    torch.manual_seed(0)
    results = []
    seen, weights = 3 * torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    for norm in norms():
        hidden = seen.clone().requires_grad_()
        out = norm(hidden)
        (out * weights).sum().backward()
        results.append([out, hidden.grad, norm.weight.grad])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))


def test_under_autocast_a_norm_gives_what_the_product_after_it_takes() -> None:
    """To the bit, but for what the factor's other order of additions rounds: one in a thousand is a neighbour in bfloat16."""
    torch.manual_seed(0)
    plain, ours = norms()
    hidden = torch.randn(50, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = plain(hidden), ours(hidden)
    assert wanted.dtype == torch.float32 and found.dtype == torch.bfloat16
    assert (found != wanted.bfloat16()).float().mean() < 0.01
    found.sum().backward()
    assert hidden.grad.dtype == ours.weight.grad.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(ours(hidden), plain(hidden))


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_tables_gradient_is_the_same(tied: bool) -> None:
    """Words that come twice, and two backwards before a step."""
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, tie_word_embeddings=tied))
        if sparse:
            words = model.get_input_embeddings()
            words.sparse = words.weight is model.get_output_embeddings().weight
            assert words.sparse == tied
        for ids in ([[1, 2, 2, 3]], [[2, 9, 9, 9]]):
            model(torch.tensor(ids), labels=torch.tensor(ids), use_cache=False).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert not grads[1].is_sparse
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-7)


def test_a_quickened_model_is_the_same_model(configure) -> None:
    """Names, weights, loss."""
    cfg = configure("model=nano")
    model = build.model(cfg)
    mixture = build.mixture(cfg, "finetune", build.corpus(cfg), build.tokenizer(cfg), model.image_tokens)
    batch, before = collate([mixture[k] for k in range(3)]), model.state_dict()
    wanted = model(batch).total
    quicken(model)
    assert any(isinstance(module, RMSNorm) for module in model.language.modules())
    torch.testing.assert_close(model(batch).total, wanted, rtol=1e-5, atol=0)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize("promised", [True, False])
def test_memory_that_was_freed_comes_back_without_page_faults(promised: bool) -> None:
    """In a child, which ends with what it kept. 256 MB have 65,536 pages of 4 kB, which glibc would otherwise ask for each time. A limit of
    the address space refuses the room that is marked for huge pages, and memory is kept all the same."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            if not promised:
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, -1))
            cpu.keep_memory()
            library, size = ctypes.CDLL(None), ctypes.c_size_t(2**28)
            library.malloc.restype = ctypes.c_void_p
            faults = []
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                ctypes.memset(place := library.malloc(size), 1, 2**28)
                library.free(ctypes.c_void_p(place))
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            os.write(writer, json.dumps(faults).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    first, *later = json.loads(os.read(reader, 1000))
    os.close(reader)
    assert first > 0 and max(later) < 100


def test_a_library_without_mallopt_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())
    cpu.keep_memory()
