"""A trained model answers the benchmarks; the scores go into its run folder, beside pages to look at."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from mvlm import build
from mvlm.benchmark.base import Benchmark, Protocol, Question, digest
from mvlm.benchmark.evaluate import answers_file, averages, evaluate, scored_again, stored
from mvlm.benchmark.ranks import ranks
from mvlm.cli import CONF, instance
from mvlm.data.corpus import Corpus
from mvlm.data.tokenizer import Tokenizer
from mvlm.model.mobilevlm import MobileVLM
from mvlm.page import CONTROLS, Shown, curve_figure, document, gallery, picture_of, score_table, spread, table
from mvlm.run import Run, beside, manifest, write_json

TITLES = {"gqa": "GQA", "sqa": "SQA-I", "textvqa": "VQA-T", "pope": "POPE", "mme": "MME-P", "mmbench": "MMB-dev"}
"""Column heads of the paper's tables."""

PLACES = ("_target_", "folder", "protocol", "any_version")
"""What a benchmark's page has beside settings of its own."""

GENERATED_LIMIT = 32
"""Tokens that an answer to a generated benchmark may have: a word, a letter, yes or no is asked for."""

PAGE_PICTURES = 24
"""Pictures on index.html, dealt evenly to the benchmarks."""

PAGE_QUESTIONS = 600
"""Questions on a page that can be filtered, dealt evenly to the benchmarks: about 10 MB if each has a picture of its own."""

LOGGED = 32
"""Predictions a benchmark in the W&B table, half of them wrong where there are so many."""


@dataclass(frozen=True)
class Item:
    """A scored question with all that was said to it."""

    benchmark: str
    question: Question
    answers: dict[str, str]
    """By view: `none`, `blind`, `shuffled`."""
    marks: dict[str, float]
    """Likewise, 0 to 1."""

    @property
    def right(self) -> bool:
        """Whether the true picture's answer has at least half a mark (TextVQA's marks are soft)."""
        return self.marks["none"] >= 0.5

    @property
    def outcome(self) -> str:
        """What the controls made of it."""
        won = [CONTROLS[view] for view, mark in self.marks.items() if view != "none" and mark >= 0.5]
        return "right with " + " and ".join(won) if won else "wrong with every control"

    def shown(self, answers: Mapping[str, tuple[str, float]], facets: Mapping[str, str]) -> Shown:
        """The question for a page."""
        title = TITLES.get(self.benchmark, self.benchmark)
        group = {"group": f"{title}: {self.question.group}"} if self.question.group else {}
        return Shown(
            title,
            asked(self.question),
            told(self.question.truth),
            dict(answers),
            self.question.image,
            {"benchmark": title, **group, **facets},
        )


def asked(question: Question) -> str:
    """A question's text without the sentence that asks for a short answer."""
    return question.text.split("\nAnswer ")[0]


def told(truth: Any) -> str:
    """A truth as a person reads it: a letter with its option, the number of a choice as its letter, answers by how often given."""
    match truth:
        case str():
            return truth
        case (str(letter), dict(options)):
            return f"{letter}. {options.get(letter, '')}"
        case (int(place), int()):
            return "ABCDEFGH"[place]
        case [*answers] if all(isinstance(answer, str) for answer in answers):
            return ", ".join(text for text, _ in Counter(answers).most_common())
    return json.dumps(truth, default=str, ensure_ascii=False)


def benchmarks(
    cfg: DictConfig, folder: Path, protocol: Protocol = "paper", any_version: bool = True
) -> list[Benchmark]:
    """The chosen benchmarks, reading their files from `folder`.

    Args:
        any_version: take other files than the published ones.

    Raises:
        ValueError: a benchmark does not know the protocol, or does not take another of its settings.
    """
    root = {"benchmark_root": str(folder), "protocol": protocol, "any_version": any_version}
    return list(instance(OmegaConf.create({"benchmark": cfg} | root).benchmark).values())


def is_generated(cfg: DictConfig, folder: str | Path | None) -> bool:
    """Whether a run's benchmark files are the pocket world's own: its corpus makes its folder, the real files' only names it."""
    return folder is None and OmegaConf.is_dict(cfg.corpus.root)


