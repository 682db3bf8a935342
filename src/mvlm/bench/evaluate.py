"""Answering a benchmark: the batched loop beside one question at a time through transformers' own `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from mvlm import build, score
from mvlm.benchmark.answer import answers
from mvlm.benchmark.base import Question
from mvlm.data.image import Pictures
from mvlm.model.mobilevlm import MobileVLM
from mvlm.run import Run


def one_at_a_time(
    model: MobileVLM,
    questions: Sequence[Question],
    *,
    encode_prompt: Callable[[str, bool], list[int]],
    decode: Callable[[Sequence[int]], str],
    pictures: Pictures,
    stop_ids: frozenset[int],
    max_new_tokens: int,
) -> Iterator[tuple[str, str]]:
    """The peer: a loop as the reference has it, each question with its picture encoded anew. Yields (question id, answer)."""
    like = next(model.language.parameters())
    for question in questions:
        with torch.inference_mode():
            tokens = None
            if question.image is not None:
                pixels = pictures(question.image)[None].to(like.device, like.dtype)
                tokens = model.project(model.encode(pixels))
            ids = torch.tensor([encode_prompt(question.text, tokens is not None)], device=like.device)
            embedded = model.embed(ids, tokens)
            said = model.language.generate(
                inputs_embeds=embedded,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(stop_ids),
                pad_token_id=min(stop_ids),
            )[0].tolist()
        yield question.id, decode([token for token in said if token not in stop_ids]).strip()


def run(cfg: DictConfig) -> dict[str, Any]:
    """Answer the same questions both ways, `cfg.rounds` times in turn, and print questions a second and the ratio.

    Returns:
        What was measured, in plain types: `questions`, `tokens` (a prompt, mean), `rounds` of seconds by way, `ratio`
        of the median seconds, `same` answers and the number of differing ones (`flips`).
    """
    trained = Run.find(cfg.run) if cfg.run else None
    whole = trained.config if trained else cfg
    words = build.tokenizer(whole)
    model = build.trained(trained) if trained else build.model(cfg)
    if not trained:
        build.pretrained(model, cfg)
    half = build.autocast_type(build.precision("auto")) == torch.bfloat16
    precision = cfg.precision if cfg.precision != "auto" else "bfloat16" if half else "float32"
    model = model.to(getattr(torch, precision)).to(build.device()).eval()

    folder = Path(cfg.benchmark_root or build.corpus(whole).benchmarks)
    found = score.benchmarks(cfg.benchmark, folder)
    questions = [q for benchmark in found for q in benchmark.questions()[: cfg.questions]]
    common = build.asking(whole, words, lambda: model) | {"max_new_tokens": cfg.max_new_tokens}
    del common["cropped"]  # both ways show a picture as the model was trained on it
    ways: dict[str, Callable[[Sequence[Question]], dict[str, str]]] = {
        "batched loop": lambda some: {
            a.question.id: a.text for a in answers(model, some, batch_size=cfg.batch_size, **common)
        },
        "one at a time, generate()": lambda some: dict(one_at_a_time(model, some, **common)),
    }
    said: dict[str, dict[str, str]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way(questions[:2])  # the first call of each shape pays for what later ones do not
    for number in range(cfg.rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            began = perf_counter()
            said[way] = ways[way](questions)
            seconds[way].append(round(perf_counter() - began, 3))
    ours, peer = ways
    middle = {way: sorted(some)[len(some) // 2] for way, some in seconds.items()}
    flips = [q.id for q in questions if said[ours][q.id] != said[peer][q.id]]
    measured = {
        "what": f"{len(questions)} questions of {', '.join(b.name for b in found)}, {precision}, "
        + (f"run {trained.folder.name}" if trained else "pretrained parts, projector untrained"),
        "questions": len(questions),
        "pictures": len({q.image for q in questions}),
        "answer_tokens": round(sum(len(words.encode(text)) for text in said[ours].values()) / len(questions), 2),
        "batch_size": cfg.batch_size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "questions_per_second": {way: round(len(questions) / middle[way], 2) for way in ways},
        "ratio": round(middle[peer] / middle[ours], 2),
        "flips": len(flips),
        "flipped": flips[:20],
    }
    _show(measured)
    return measured


def _show(measured: dict[str, Any]) -> None:
    table = Table(title=measured["what"], title_justify="left")
    for column in ("way", "questions a second", "seconds a round"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, rate in measured["questions_per_second"].items():
        table.add_row(way, f"{rate:.2f}", " ".join(f"{s:.1f}" for s in measured["seconds"][way]))
    Console().print(table)
    differ = f"answers that differ: {measured['flips']} of {measured['questions']}"
    Console().print(f"ratio of the median rounds: {measured['ratio']:.2f}; {differ}", soft_wrap=True)
