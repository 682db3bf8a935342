"""Decoding beside transformers' own `generate()`: the same tokens, whichever way the past is kept."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mvlm.model import decode
from mvlm.model.decode import Captured, Decoder, Decoders

LIMIT = 20
WAYS = [Decoder, Captured]


def llama(attention: str = "sdpa", layers: int = 3) -> LlamaForCausalLM:
    """Random weights, wide enough apart that tokens differ; two query heads a key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(lengths: list[int], device: str = "cpu", seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded on the left, and which are real."""
    ids = torch.randint(1, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    real = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    return ids.to(device), real.to(device)


def read(language, ids, real):
    """The pass over the prompts: what `Decoder.begin` takes over."""
    positions = (real.cumsum(1) - 1).clamp(min=0)
    past = DynamicCache()
    hidden = language.model(
        input_ids=ids, attention_mask=real, position_ids=positions, past_key_values=past, use_cache=True
    ).last_hidden_state
    return past, real, language.lm_head(hidden[:, -1]).argmax(-1)


@torch.no_grad()
def decoded(decoder, past, real, first, steps: int = LIMIT - 1) -> list[list[int]]:
    decoder.begin(past, real, first)
    return torch.stack([first, *(decoder.step().clone() for _ in range(steps))], 1).tolist()


@torch.no_grad()
def expected(language, ids, real) -> list[list[int]]:
    told = {"attention_mask": real, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    said = language.generate(ids, max_new_tokens=LIMIT, **told)[:, ids.shape[1] :].tolist()
    assert len({tuple(row) for row in said}) == len(said) and all(len(set(row)) > 3 for row in said)
    return said


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "other"])
@pytest.mark.parametrize("lengths", [[9], [4, 9, 1, 7]])
def test_tokens_are_those_of_generate(way, attention, lengths, monkeypatch):
    if attention == "other":  # is told which positions are real, as flash attention is
        if way is Captured:
            pytest.skip("only with a mask")
        monkeypatch.setattr(decode, "MASKED", ())
    language = llama(attention if attention != "other" else "sdpa")
    ids, real = prompts(lengths)
    with torch.no_grad():
        past, real, first = read(language, ids, real)
    decoder = way(language, past, len(lengths), 64)
    assert decoded(decoder, past, real, first) == expected(language, ids, real)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_rows_may_leave(way):
    language = llama()
    ids, real = prompts([4, 9, 1, 7])
    whole = expected(language, ids, real)
    past, real, first = read(language, ids, real)
    decoder = way(language, past, 4, 64)
    decoder.begin(past, real, first)
    running = [0, 1, 2, 3]
    for number, leave in enumerate([None, 1, None, 0, None, 1]):
        if leave is not None:
            running.pop(leave)
            decoder.keep(torch.tensor([place for place in range(len(running) + 1) if place != leave]))
        assert decoder.step().tolist() == [whole[row][1 + number] for row in running]


@pytest.mark.parametrize("way", WAYS)
def test_one_decoder_serves_all_that_fit(way, monkeypatch):
    """A captured one attends to all places, so not even a prompt whose numbers overflowed may leave a trace."""
    monkeypatch.setattr(decode, "captures", lambda *some: way is Captured)
    language = llama()
    decoders = Decoders(language)
    made = []
    for lengths, seed in (([9, 3, 5], 1), ([2], 2), ([1, 6], 3), ([300], 4)):
        ids, real = prompts(lengths, seed=seed)
        with torch.no_grad():
            past, real, first = read(language, ids, real)
            decoder = decoders.begin(past, real, first, LIMIT)
            said = torch.stack([first, *(decoder.step().clone() for _ in range(LIMIT - 1))], 1).tolist()
        assert said == expected(language, ids, real)
        made.append(decoder)
        for room in decoder.cache.layers:
            for one in room.whole:
                one.fill_(float("nan"))
    assert type(made[0]) is way and made[0] is made[1] is made[2] is not made[3]
    assert (made[0].rows, made[0].length) == (3, 256) and (made[3].rows, made[3].length) == (1, 512)


@torch.no_grad()
def test_a_step_replaces_no_tensor():
    """A graph reads and writes the addresses that it was captured with."""
    language = llama()
    past, real, first = read(language, *prompts([4, 9]))
    decoder = Captured(language, past, 2, 64)

    def addresses():
        rooms = [one.data_ptr() for room in decoder.cache.layers for one in (*room.whole, room.keys, room.values)]
        return rooms + [one.data_ptr() for one in (decoder.ids, decoder.positions, decoder.place, decoder.mask)]

    before = addresses()
    decoded(decoder, past, real, first, 3)
    decoder.keep(torch.tensor([1]))
    decoder.step()
    assert addresses() == before


@pytest.mark.parametrize("attention", ["sdpa", "eager", "grouped"])
@torch.no_grad()
def test_a_step_reads_no_value(attention):
    """A graph cannot wait for one. Here it runs on tensors that have none; one that lies on the processor would be refused, too."""
    with torch.device("meta"):
        language, past = llama(attention), DynamicCache()
        for layer in range(3):
            past.update(torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8), layer)
        decoder = Captured(language, past, 2, 64)
        with pytest.raises(RuntimeError, match="meta tensors"):
            int(decoder.place)
    decoder.run()
    assert decoder.ids.is_meta


@torch.no_grad()
def test_without_a_compiler_a_row_is_decoded_all_the_same(monkeypatch, caplog):
    """And it is told. An error that compiling has no part in is raised."""

    def compiled():
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(decode, "_compiled", compiled)
    language = llama()
    ids, real = prompts([9])
    past, real, first = read(language, ids, real)
    decoder = Captured(language, past, 1, 64)
    decoder.compiled = True
    decoder._warm_up()
    assert "not compiled" in caplog.text and caplog.text.strip().endswith("Failed to find C compiler.")
    assert decoded(decoder, past, real, first) == expected(language, ids, real)
    monkeypatch.setattr(decoder, "_read", lambda *some: compiled())
    with pytest.raises(RuntimeError, match="C compiler"):
        decoder._warm_up()


@pytest.mark.slow  # compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a compiler")
@torch.no_grad()
def test_one_compilation_serves_all_layers():
    from torch._dynamo.utils import counters

    language = llama(layers=12)  # more than the compilations that torch allows a function
    ids, real = prompts([9])
    past, real, first = read(language, ids, real)
    decoder = Captured(language, past, 1, 64)
    decoder.compiled = True
    counters.clear()
    assert decoded(decoder, past, real, first) == expected(language, ids, real)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[9], [4, 9, 1, 7]])
@torch.no_grad()
def test_a_replayed_graph_gives_the_same_tokens(lengths):
    """In float32, where a processor and a GPU agree on these wide-apart tokens. One row's layers are compiled too."""
    ids, real = prompts(lengths)
    whole = expected(llama(), ids, real)
    language = llama().cuda()
    decoders = Decoders(language)
    for _ in range(2):  # captured, then kept
        past, here, first = read(language, ids.cuda(), real.cuda())
        decoder = decoders.begin(past, here, first, LIMIT)
        assert isinstance(decoder, Captured)
        said = torch.stack([first, *(decoder.step().clone() for _ in range(LIMIT - 1))], 1).tolist()
        assert said == whole