def limit(cfg: DictConfig, folder: str | Path | None) -> int | None:
    """Tokens that a run's answers may have; None: as many as the protocol says."""
    return GENERATED_LIMIT if is_generated(cfg, folder) else None


def opened(
    cfg: DictConfig,
    chosen: DictConfig,
    files: Corpus,
    *,
    folder: str | Path | None = None,
    protocol: Protocol = "paper",
    any_version: bool = False,
) -> list[Benchmark]:
    """The chosen benchmarks of a run, read once, so that what is wrong with them is told before any work.

    Args:
        folder: of the benchmark files; the corpus' own if None.
        any_version: take files of no published version. The generated ones are always taken.

    Raises:
        ValueError: a benchmark does not know the protocol; a file or a picture is missing, or a file is another one.
    """
    root = Path(folder) if folder else files.benchmarks
    found = benchmarks(chosen, root, protocol, any_version or is_generated(cfg, folder))
    for benchmark in found:
        benchmark.questions()
    return found


def run(
    run: Run,
    model: Callable[[], MobileVLM],
    files: Corpus,
    words: Tokenizer,
    chosen: DictConfig,
    controls: Sequence[str],
    *,
    folder: str | Path | None = None,
    protocol: Protocol = "paper",
    any_version: bool = False,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    precision: str = "auto",
    device: str = "auto",
    again: bool = False,
    flips: bool = False,
    wandb: WandbLogger | None = None,
) -> dict[str, Any]:
    """Answer, score, print, and write results.json, index.html and wrong.html (of protocol harness results-harness.json, ...).

    Of several processes each answers its part, and one writes. What an earlier results.json has beside (other benchmarks, other views)
    is scored again from its stored answers, so that no score is lost.

    Args:
        model: builds the model; not called if every answer is stored already.
        folder, protocol, any_version: see `opened`.
        max_new_tokens: a lower limit than the protocol's; see `limit` for None.
        again, flips: see `evaluate`.
        wandb: gets the scores and a table of predictions.
    """
    cfg = run.config
    which = {"folder": folder, "protocol": protocol, "any_version": any_version}
    found = opened(cfg, chosen, files, **which)
    # In its type once; autocast would convert the weights again for every batch.
    kind = build.device(device), build.autocast_type(build.precision(precision, device))

    @cache
    def ready() -> MobileVLM:
        return model().to(*kind)

    results = evaluate(
        ready,
        found,
        run.folder / "answers",
        controls=list(controls),
        again=again,
        flips=flips,
        max_new_tokens=max_new_tokens or limit(cfg, folder),
        batch_size=batch_size,
        features={},
        **build.asking(run.config, words, ready),
    )
    results |= {"generated": is_generated(cfg, folder), "settings": OmegaConf.to_container(chosen)}
    if ranks()[0] > 0:
        return results
    found += and_earlier(run, results, found, partial(opened, cfg, files=files, **which))
    return publish(run, results, found, folder or files.benchmarks, wandb)


def and_earlier(
    run: Run, results: dict[str, Any], found: Sequence[Benchmark], opener: Callable[..., list[Benchmark]]
) -> list[Benchmark]:
    """Add what an earlier results.json has beside (other benchmarks, other views), scored from the stored answers; what can't be is told.

    Args:
        results: of this evaluation; changed in place.
        found: its benchmarks.
        opener: `opened`, but for which.

    Returns:
        The other benchmarks.
    """
    more: list[Benchmark] = []
    try:
        before = run.results(results["protocol"])
        earlier = {name: list(views) for name, views in before.get("benchmarks", {}).items()}
    except (ValueError, AttributeError, TypeError) as error:
        Console().print(f"[yellow]the earlier results can't be read and are replaced:[/] {error}")
        return more
    for name, views in earlier.items():
        there = results["benchmarks"].get(name, {})
        if not (others := [view for view in views if view not in there]):
            continue
        try:
            settings = results["settings"].get(name) or settings_of(name, before)
            (benchmark,) = [one for one in found if one.name == name] or opener(OmegaConf.create({name: settings}))
            results["benchmarks"][name] = there | scored_again(benchmark, run.folder / "answers", others)
        except ValueError as error:
            Console().print(f"[yellow]earlier scores are left out, {name} {', '.join(others)}:[/] {error}")
            continue
        if name not in results["settings"]:
            more, results["settings"][name] = [*more, benchmark], settings
            if name in before.get("flips", {}):
                results["flips"] = results.get("flips", {}) | {name: before["flips"][name]}
    results["avg"] = averages(results["benchmarks"])
    return more


