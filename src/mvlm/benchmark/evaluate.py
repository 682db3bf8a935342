"""Benchmarks answered, the answers kept line by line, and scored: with the pictures and with the controls."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mvlm.benchmark.answer import Control, answers
from mvlm.benchmark.base import PROTOCOL, Benchmark, Question
from mvlm.model.mobilevlm import MobileVLM

AVERAGED = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")
"""The six whose plain mean is Avg in the paper's tables (MME as points / 20)."""

log = logging.getLogger(__name__)


def average(values: Mapping[str, float]) -> float | None:
    """Avg = (GQA + SQA + VQA_T + POPE + MME_P / 20 + MMB) / 6, or None while one of the six is not there."""
    return sum(values[name] for name in AVERAGED) / len(AVERAGED) if set(AVERAGED) <= set(values) else None


def evaluate(
    model: MobileVLM | None,
    benchmarks: Iterable[Benchmark],
    folder: Path,
    *,
    controls: Sequence[Control] = (),
    max_new_tokens: int | None = None,
    cropped: Any = None,
    **loop: Any,
) -> dict[str, Any]:
    """Answers what is not answered yet, then scores everything.

    Args:
        model: None if all answers are stored already: scoring them again needs no model.
        folder: of the stored answers, NAME.jsonl and NAME-CONTROL.jsonl. They say nothing of the model: one folder a
            model.
        controls: `blind` and `shuffled`, each asked beside the true pictures.
        max_new_tokens: below the benchmark's own limit, to save time; how many answers it cut is in the result.
        cropped: replaces `pictures` for benchmarks whose pictures the reference crops, if they are padded elsewhere.
        loop: the other arguments of `answers`.

    Returns:
        {"protocol": ..., "benchmarks": {name: {view: score and "cut"}}, "avg": {view: Avg or None}} in plain types; a
        view is `none` or a control.
    """
    views: list[Control] = ["none", *controls]
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        questions = benchmark.questions()
        own = dict(loop)
        if benchmark.crops and cropped is not None:
            own |= {"pictures": cropped, "features": {}}
        elif own.get("features") is None:
            own["features"] = {}  # the controls show the same pictures
        own["max_new_tokens"] = min(benchmark.max_new_tokens, max_new_tokens or benchmark.max_new_tokens)
        results[benchmark.name] = {}
        for view in views:
            path = answers_file(folder, benchmark, view)
            lines = answer_all(model, questions, path, title=f"{benchmark.name} {view}", control=view, **own)
            score = benchmark.score({key: line["text"] for key, line in lines.items()})
            cut = sum(not line["stopped"] for line in lines.values())
            results[benchmark.name][view] = score.as_dict() | {"cut": cut}
    avg = {view: average({name: scores[view]["value"] for name, scores in results.items()}) for view in views}
    return {"protocol": PROTOCOL, "benchmarks": results, "avg": avg}


def answers_file(folder: Path, benchmark: Benchmark, view: Control) -> Path:
    """Where the answers to a benchmark are stored, of the true pictures and of each control."""
    return folder / (f"{benchmark.name}.jsonl" if view == "none" else f"{benchmark.name}-{view}.jsonl")


def answer_all(
    model: MobileVLM | None, questions: Sequence[Question], path: Path, *, title: str, **loop: Any
) -> dict[str, dict[str, Any]]:
    """Every question's line of a file of answers; those not there yet are answered and appended one by one.

    Args:
        path: JSON lines {id, prompt, text, stopped}.
        title: for the progress bar.
        loop: arguments of `answers`.

    Returns:
        The lines by id.
    """
    lines = stored(path, questions)
    missing = len(questions) - len(lines)
    if not missing:
        return lines
    if model is None:
        raise ValueError(f"{missing} of {len(questions)} questions have no answer in {path}, and no model was given")
    with path.open("a", encoding="utf-8") as file, _progress() as progress:
        task = progress.add_task(title, total=missing)
        for question, text, stopped in answers(model, questions, skip=frozenset(lines), **loop):
            line = {"id": question.id, "prompt": question.text, "text": text, "stopped": stopped}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            lines[question.id] = line
            progress.advance(task)
    return lines


def stored(path: Path, questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """The lines of a file of answers by id; a last line without its end is cut off from the file, with a message.

    Raises:
        ValueError: a line is no answer, or answers a question that is not asked in these words.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s ends within a line (an interrupted run): that answer is dropped and asked for again", path)
        with path.open("r+b") as file:
            file.truncate(whole)
    prompts, lines = {q.id: q.text for q in questions}, {}
    for number, text in enumerate(content[:whole].decode("utf-8").split("\n")[:-1], 1):
        try:
            line = json.loads(text)
            known = prompts.get(line["id"]) == line["prompt"] and {"text", "stopped"} <= set(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no stored answer ({error!r}): remove the file") from error
        if not known:
            raise ValueError(
                f"{path}, line {number} answers {line['id']!r}, which is not asked in these words here: "
                "the file belongs to other questions; remove it, or answer into another folder"
            )
        lines[line["id"]] = line
    return lines


class _Rate(ProgressColumn):
    """Questions a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} a second" if task.speed else "")


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
