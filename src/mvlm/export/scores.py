"""The benchmarks answered by llama.cpp, scored by the same code, beside PyTorch's scores for the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mvlm import build, score
from mvlm.benchmark.base import Benchmark
from mvlm.benchmark.evaluate import answers_file, evaluate
from mvlm.chat import Chat
from mvlm.data.image import open_picture
from mvlm.export.engine import Engine
from mvlm.export.gate import context, prompt, shown
from mvlm.run import Run


def opened(cfg: DictConfig, run: Run) -> list[Benchmark]:
    """The chosen benchmarks, read now, so that what is wrong with their files is told before any work."""
    how = {"folder": cfg.benchmark_root, "protocol": cfg.protocol, "any_version": cfg.any_version}
    return score.opened(run.config, cfg.benchmark, build.corpus(run.config), **how)


def measure(
    cfg: DictConfig,
    run: Run,
    chat: Chat,
    found: Sequence[Benchmark],
    language: Path,
    mmproj: Path,
    progress: Callable[[str, int], Callable[[], None]],
) -> dict[str, Any]:
    """Answer everything (into answers/ beside the files) and score it.

    Returns:
        {"protocol", "generated", "avg", "benchmarks": {name: {"pytorch", "llama.cpp", "questions", "cut"}}}; `pytorch` is
        None where the run's results are missing or of other questions.
    """
    folder = language.parent / "answers"
    for benchmark in found:
        _answer(cfg, run, chat, benchmark, answers_file(folder, benchmark), language, mmproj, progress)
    results = evaluate(None, found, folder)
    before = run.results(cfg.protocol)
    rows = {}
    for benchmark in found:
        name, after = benchmark.name, results["benchmarks"][benchmark.name]["none"]
        then = before.get("questions", {}).get(name, {}).get("sha256")
        same = then == score.fingerprint(benchmark.questions())["sha256"]
        rows[name] = {
            "pytorch": before["benchmarks"][name]["none"]["value"] if same else None,
            "llama.cpp": after["value"],
            "questions": after["items"],
            "cut": after["cut"],
        }
    generated = score.is_generated(run.config, cfg.benchmark_root)
    return {"protocol": results["protocol"], "generated": generated, "avg": results["avg"]["none"], "benchmarks": rows}


def _answer(
    cfg: DictConfig,
    run: Run,
    chat: Chat,
    benchmark: Benchmark,
    path: Path,
    language: Path,
    mmproj: Path,
    progress: Callable[[str, int], Callable[[], None]],
) -> None:
    questions = benchmark.questions()
    cropped = build.asking(run.config, chat.words, lambda: chat.model)["cropped"]
    look = cropped if benchmark.crops and cropped else chat.pictures
    asked = [
        prompt(chat.talk, q.text, None if q.image is None else shown(look, open_picture(q.image))) for q in questions
    ]
    most = cfg.max_new_tokens or score.limit(run.config, cfg.benchmark_root)
    limit = min(benchmark.max_new_tokens, most or benchmark.max_new_tokens)
    step = progress(f"llama.cpp, {cfg.quant}, {benchmark.name}", len(questions))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        how = {"limit": limit, "context": context(chat.model)}
        said = Engine.of(cfg).ask(language, mmproj, asked, reuse=True, **how)
        for question, one in zip(questions, said, strict=True):
            line = {"id": question.id, "prompt": question.text, "text": chat.words.decode(one.ids).strip()}
            line |= {"stopped": one.stopped, "limit": limit, "precision": cfg.quant}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            step()