def settings_of(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's page of conf/benchmark, with those settings of its own that a results.json says it was asked with. What is made is
    the page's alone to say: a results.json may be anybody's.

    Raises:
        ValueError: there is no such page.
    """
    pages = {page.stem: page for page in (CONF / "benchmark").glob("*.yaml")}
    if name not in pages:
        raise ValueError(f"there is no conf/benchmark/{name}.yaml")
    usual = OmegaConf.to_container(OmegaConf.load(pages[name]))[name]
    told = results.get("settings", {}).get(name, {})
    own = {key: told[key] for key in usual.keys() & told.keys() - {*PLACES}}
    return usual | {k: v for k, v in own.items() if isinstance(v, type(usual[k])) and "${" not in str(v)}


def unusual(results: Mapping[str, Any]) -> list[str]:
    """What of the way that answers were asked for is not the protocol's as it stands: settings of a benchmark's own, a lower limit."""
    told = []
    for name, settings in results.get("settings", {}).items():
        try:
            usual = settings_of(name, {})
        except ValueError:  # of a benchmark that is not here
            continue
        told += [f"{name}.{k}={v}" for k, v in settings.items() if k not in PLACES and v != usual.get(k)]
    short: Counter = Counter()
    for views in results["benchmarks"].values():
        short[views["none"].get("cut_at")] += views["none"].get("short", 0)
    told += [f"{n} answers cut off at {end} tokens, below the protocol's limit" for end, n in short.items() if n]
    return told


def publish(
    run: Run, results: dict[str, Any], found: Sequence[Benchmark], folder: str | Path, wandb: WandbLogger | None = None
) -> dict[str, Any]:
    """Add what produced the scores, write them and the pages into the run folder, print and log them.

    Args:
        results: from `mvlm.benchmark.evaluate.evaluate`, the answers lying in the run folder.
        folder: of the benchmark files.
    """
    questions = {benchmark.name: fingerprint(benchmark.questions()) for benchmark in found}
    results |= {"model": run.folder.name, "corpus": str(folder), **manifest(), "questions": questions}
    facts = {stage: run.stage_facts(stage) for stage in filter(run.finished, build.STAGES)}
    results["skipped"] = {stage: told["skipped"] for stage, told in facts.items() if "skipped" in told}
    end = beside(results["protocol"])
    write_json(run.folder / f"results{end}.json", results)
    items = collect(results, found, run.folder / "answers")
    for name, page in (("index", page_of), ("wrong", wrong_page)):
        (run.folder / f"{name}{end}.html").write_text(page(run, results, items), encoding="utf-8")
    show(results, run)
    log(results, items, wandb)
    return results


def fingerprint(questions: Sequence[Question]) -> dict[str, Any]:
    """What tells whether two runs answered the same questions, and which of these share a picture.

    Returns:
        {"sha256": of ids, prompts, truths and the pictures' contents, "pictures": {question id: number of its picture}}
    """
    whole, number = sha256(), {}
    content = {picture: digest(picture) for picture in {q.image for q in questions}}
    for q in questions:
        number.setdefault(content[q.image], len(number))
        whole.update(json.dumps([q.id, q.text, q.truth, content[q.image]], default=str).encode())
    return {"sha256": whole.hexdigest(), "pictures": {q.id: number[content[q.image]] for q in questions}}


def collect(results: Mapping[str, Any], found: Sequence[Benchmark], folder: Path) -> dict[str, list[Item]]:
    """By benchmark, its marked questions with the answers of every view as they are stored in `folder`.

    MMBench marks whole circles of rotations: of each, the unrotated question stands here.
    """
    items = {}
    for benchmark in found:
        views = results["benchmarks"][benchmark.name]
        questions = benchmark.questions()
        lines = {view: stored(answers_file(folder, benchmark, view), questions) for view in views}
        items[benchmark.name] = [
            Item(
                benchmark.name,
                q,
                {view: lines[view][q.id]["text"] for view in views},
                {view: score["per_question"][q.id] for view, score in views.items()},
            )
            for q in questions
            if q.id in views["none"]["per_question"]
        ]
    return items


def rows(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The table's cells as text: each benchmark's score and half-width of its interval by view, and `items`; then Avg."""
    table = {}
    for name, views in results["benchmarks"].items():
        table[TITLES.get(name, name) + (" / 20" if name == "mme" else "")] = {
            view: f"{s['value']:.1f}"
            + (f" ± {(s['interval'][1] - s['interval'][0]) / 2:.1f}" if view == "none" else "")
            for view, s in views.items()
        } | {"items": counted(views["none"], results["generated"])}
    if results["avg"]["none"] is not None:
        table["Avg"] = {view: f"{value:.1f}" for view, value in results["avg"].items() if value is not None}
    return table


def show(results: dict[str, Any], run: Run) -> None:
    """The scores as a table in the terminal."""
    printed = Table(title=about(run, results), title_justify="left")
    views = list(results["avg"])
    printed.add_column("benchmark")
    for view in (*views, "items"):
        printed.add_column(CONTROLS.get(view, "questions"), justify="right")
    for name, cells in rows(results).items():
        printed.add_row(name, *(cells.get(column, "") for column in (*views, "items")))
    Console().print(printed)
    if blind := blindness(results):
        Console().print(f"[yellow]{blind}[/]")
    if flips := results.get("flips"):
        flipped, items = (sum(told[key] for told in flips.values()) for key in ("flipped", "items"))
        Console().print(f"answered one at a time, {flipped} of {items} answers come out otherwise")
    index, wrong = (run.folder / f"{name}{beside(results['protocol'])}.html" for name in ("index", "wrong"))
    Console().print(f"look at {index} and {wrong}", soft_wrap=True)


def blindness(results: Mapping[str, Any]) -> str | None:
    """What is said of a model whose Avg a control comes near to; None where none does, or there is no Avg."""
    true, *others = results["avg"].values()
    if any(None not in (true, other) and true - other < 5 for other in others):
        return "The true picture gains it less than 5 points: this model has not learned to see."
    return None


def counted(score: dict[str, Any], generated: bool) -> str:
    """How many questions, and whether they are a published set: 12,578 (testdev-balanced), 40 (no published version)."""
    origin = score["official"] or "no published version"
    return f"{score['items']:,}" if generated else f"{score['items']:,} ({origin})"


def log(results: Mapping[str, Any], items: Mapping[str, Sequence[Item]], wandb: WandbLogger | None) -> None:
    """The scores as a W&B summary (`scores/gqa/none`, ..., `scores/avg/blind`; of the harness `scores-harness/...`), and a
    table `predictions`.

    The table holds up to LOGGED questions a benchmark, wrong and right ones, each with its picture and the answers and marks
    of every view; how many of how many is in the summary (`predictions/gqa/shown`, `predictions/gqa/of`).
    """
    if wandb is None:
        return
    import wandb as library

    end = beside(results["protocol"])
    summary = {f"scores{end}/avg/{view}": value for view, value in results["avg"].items()}
    views = list(results["avg"])
    columns = ["benchmark", "id", "group", "picture", "question", "truth"]
    columns += [f"{kind}, {CONTROLS[view]}" for view in views for kind in ("answer", "mark")]
    rows, pictures = [], {}
    for name, scores in results["benchmarks"].items():
        wrong, right = ([item for item in items[name] if item.right == so] for so in (False, True))
        half = max(LOGGED // 2, LOGGED - len(right))
        chosen = spread(wrong, half)
        chosen += spread(right, LOGGED - len(chosen))
        for item in chosen:
            q = item.question
            if q.image is not None and q.image not in pictures:
                pictures[q.image] = library.Image(picture_of(q.image))
            said = [cell for view in views for cell in (item.answers.get(view), item.marks.get(view))]
            rows.append([TITLES.get(name, name), q.id, q.group, pictures.get(q.image), asked(q), told(q.truth), *said])
        summary |= {f"scores{end}/{name}/{view}": score["value"] for view, score in scores.items()}
        summary |= {f"predictions{end}/{name}/shown": len(chosen), f"predictions{end}/{name}/of": len(items[name])}
    # The table's pictures wait in a data folder to be sent: in the run folder's, not the user's.
    os.environ["WANDB_DATA_DIR"] = str(Path(wandb.save_dir).resolve() / "wandb")
    wandb.experiment.log({f"predictions{end}": library.Table(columns=columns, data=rows)})
    wandb.experiment.summary.update(summary)


def about(run: Run, results: dict[str, Any]) -> str:
    """What produced the figures: they are never to be read without it."""
    corpus = "generated pocket benchmarks" if results["generated"] else "benchmark files of " + results["corpus"]
    other = [TITLES.get(name, name) for name, views in results["benchmarks"].items() if not views["none"]["official"]]
    if other and not results["generated"]:
        corpus += f" ({', '.join(other)} of no published version)"
    ways = "".join(f", {way}" for way in unusual(results))
    return f"{run.folder.name}, protocol {results['protocol']}{ways}, {corpus}, 95% intervals over pictures"


def page_of(run: Run, results: dict[str, Any], items: Mapping[str, Sequence[Item]]) -> str:
    """index.html: scores, curve, and the first pictures with up to three questions each."""
    history = {stage: run.stage_facts(stage).get("history", []) for stage in build.STAGES if run.finished(stage)}
    shown: list[Shown] = []
    for some in items.values():
        seen: Counter = Counter()
        for item in some:
            image = item.question.image
            if image is None or (image not in seen and len(seen) >= max(1, PAGE_PICTURES // len(items))):
                continue
            seen[image] += 1
            if seen[image] <= 3:
                shown.append(item.shown({"": (item.answers["none"], item.marks["none"])}, {}))
    note = (
        about(run, results)
        + ". The controls ask the same questions with no picture and with another question's picture: "
        "what a model gains over them is what it sees."
    )
    scores = f'<div class="top">{score_table(rows(results))}{curve_figure(history)}</div>'
    total = sum(map(len, items.values()))
    heading = f"{len(shown)} of {total} questions, with their answers"
    end = beside(results["protocol"])
    links = f'<p><a href="wrong{end}.html">The wrong answers, to be filtered</a></p>'
    return document(run.folder.name, note, {"Scores": scores, heading: links + gallery(shown)})


def wrong_page(run: Run, results: dict[str, Any], items: Mapping[str, Sequence[Item]]) -> str:
    """wrong.html: what was answered wrongly, with the controls' answers; how many are shown of how many stands above."""
    share = PAGE_QUESTIONS // len(items)
    controls = list(results["avg"])[1:]
    shown, counts = [], []
    for name, some in items.items():
        wrong = [item for item in some if not item.right]
        chosen = spread(wrong, share)
        won = [sum(item.marks.get(view, 0) >= 0.5 for item in wrong) for view in controls]
        neither = sum(item.outcome == "wrong with every control" for item in wrong)
        counts.append(
            [TITLES.get(name, name), len(some), len(wrong), len(chosen), *won, *([neither] if controls else [])]
        )
        for item in chosen:
            said = {CONTROLS[view]: (item.answers[view], item.marks[view]) for view in item.marks}
            shown.append(item.shown(said, {"controls": item.outcome} if controls else {}))
    counts.append(["all", *map(sum, zip(*(row[1:] for row in counts), strict=True))])
    head = ["", "questions", "wrong", "shown here", *(f"right with {CONTROLS[view]}" for view in controls)]
    head += ["wrong with every control"] if controls else []
    note = (
        f"{about(run, results)}. Wrong is a mark below 0.5. At most {share} a benchmark are shown, evenly spread over its wrong "
        "answers; answers/ holds all."
    )
    end = beside(results["protocol"])
    links = f'<p><a href="index{end}.html">Scores</a></p>'
    title = f"{run.folder.name}: wrong answers"
    return document(title, note, {"Counts": links + table(head, counts), "Wrong answers": gallery(shown, filters=True)})
