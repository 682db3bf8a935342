"""Benchmarks answered, the answers kept line by line, and scored: with the pictures and with the controls."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import nn

from mvlm.benchmark.answer import Control, answers
from mvlm.benchmark.base import Benchmark, Question
from mvlm.benchmark.ranks import from_first, meet, ranks
from mvlm.model.mobilevlm import MobileVLM

AVERAGED = ("gqa", "sqa", "textvqa", "pope", "mme", "mmbench")
"""The six whose plain mean is Avg in the paper's tables (MME as points / 20)."""

UNTOLD = 32
"""Tokens at which a stored answer was cut off that does not say it."""

EVERY = 30.0
"""Seconds after which a log file is told again how far it is."""

log = logging.getLogger(__name__)


def average(values: Mapping[str, float]) -> float | None:
    """Avg = (GQA + SQA + VQA_T + POPE + MME_P / 20 + MMB) / 6, or None while one of the six is not there."""
    return sum(values[name] for name in AVERAGED) / len(AVERAGED) if set(AVERAGED) <= set(values) else None


def evaluate(
    model: MobileVLM | Callable[[], MobileVLM] | None,
    benchmarks: Iterable[Benchmark],
    folder: Path,
    *,
    controls: Sequence[Control] = (),
    again: bool = False,
    flips: bool = False,
    **loop: Any,
) -> dict[str, Any]:
    """Answers what is not answered yet, then scores everything.

    Under torch.distributed every process calls it and answers its part; all of them return the same.

    Args:
        model: or what builds it, which is done when the first question needs it; None if all answers are stored already:
            scoring them again needs no model.
        folder: of the stored answers, see `answers_file`. They say nothing of the model: one folder a model. All processes
            must see it.
        controls: `blind` and `shuffled`, each asked beside the true pictures.
        again: set the stored answers to these questions aside (see `set_aside`) and answer anew.
        flips: answer the true pictures' questions one at a time, too (NAME-single.jsonl), and count the answers that differ.
        loop: the arguments of `own_loop`.

    Returns:
        {"protocol": ..., "benchmarks": {name: {view: score, "cut", "short", "cut_at", "limit" and "precision"}}, "avg": {view: Avg
        or None}} in plain types; a view is `none` or a control. "cut" counts the answers that were cut off, "short" those of them
        below the protocol's limit, "cut_at" is the least number of tokens that one was cut off at (None if none was) and "limit" the
        most that any might have; "precision" is the number of answers by what the model computed in. With `flips` also "flips":
        {name: {"flipped", "items", "precision"}}.

    Raises:
        ValueError: the benchmarks are of several protocols, or what `answers` and the benchmarks say.
    """
    benchmarks = list(benchmarks)
    protocols = {benchmark.protocol: benchmark.name for benchmark in benchmarks}
    if len(protocols) > 1:
        told = ", ".join(f"{name} protocol={protocol}" for protocol, name in protocols.items())
        raise ValueError(f"scores of different protocols make no common average, and here is {told}")
    if model is not None and not isinstance(model, nn.Module):
        model = cache(model)
    views: list[Control] = ["none", *controls]
    for benchmark in benchmarks:
        answers_file(folder, benchmark).parent.mkdir(parents=True, exist_ok=True)
    if again:
        files = [answers_file(folder, b, view) for b in benchmarks for view in (*views, "single")]
        from_first(partial(set_aside, files))
    results: dict[str, dict[str, Any]] = {}
    differing: dict[str, Any] = {}
    for benchmark in benchmarks:
        questions, name = benchmark.questions(), benchmark.name
        ask = partial(answer_all, model, questions, **own_loop(benchmark, **loop))
        told = {}
        for view in views:
            path = answers_file(folder, benchmark, view)
            told[view] = ask(path, title=f"{name} {view}", control=view)
        results[name] = {view: _scored(benchmark, questions, lines) for view, lines in told.items()}
        if flips:
            alone = {"batch_size": 1, "features": {}}  # its picture, too, is encoded alone
            single = ask(answers_file(folder, benchmark, "single"), title=f"{name} one at a time", **alone)
            differing[name] = {
                "flipped": sum(single[key]["text"] != line["text"] for key, line in told["none"].items()),
                "items": len(single),
                "precision": _precisions([*single.values(), *told["none"].values()]),
            }
    scored = {"protocol": next(iter(protocols), None), "benchmarks": results, "avg": averages(results, views)}
    return scored | ({"flips": differing} if flips else {})


