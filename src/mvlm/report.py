"""Two runs on the same questions: how far apart their scores are, how sure that is, and which questions flipped.

Two models that answer the same questions are far better compared question by question than by whether their intervals
overlap: what makes a question hard is the same for both, and drops out of the difference. And the questions of one picture
are no independent witnesses, so pictures are what is drawn and exchanged here, as for the scores' own intervals.

The interval is a paired bootstrap: pictures drawn again, the same for both runs, the benchmark's own score function applied
to both (Koehn, Statistical significance tests for machine translation evaluation, EMNLP 2004; whole clusters: Field and
Welsh, Bootstrapping clustered data, JRSS B 69, 2007). So it holds for F1 and points as for means.

The test is a paired randomization: if the runs were alike, it would not matter whose answers to a picture are whose, so they
are exchanged picture by picture at random, and p is how often the difference gets as large as it is (Noreen,
Computer-Intensive Methods for Testing Hypotheses, 1989; with one added above and below, so that p is never 0: Phipson and
Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010). Where a score is the mean of marks 0 or 1 and each picture has one question,
exchanging is tossing a coin for each question that flipped, and its p is known exactly: McNemar's test (Psychometrika 12,
1947), binomial. With several questions a picture McNemar's would promise too much, and is not used.

None of it covers the training's seed: two seeds of one recipe may differ by more than all of this.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mvlm.benchmark.base import Benchmark, Protocol, Question, Sums, drawn_again, percent
from mvlm.benchmark.evaluate import AVERAGED, answers_file, stored
from mvlm.page import CONTROLS, Shown, document, gallery, spread, table
from mvlm.run import beside, commit_told, write_json
from mvlm.score import PAGE_QUESTIONS, PLACES, TITLES, Item, benchmarks, fingerprint, settings_of

DRAWS = 10_000
"""Of the bootstrap and of the randomization: a p of 0.05 is known to 0.002."""

CLOSE = 1e-6
"""Points by which the same score may differ when it is computed again; also how equal two differences must be to tie."""

FELL, ROSE = "right → wrong", "wrong → right"


def mcnemar(fell: int, rose: int) -> float:
    """Exact two-sided p of McNemar's test: of so many flips so few (or fewer) go one way, were it a fair coin's doing."""
    flips = fell + rose
    return min(1.0, 2 * sum(comb(flips, k) for k in range(min(fell, rose) + 1)) / 2**flips)


def exchanged(a: Sums, b: Sums, draw: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Differences b - a, (draws,), with the runs' answers exchanged picture by picture, each picture's with probability 1/2."""
    moved = (b.by_picture - a.by_picture)[(a.by_picture != b.by_picture).any(1)]
    moves = np.stack([draw.integers(2, size=len(moved)) @ moved for _ in range(draws)])
    return b.value(b.by_picture.sum(0) - moves) - a.value(a.by_picture.sum(0) + moves)


