"""Decoding as in the paper's Figure 3: one picture, one prompt, 256 tokens, batch 1; ours beside transformers' `generate()`.

    python bench.py target=decode                                         pocket shapes, as served on this machine
    python bench.py target=decode model=1.7b precision=float32

Both ways have the same language model with random weights and the same prompt: a picture's tokens (random vectors of the word
embeddings' size, for no step looks at a value) and TEXT words. Neither stops before TOKENS tokens. A round is each way once, in turn.

    tokens/s     of decoding alone: the time of TOKENS tokens less that of one, which is the pass over the prompt
    reads        bytes that a token must fetch from memory: the language model without its embedding table (a head that shares the
                 table is read whole), and the keys and values so far, on the average over the tokens
    bandwidth    measured in this process: the sum of a tensor as large as the weights, the best of five after each round
    limit        bandwidth / reads: tokens/s if nothing but these bytes took time; `share` is the part of it that is reached
    same         tokens of both ways that agree before the first that does not. In float32 all should; in half precision sums in
                 another order round otherwise, and random weights give many near ties

The paper's figure for its 1.7B on an A100 is 37.37 tokens/s, its pass over picture and prompt included or not: it does not tell.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn

from mvlm import build, plan
from mvlm.batch import IMAGE_TOKEN
from mvlm.benchmark.answer import _generate, read
from mvlm.model.decode import Decoders
from mvlm.model.mobilevlm import MobileVLM

TOKENS, TEXT = 256, 64
"""Of the answer; of the prompt beside the picture's."""


def prompt(model: MobileVLM) -> tuple[list[int], Tensor]:
    """Ids of a first word, a picture and TEXT words, and the picture's tokens, (1, M, D)."""
    draw = torch.Generator().manual_seed(0)
    words = model.language.get_input_embeddings().weight
    text = torch.randint(3, len(words), (TEXT,), generator=draw).tolist()
    tokens = torch.randn(1, model.image_tokens, words.shape[1], generator=draw) * words.float().std().cpu()
    return [1, *[IMAGE_TOKEN] * model.image_tokens, *text], tokens.to(words)


def ours(model: MobileVLM, decoders: Decoders, ids: list[int], tokens: Tensor, limit: int) -> list[int]:
    """The answer loop with one question."""
    cut = len(ids) - TEXT
    prefix = read(model, torch.tensor([ids[:cut]], device=tokens.device), tokens)
    ((said, _),) = _generate(model, decoders, prefix, [0], [ids[cut:]], frozenset(), limit)
    return said


def peer(model: MobileVLM, ids: list[int], tokens: Tensor, limit: int) -> list[int]:
    """transformers' `generate()`."""
    embedded = model.embed(torch.tensor([ids], device=tokens.device), tokens)
    return model.language.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=tokens.device),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()


def weight_bytes(language: nn.Module) -> int:
    """Bytes of weights that every token reads."""
    table = language.get_input_embeddings().weight
    body = sum(p.nbytes for p in language.model.parameters() if p is not table)
    return body + language.lm_head.weight.nbytes


def past_bytes(language: nn.Module, prompt: int) -> float:
    """Bytes of keys and values that a decoded token reads, on the average of the TOKENS - 1 that follow the first."""
    sizes = language.config
    width = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    place = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * width * language.lm_head.weight.itemsize
    return place * (prompt + TOKENS / 2)  # the first of them sees prompt + 1 positions, the last prompt + TOKENS - 1


def bandwidth(values: Tensor) -> float:
    """Bytes a second of summing the tensor, the best of five."""
    best = 0.0
    for _ in range(5):
        began = perf_counter()
        values.sum().item()
        best = max(best, values.nbytes / (perf_counter() - began))
    return best


def run(cfg: DictConfig) -> dict[str, Any]:
    """Decode both ways, `cfg.rounds` times in turn, and print tokens a second, the limit and the ratio.

    Returns:
        What was measured, in plain types: by way `tokens_per_second` (median), `share` of the limit and all `seconds`; `limit`,
        `bandwidth` and `reads`; the `ratio` of the medians and the number of tokens that are the `same`.
    """
    half = build.autocast_type(build.precision("auto")) == torch.bfloat16
    precision = cfg.precision if cfg.precision != "auto" else "bfloat16" if half else "float32"
    if precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"precision={precision}: target=decode knows auto, float32, bfloat16 and float16")
    device = build.device()
    with device:
        model = build.model(cfg).to(getattr(torch, precision)).eval()
    ids, tokens = prompt(model)
    decoders = Decoders(model.language)
    weights = weight_bytes(model.language)
    values = torch.ones(weights // 4, device=device)
    ways: dict[str, Callable[[int], list[int]]] = {
        "answer loop": lambda limit: ours(model, decoders, ids, tokens, limit),
        "generate()": lambda limit: peer(model, ids, tokens, limit),
    }
    said: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rates = []
    with torch.no_grad():
        for way in ways.values():
            way(
                TOKENS if device.type == "cuda" else 2
            )  # a graph is captured, and memory given, before anything is timed
        for number in range(cfg.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                took = []
                for limit in (1, TOKENS):
                    began = perf_counter()
                    said[way] = ways[way](limit)
                    took.append(perf_counter() - began)
                seconds[way].append(round(took[1] - took[0], 4))
            rates.append(bandwidth(values))
    first, second = said.values()
    agree = [a == b for a, b in zip(first, second, strict=True)]
    reads, rate = weights + past_bytes(model.language, len(ids)), max(rates)
    speed = {way: (TOKENS - 1) / median(some) for way, some in seconds.items()}
    mine, theirs = speed.values()
    measured = {
        "what": f"{TOKENS} tokens after {len(ids)}, batch 1, {precision}, {device}, "
        f"a language model of {sum(p.numel() for p in model.language.parameters()) / 1e6:,.1f}M random weights",
        "threads": torch.get_num_threads(),
        "reads": round(reads),
        "bandwidth": round(rate),
        "limit": round(rate / reads, 2),
        "ways": {
            way: {
                "tokens_per_second": round(speed[way], 2),
                "share": round(speed[way] * reads / rate, 3),
                "seconds": seconds[way],
            }
            for way in ways
        },
        "ratio": round(mine / theirs, 2),
        "same": agree.index(False) if False in agree else TOKENS,
    }
    _show(measured)
    return measured


def _show(measured: dict[str, Any]) -> None:
    table = plan.new_table(measured["what"], "way", "tokens/s", "of the limit", "seconds a round")
    for name, way in measured["ways"].items():
        rounds = " ".join(f"{s:.2f}" for s in way["seconds"])
        table.add_row(name, f"{way['tokens_per_second']:.2f}", f"{way['share']:.1%}", rounds)
    Console().print(table)
    told = f"{measured['bandwidth'] / 1e9:,.1f} GB/s over {measured['reads'] / 1e6:,.0f} MB a token, threads: {measured['threads']}"
    Console().print(f"limit {measured['limit']:,.2f} tokens/s: {told}", soft_wrap=True)
    agree = f"the first {measured['same']} of {TOKENS} tokens agree"
    Console().print(f"ratio of the medians {measured['ratio']:.2f}; {agree}", soft_wrap=True)