def scored_again(benchmark: Benchmark, folder: Path, views: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The scores of some views from their stored answers, in this process alone.

    Raises:
        ValueError: some are not there, or belong to other questions.
    """
    questions, scores = benchmark.questions(), {}
    for view in views:
        lines = stored(path := answers_file(folder, benchmark, view), questions)
        if missing := len(questions) - len(lines):
            raise ValueError(f"{missing} of {len(questions)} questions have no answer in {path}")
        scores[view] = _scored(benchmark, questions, {q.id: lines[q.id] for q in questions})
    return scores


def averages(scores: Mapping[str, Mapping[str, Any]], views: Iterable[str] = ()) -> dict[str, float | None]:
    """Avg by view, of scores by benchmark and view; of all views that any benchmark has, `none` first, if none is named."""
    views = list(views) or list(dict.fromkeys(["none", *(view for some in scores.values() for view in some)]))
    return {view: average({n: some[view]["value"] for n, some in scores.items() if view in some}) for view in views}


def answers_file(folder: Path, benchmark: Benchmark, view: str = "none") -> Path:
    """NAME.jsonl or NAME-VIEW.jsonl; of any protocol but the paper's in a folder of its own, since an answer to the same
    words may have been given under another limit."""
    folder = folder if benchmark.protocol == "paper" else folder / benchmark.protocol
    return folder / (f"{benchmark.name}.jsonl" if view == "none" else f"{benchmark.name}-{view}.jsonl")


def own_loop(
    benchmark: Benchmark, *, max_new_tokens: int | None = None, cropped: Any = None, **loop: Any
) -> dict[str, Any]:
    """The arguments of `answers` for one benchmark: its limit, its way with pictures, and features kept for its controls.

    Args:
        max_new_tokens: below the benchmark's own limit, to save time; how many answers it cut is in the result, and they are asked
            again under a higher one.
        cropped: replaces `pictures` for benchmarks whose pictures the reference crops, if they are padded elsewhere.
        loop: the other arguments.
    """
    if benchmark.crops and cropped is not None:
        loop |= {"pictures": cropped, "features": {}}
    elif loop.get("features") is None:
        loop["features"] = {}
    return loop | {"max_new_tokens": min(benchmark.max_new_tokens, max_new_tokens or benchmark.max_new_tokens)}


def _scored(
    benchmark: Benchmark, questions: Sequence[Question], lines: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    score = benchmark.score({key: line["text"] for key, line in lines.items()}, questions)
    ends = [line.get("limit", UNTOLD) for line in lines.values() if not line["stopped"]]
    told = {
        "cut": len(ends),
        "short": sum(end < benchmark.max_new_tokens for end in ends),
        "cut_at": min(ends, default=None),
        "limit": max((line.get("limit", UNTOLD) for line in lines.values()), default=None),
    }
    return score.as_dict() | told | {"precision": _precisions(lines.values())}


def _precisions(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    return dict(Counter(line.get("precision", "not told") for line in lines))


def answer_all(
    model: MobileVLM | Callable[[], MobileVLM] | None,
    questions: Sequence[Question],
    path: Path,
    *,
    title: str,
    **loop: Any,
) -> dict[str, dict[str, Any]]:
    """Every question's line of a file of answers; those not there yet, and those that a lower limit cut off, are answered and appended
    one by one.

    Of several processes each but the first appends to a file of its own beside `path`, and the first puts all in one when
    they are through, or at the next call, by however many processes.

    Args:
        model: see `evaluate`.
        path: JSON lines {id, prompt, text, stopped, limit, precision}.
        title: for the progress bar.
        loop: arguments of `answers`.

    Returns:
        The lines by id, in the order of the questions.
    """
    rank, count = ranks()
    limit = loop.setdefault("max_new_tokens", 128)
    lines = from_first(partial(collected, path, questions, limit if model is not None else 0))
    missing = len(questions) - len(lines)
    if not missing:
        return lines
    if model is None:
        raise ValueError(f"{missing} of {len(questions)} questions have no answer in {path}, and no model was given")
    model = model if isinstance(model, nn.Module) else model()
    precision = loop.get("precision", "float32")
    if precision == "float32":  # as it is
        precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    with ExitStack() as stack:
        file = stack.enter_context(_part(path, rank).open("a", encoding="utf-8"))
        meet()  # all files are there
        others = [stack.enter_context(_part(path, r).open("rb")) for r in range(1, count) if rank == 0]
        progress = stack.enter_context(_progress(disable=rank > 0))
        task = progress.add_task(title, total=missing)
        for question, text, stopped in answers(model, questions, skip=frozenset(lines), rank=rank, ranks=count, **loop):
            line = {"id": question.id, "prompt": question.text, "text": text, "stopped": stopped, "limit": limit}
            file.write(_line(line | {"precision": precision}))
            file.flush()
            progress.advance(task, 1 + sum(other.read().count(b"\n") for other in others))
        meet()
        progress.update(task, completed=missing)
    return from_first(partial(collected, path, questions))


def _part(path: Path, rank: int) -> Path:
    """Where a process appends its answers: the first to the file itself."""
    return path.with_name(f"{path.stem}.rank{rank}.jsonl") if rank else path


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def collected(path: Path, questions: Sequence[Question], limit: int = 0) -> dict[str, dict[str, Any]]:
    """The stored lines by id, in the order of the questions; and the file left in that order, the other processes' in it.

    So a complete file is the same, however many processes answered, in whatever batches, with whatever interruptions.

    Args:
        limit: answers that were cut off at fewer tokens are dropped, with a message.
    """
    parts = sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))
    found: dict[str, dict[str, Any]] = {}
    for part in [path, *parts]:
        found = stored(part, questions) | found
    short = {key for key, line in found.items() if not line["stopped"] and line.get("limit", UNTOLD) < limit}
    if short:
        log.warning(
            "%s: %d answers were cut off at fewer than %d tokens and are asked for again", path, len(short), limit
        )
    lines = {q.id: found[q.id] for q in questions if q.id in found and q.id not in short}
    if parts or list(found) != list(lines):
        aside = path.with_name(path.name + ".part")
        aside.write_text("".join(map(_line, lines.values())), encoding="utf-8")
        aside.replace(path)
        for part in parts:
            part.unlink()
    return lines


def set_aside(files: Sequence[Path]) -> None:
    """Move files of answers, all of one folder, into the first free of `before-1`, `before-2`, ... there: nothing is deleted."""
    whole = [some for file in files for some in (file, *file.parent.glob(f"{file.stem}.rank*.jsonl")) if some.exists()]
    if whole:
        folder = whole[0].parent
        kept = next(place for number in range(1, 10_000) if not (place := folder / f"before-{number}").exists())
        kept.mkdir()
        for file in whole:
            file.rename(kept / file.name)
        log.warning("%d files of earlier answers are kept in %s", len(whole), kept)


def stored(path: Path, questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """The lines of a file of answers by id; a last line without its end is cut off from the file, with a message.

    Raises:
        ValueError: a line is no answer, answers a question that is not asked in these words, or answers it again.
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
            known = prompts.get(line["id"]) == line["prompt"]
            if not (isinstance(line["text"], str) and isinstance(line["stopped"], bool)):
                raise TypeError("text and stopped are a text and true or false")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no stored answer ({error!r}): remove the file") from error
        if not known:
            raise ValueError(
                f"{path}, line {number} answers {line['id']!r}, which is not asked in these words here: "
                "the file belongs to other questions; remove it, or answer into another folder"
            )
        if line["id"] in lines:
            raise ValueError(
                f"{path}, line {number} answers {line['id']!r} a second time, so which answer counts cannot be known: "
                "remove that line, or the file (was it written by two runs at once?)"
            )
        lines[line["id"]] = line
    return lines


class _Rate(ProgressColumn):
    """Questions a second."""

    def render(self, task: Task) -> Text:
        took = task.finished_time or task.elapsed  # not rich's own speed: a batch's answers come at one moment
        return Text(f"{task.completed / took:.1f} a second" if took and task.completed else "")


class _Progress(Progress):
    """A bar, and where it cannot be drawn over, in a file, one every `EVERY` seconds; rich would draw there at the end alone."""

    def __init__(self, *columns: ProgressColumn, **settings: Any) -> None:
        super().__init__(*columns, **settings)
        self.told = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if not (self.disable or self.console.is_terminal) and time.monotonic() - self.told >= EVERY:
            self.console.print(self)
            self.told = time.monotonic()


def _progress(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return _Progress(*columns, disable=disable)