def bootstrapped(a: Sums, b: Sums, draw: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Differences b - a, (draws,), on pictures drawn again, the same for both."""
    width = a.by_picture.shape[1]
    totals = drawn_again(np.hstack([a.by_picture, b.by_picture]), draw, draws)
    return b.value(totals[:, width:]) - a.value(totals[:, :width])


def p_value(difference: float, null: np.ndarray) -> float:
    """Two-sided p of a difference among those that exchanging gives."""
    return (1 + int((np.abs(null) >= abs(difference) - CLOSE).sum())) / (1 + len(null))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for how many there are (Holm, Scand. J. Statist. 6, 1979); holds however they depend on one another."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        adjusted[name] = least = max(least, min(1.0, (len(ps) - rank) * ps[name]))
    return adjusted


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    path: Path
    """Of its results.json."""
    results: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, protocol: Protocol | None = None) -> Side:
        """From a run folder or a results.json.

        Args:
            protocol: whose scores; in a folder the paper's, of a file what it has, if None.

        Raises:
            ValueError: there are no results, the file is no results.json, or its protocol is another.
        """
        path = Path(path)
        file = path / f"results{beside(protocol or 'paper')}.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: score the run with python evaluate.py run={path}, or name another one"
            )
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            _ = [views["none"]["per_question"] for views in results["benchmarks"].values()], results["protocol"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no results.json as evaluate.py writes it ({error!r})") from error
        if protocol not in (None, results["protocol"]):
            raise ValueError(
                f"{file} has scores of protocol={results['protocol']}, and protocol={protocol} is asked for"
            )
        return cls(file, results)

    def about(self) -> str:
        """What produced its figures."""
        facts = {
            "model": self.results.get("model"),
            "protocol": self.results["protocol"],
            "commit": commit_told(self.results.get("commit")),
            "benchmark files": self.results.get("corpus"),
        }
        told = ", ".join(f"{name} {fact}" if fact else f"{name} not recorded" for name, fact in facts.items())
        return f"{self.path} ({told})"

    def score(
        self, benchmark: Benchmark, questions: Sequence[Question], sha256: str, view: str
    ) -> tuple[Sums, dict[str, str]]:
        """The sums behind a score, and the answers by question id, from the answers stored beside results.json.

        Args:
            questions: the benchmark's, read once for all sides.
            sha256: their hash, see `mvlm.score.fingerprint`.

        Raises:
            ValueError: they are not there or not whole, answer other questions, or give another score than results.json has.
        """
        file = answers_file(self.path.parent / "answers", benchmark, view)
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if self.results.get("questions", {}).get(benchmark.name, {}).get("sha256", sha256) != sha256:
            raise ValueError(
                "the benchmark's files hold other questions than were answered: name their folder, benchmark_root=..."
            )
        told = {key: line["text"] for key, line in stored(file, questions).items()}
        score = benchmark.score(told, questions)
        recorded = self.results["benchmarks"][benchmark.name][view]["value"]
        if abs(score.value - recorded) > CLOSE:
            raise ValueError(f"{file} gives {score.value:.2f} where results.json has {recorded:.2f}: evaluate again")
        if score.sums is None:
            raise ValueError("the benchmark does not say what its score is made of (Score.sums)")
        return score.sums, told


def unlike(a: Side, b: Side, name: str, view: str) -> str:
    """Why a benchmark cannot be compared, or nothing."""
    scores = []
    for letter, side in (("A", a), ("B", b)):
        if name not in side.results["benchmarks"]:
            return f"{letter} has no score of it"
        if view not in side.results["benchmarks"][name]:
            return f"{letter} has no answers of the view {view!r} ({CONTROLS.get(view, 'unknown')})"
        scores.append(side.results["benchmarks"][name][view])
    protocols = [score.get("protocol", side.results["protocol"]) for score, side in zip(scores, (a, b), strict=True)]
    if protocols[0] != protocols[1]:
        return f"protocol {protocols[0]} in A, {protocols[1]} in B"
    ways = [side.results.get("settings", {}).get(name, {}) for side in (a, b)]
    keys = sorted((ways[0].keys() & ways[1].keys()) - {*PLACES})
    if others := [f"{key}={ways[0][key]} in A, {ways[1][key]} in B" for key in keys if ways[0][key] != ways[1][key]]:
        return f"asked in other ways: {', '.join(others)}"
    for letter, one, two in (("A", *scores), ("B", *scores[::-1])):
        if (end := one.get("cut_at")) and end < two.get("limit", end):
            return f"answers of {letter} were cut off at {end} tokens, and the other's might have {two['limit']} (evaluate {letter} again)"
    ids = [set(score["per_question"]) for score in scores]
    if ids[0] != ids[1]:
        return f"other questions: {len(ids[0])} in A, {len(ids[1])} in B, {len(ids[0] & ids[1])} in both"
    hashes = [side.results.get("questions", {}).get(name, {}).get("sha256") for side in (a, b)]
    corpora = [side.results.get("corpus") for side in (a, b)]
    if all(hashes):
        return "" if hashes[0] == hashes[1] else "the same ids, but other prompts, truths or pictures"
    if corpora[0] != corpora[1]:
        return (
            f"not sure to be the same questions: no hash of them is recorded, and A has {corpora[0]}, B {corpora[1]} "
            "(evaluate both again)"
        )
    return ""


def is_mean(score: Mapping[str, Any]) -> bool:
    """Whether a score is the mean of its marks: POPE's F1 and MME's points are not."""
    return abs(100 * np.mean(list(score["per_question"].values())) - score["value"]) < CLOSE


def sums_of_marks(sides: Sequence[Side], name: str, view: str) -> list[Sums]:
    """From results.json alone, which suffices for a score that is the mean of its marks; pictures in the first side's order.

    Raises:
        ValueError: it is not, or which questions share a picture is not recorded.
    """
    scores = [side.results["benchmarks"][name][view] for side in sides]
    pictures = sides[0].results.get("questions", {}).get(name, {}).get("pictures")
    if not all(map(is_mean, scores)):
        raise ValueError("the score is no mean of marks")
    if pictures is None:
        raise ValueError("which questions share a picture is not recorded: evaluate again")
    keys = list(scores[0]["per_question"])
    rows = [pictures.get(key, key) for key in keys]
    return [Sums.of([(score["per_question"][k], 1) for k in keys], rows, percent) for score in scores]


def from_marks(sides: Sequence[Side], name: str, view: str, error: Exception) -> tuple[list[Sums], str]:
    """`sums_of_marks` where the answers could not be read, for the reason given, or nothing; and a note that says so."""
    note = f"from the marks in results.json alone ({error})"
    try:
        return sums_of_marks(sides, name, view), note
    except ValueError as error:
        return [], f"{note}, and without interval and test ({error})"


def together(sums: Sequence[Sums]) -> Sums:
    """The mean of several runs' scores on the same questions, as one score: a picture is drawn, or exchanged, for all of them."""
    if len(sums) == 1:
        return sums[0]
    ends = np.cumsum([one.by_picture.shape[1] for one in sums])[:-1]

    def value(totals: np.ndarray) -> np.ndarray:
        return np.mean([one.value(part) for one, part in zip(sums, np.split(totals, ends, 1), strict=True)], axis=0)

    return Sums(np.hstack([one.by_picture for one in sums]), value)


def flipped(a: Side, b: Side, made: Benchmark, view: str) -> tuple[Sums, Sums, list[Item]]:
    """From the stored answers: the sums behind both scores, and the questions whose marks differ, answers by `A` and `B`.

    Raises:
        ValueError: answers or benchmark files are not there, or are others than those scored.
    """
    questions = made.questions()
    sha256 = fingerprint(questions)["sha256"]
    (one, said), (two, said_b) = (side.score(made, questions, sha256, view) for side in (a, b))
    marks, marks_b = (side.results["benchmarks"][made.name][view]["per_question"] for side in (a, b))
    return one, two, [
        Item(made.name, q, {"A": said[q.id], "B": said_b[q.id]}, {"A": marks[q.id], "B": marks_b[q.id]})
        for q in questions
        if q.id in marks and marks[q.id] != marks_b[q.id]
    ]  # fmt: skip


def compare(a: Side, b: Side, view: str = "none", root: str | Path | None = None) -> tuple[dict[str, Any], list[Shown]]:
    """Every benchmark that both have answered alike.

    Args:
        view: `none` compares the answers to the true pictures, `blind` or `shuffled` those of a control.
        root: folder of the benchmark files; where A's or B's results.json says they are if None.

    Returns:
        The report in plain types, differences being B - A; and the flipped questions, for the page: at most PAGE_QUESTIONS,
        dealt evenly to the benchmarks, none of a benchmark whose answers or files are not there.

    Raises:
        ValueError: nothing can be compared; says why, benchmark by benchmark.
    """
    names = list(dict.fromkeys([*a.results["benchmarks"], *b.results["benchmarks"]]))
    skipped = {name: why for name in names if (why := unlike(a, b, name, view))}
    names = [name for name in names if name not in skipped]
    if not names:
        reasons = "\n".join(f"  {name}: {why}" for name, why in skipped.items())
        raise ValueError(f"{a.path} and {b.path} have no benchmark that can be compared:\n{reasons}")
    said = [side.results.get("corpus", "") for side in (a, b)]
    root = root or next((folder for folder in said if Path(folder).is_dir()), said[0])
    found: dict[str, dict[str, Any]] = {}
    shown: list[Shown] = []
    sums: dict[str, Sequence[Sums]] = {}
    for name in names:
        one, two = (side.results["benchmarks"][name][view] for side in (a, b))
        entry = found[name] = both(one, two)
        try:
            made = benchmark(name, root, a)
            *sums[name], items = flipped(a, b, made, view)
            shown += [flip(item) for item in spread(items, PAGE_QUESTIONS // len(names))]
        except (ValueError, OSError) as error:
            sums[name], entry["note"] = from_marks([a, b], name, view, error)
    avg = judge(found, sums)
    tested = {name: entry for name, entry in {**found, "avg": avg or {}}.items() if "p" in entry}
    for name, p in holm({name: entry["p"] for name, entry in tested.items()}).items():
        tested[name]["p_holm"] = p
    about = {"a": a.about(), "b": b.about(), "view": view, "tests": len(tested), "draws": DRAWS}
    return about | {"benchmarks": found, "avg": avg, "not_compared": skipped}, shown


def judge(
    found: Mapping[str, dict[str, Any]], sums: Mapping[str, Sequence[Sums]], draws: int = DRAWS
) -> dict[str, Any] | None:
    """Add interval and test to the differences of the benchmarks whose sums are known, and make the average's.

    Args:
        found: by benchmark `a`, `b`, `difference`.
        sums: by benchmark, of `a` and of `b`; empty where they are not known.

    Returns:
        The average's entry, or None without all six.
    """
    apart: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (a, b) in ((name, some) for name, some in sums.items() if some):
        draw = np.random.default_rng(list(name.encode()))  # its own, whatever else is compared
        apart[name] = bootstrapped(a, b, draw, draws), exchanged(a, b, draw, draws)
        found[name] |= {"pictures": len(a.by_picture), **told_apart(found[name]["difference"], *apart[name])}
        if coins(a) and coins(b):
            fell, rose = ((np.sign(b.by_picture - a.by_picture)[:, 0] == way).sum() for way in (-1, 1))
            found[name] |= {"p": mcnemar(int(fell), int(rose)), "test": "McNemar"}
    if not set(AVERAGED) <= set(apart):
        return None
    avg = {key: sum(found[name][key] for name in AVERAGED) / len(AVERAGED) for key in ("a", "b", "difference")}
    again, null = (np.mean([apart[name][kind] for name in AVERAGED], axis=0) for kind in (0, 1))
    return avg | told_apart(avg["difference"], again, null)


def coins(sums: Sums) -> bool:
    """Whether a score is the mean of marks 0 or 1, one a picture, so that exchanging is tossing coins."""
    return (
        sums.value is percent and set(np.unique(sums.by_picture[:, 0])) <= {0, 1} and (sums.by_picture[:, 1] == 1).all()
    )


def both(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """Two scores of the same questions beside one another, and the ids of the questions whose marks fell and rose."""
    pairs = {key: (mark, two["per_question"][key]) for key, mark in one["per_question"].items()}
    return {
        "a": one["value"],
        "b": two["value"],
        "a_interval": one["interval"],
        "b_interval": two["interval"],
        "difference": two["value"] - one["value"],
        "questions": len(pairs),
        "fell": [key for key, (before, after) in pairs.items() if after < before],
        "rose": [key for key, (before, after) in pairs.items() if after > before],
    }


def flip(item: Item) -> Shown:
    """A flipped question for the page."""
    said = {side: (item.answers[side], item.marks[side]) for side in "AB"}
    return item.shown(said, {"direction": FELL if item.marks["B"] < item.marks["A"] else ROSE})


def told_apart(difference: float, again: np.ndarray, null: np.ndarray) -> dict[str, Any]:
    """Interval and test of a difference, from its bootstrap and its randomization."""
    low, high = np.quantile(again, [0.025, 0.975])
    return {"interval": [float(low), float(high)], "p": p_value(difference, null), "test": "swap"}


def benchmark(name: str, root: str | Path, side: Side) -> Benchmark:
    """A benchmark as a run was asked it.

    Raises:
        ValueError: it has no page in conf/benchmark, or there is no folder of benchmark files.
    """
    if not Path(root).is_dir():
        raise ValueError(f"no folder {root} of benchmark files is here: name it, benchmark_root=...")
    page = OmegaConf.create({name: settings_of(name, side.results)})
    (made,) = benchmarks(page, Path(root), side.results["protocol"])
    return made


def caption(report: Mapping[str, Any]) -> list[str]:
    """What must be read with the table."""
    lines = [f"A: {report['a']}", f"B: {report['b']}"]
    if report["view"] != "none":
        lines.append(f"These are the answers with {CONTROLS[report['view']]}.")
    lines += [
        f"B - A in points (MME: points / 20), with the 95 % interval of a paired bootstrap over pictures ({report['draws']:,} draws).",
        f"p is two-sided. Swap: the runs' answers exchanged picture by picture at random ({report['draws']:,} draws). McNemar: "
        "exact, where each picture has one question that is right or wrong.",
        f"{report['tests']} tests were made; Holm's p (under p) allows for that. Training seeds are in none of it: two seeds differ, too.",
        f"Fell ({FELL}) and rose ({ROSE}): questions whose mark did, by however little where marks are soft (TextVQA).",
    ]
    said = {name: entry["note"] for name, entry in report["benchmarks"].items() if "note" in entry}
    said |= {name: f"not compared, {why}" for name, why in report["not_compared"].items()}
    together: dict[str, list[str]] = {}
    for name, note in said.items():
        together.setdefault(note, []).append(TITLES.get(name, name))
    return lines + [f"{', '.join(titles)}: {note}." for note, titles in together.items()]


def cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table, as text of up to two lines a cell."""
    head = ["", "A", "B", "B - A", "p\nHolm", "test", "fell\nrose", "asked\npictures"]
    rows = []
    for name, entry in [*report["benchmarks"].items(), *([("Avg", report["avg"])] if report["avg"] else [])]:
        row = [TITLES.get(name, name), *(f"{entry[s]:.1f}{_between(entry.get(f'{s}_interval'))}" for s in "ab")]
        row.append(f"{entry['difference']:+.1f}{_between(entry.get('interval'))}")
        row += [f"{entry['p']:.4f}\n{entry['p_holm']:.4f}", entry["test"]] if "p" in entry else ["-", "-"]
        row.append("\n".join(str(len(entry[kind])) for kind in ("fell", "rose") if kind in entry))
        row.append(f"{entry['questions']:,}" if "questions" in entry else "")
        row[-1] += f"\n{entry['pictures']:,}" if "pictures" in entry else ""
        rows.append(row)
    return head, rows


def _between(ends: Sequence[float] | None) -> str:
    return f"\n[{ends[0]:.1f}, {ends[1]:.1f}]" if ends else ""


def save(report: Mapping[str, Any], shown: Sequence[Shown], folder: str | Path) -> Path:
    """report.json, report.md and index.html into a folder; returns the page."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    head, rows = cells(report)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    text = "\n".join("| " + " | ".join(line).replace("\n", " ") + " |" for line in lines)
    (folder / "report.md").write_text(
        f"# A against B\n\n{text}\n\n" + "\n\n".join(caption(report)) + "\n", encoding="utf-8"
    )
    total = sum(len(entry["fell"]) + len(entry["rose"]) for entry in report["benchmarks"].values())
    under = "".join(f"<p>{html.escape(line)}</p>" for line in caption(report))
    heading = f"{len(shown)} of {total} flipped questions"
    rest = "" if len(shown) == total else "<p>Evenly spread over a benchmark's; the ids of all are in report.json.</p>"
    sections = {"Scores": table(head, rows) + under, heading: rest + gallery(shown, filters=True)}
    page = folder / "index.html"
    page.write_text(document("A against B", "Two runs on the same questions.", sections), encoding="utf-8")
    return page


def show(report: Mapping[str, Any]) -> None:
    """The table and its caption in the terminal."""
    head, rows = cells(report)
    printed = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, name in enumerate(head):
        printed.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        printed.add_row(*row)
    console = Console()
    console.print(printed)
    for line in caption(report):
        console.print(line, highlight=False, markup=False)
