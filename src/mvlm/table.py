"""A sweep's table beside the paper's: each row's scores over its seeds, and whether a row differs from the one above it.

Nothing is remembered between calls: the rows are composed as the sweep composes them, and their run folders are found by name.

What an interval is depends on how many seeds a row has. Of two or more it is Student's t over the seeds: how far trainings differ, on
these questions. Of one it is the score's own, over pictures: how far the choice of questions matters, to this training. It says nothing
of the training's noise, and such a row is marked.

Neighbouring rows are compared as `mvlm.report` compares two runs, seed by seed: the score of several seeds is their mean, and a picture
is drawn, or exchanged, for all of them at once. Holm's adjustment is over all tests of the table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import numpy as np
import torch
from hydra import initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mvlm.benchmark.base import Benchmark, Protocol, Question, Sums, drawn_again
from mvlm.benchmark.evaluate import AVERAGED, average
from mvlm.build import STAGES
from mvlm.cli import CONF, ROOT, check_overrides
from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import count_parts, meta_model
from mvlm.report import DRAWS, Side, benchmark, from_marks, holm, judge, together, unlike
from mvlm.run import Run, beside, of_machine
from mvlm.score import counted, fingerprint, settings_of, unusual
from mvlm.sweep import OWN_KEYS, Cell, Sweep, outcome, refuse_one_folder
from mvlm.trust import read_json

PUBLISHED = ROOT / "results" / "published.yaml"

PAPER_MODEL = "1.7b"
"""Of Tables 6 and 7; Table 4's rows name their own."""

LEVEL = 0.05
"""Below it, after Holm's adjustment, a difference is called significant."""


# -- which runs


def published(swept: Sweep) -> dict[str, dict[str, Any]]:
    """What the paper prints, by the table's rows; empty for a table that the paper has not.

    Raises:
        ValueError: `published` names no table of results/published.yaml.
    """
    if swept.published is None:
        return {}
    printed = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    if swept.published not in printed:
        raise ValueError(f"sweeps/{swept.name}.yaml: published is {', '.join(printed)} or null, not {swept.published}")
    known = {str(row.get("row", row.get("method"))): row for row in printed[swept.published]}
    return {name: known[name] for name in swept.rows if name in known}


def find(swept: Sweep, words: Sequence[str], runs: Path, seeds: int | None) -> dict[str, dict[int, Cell]]:
    """A table's cells, row -> seed -> cell, composed as the sweep composes them.

    Args:
        words: what the command line adds to each row.
        runs: where the run folders are.
        seeds: 0, 1, ... so many; None takes those of which any row has a run folder.

    Raises:
        ValueError: a word that no row may be given, or no cell is there at all.
    """
    said = {word.lstrip("+~").split("=")[0] for word in words}
    if wrong := said & {"cell", "runs", "seed", *OWN_KEYS}:
        raise ValueError(
            f"{', '.join(sorted(wrong))}: not in overrides=; the table says which cells it has, seeds=N how many of each"
        )
    for row, sets in swept.rows.items():
        if both := said & set(sets):
            raise ValueError(f"{', '.join(sorted(both))}: the row {swept.name} {row} sets that itself; leave it out")
    check_overrides("train", list(words))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        first = {row: Cell.composed([*swept.overrides(row), *words, "seed=0"]) for row in swept.rows}
        first = {row: replace(cell, run=Run(runs / cell.name)) for row, cell in first.items()}
        known: dict[str, Cell] = {}
        for cell in first.values():
            refuse_one_folder(known.setdefault(cell.name, cell), cell)
        there = set().union(*map(seeds_of, first.values()))
        if not there:
            told = " ".join(
                ["-m", f"sweeps={swept.name}", *(word for word in words if not word.startswith("protocol="))]
            )
            raise ValueError(
                f"{runs} has no run of {swept.name} (such as {next(iter(first.values())).name}): train it, python train.py {told}, "
                "or name the folder of its runs, runs=..., and what they were trained with, model=... overrides=[...]"
            )
        numbers = range(seeds) if seeds else sorted(there)
        return {row: {n: with_seed(cell, n) for n in numbers} for row, cell in first.items()}


def with_seed(cell: Cell, seed: int) -> Cell:
    """The same cell of another seed, as it would be composed: names differ in `-s<seed>` alone, for the hash leaves the seed out."""
    head, tail = named(cell)
    cfg = OmegaConf.merge(cell.cfg, {"seed": seed})
    words = [word for word in cell.overrides if not word.startswith("seed=")]
    run = Run(cell.run.folder.parent / f"{head}{seed}{tail}")
    return replace(cell, overrides=(*words, f"seed={seed}"), cfg=cfg, run=run)


def seeds_of(cell: Cell) -> set[int]:
    """The seeds of which the cell has a run folder."""
    head, tail = map(re.escape, named(cell))
    folders = cell.run.folder.parent.iterdir() if cell.run.folder.parent.is_dir() else ()
    return {int(found[1]) for f in folders if (found := re.fullmatch(rf"{head}(\d+){tail}", f.name)) and f.is_dir()}


def named(cell: Cell) -> tuple[str, str]:
    """A cell's name before and behind its seed."""
    return re.fullmatch(r"(.*-s)\d+((?:-[0-9a-f]{6})?)", cell.name).groups()


def trained(run: Run) -> dict[str, dict[str, Any]]:
    """What stage.json says, of each stage that is trained."""
    return {s: read_json(run.folder / s / "stage.json") for s in STAGES if run.finished(s)}


def histories(report: Mapping[str, Any]) -> dict[str, list[dict[str, list[dict[str, float]]]]]:
    """For `mvlm.plot.curves`: row -> its runs, each {stage: history}; read from the run folders."""
    return {
        row["row"]: [{s: told["history"] for s, told in trained(Run(cell["folder"])).items()} for cell in row["cells"]]
        for row in report["rows"]
    }


# -- what they say


def student_t(freedom: int, share: float = 0.95) -> float:
    """The t that so large a share of Student's distribution lies within, on both sides of zero.

    By bisection of the finite sums that the distribution is for whole degrees of freedom (Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.3 and 26.7.4), with theta = atan(t / sqrt(freedom)).
    """

    def within(theta: float) -> float:
        term, total = (math.cos(theta), 0.0) if freedom % 2 else (1.0, 0.0)
        for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
            total += term
            term *= (k - 1) / k * math.cos(theta) ** 2
        return 2 / math.pi * (theta + math.sin(theta) * total) if freedom % 2 else math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def over_seeds(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean over seeds by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return [fmean(values) - half, fmean(values) + half]


class Answers:
    """The sums behind the scores of several runs, from their stored answers; a benchmark's files are read once.

    Args:
        folder: of the benchmark files; where one of the runs found them if None.
    """

    def __init__(self, sides: Sequence[Side], folder: str | Path | None) -> None:
        said = [side.results.get("corpus", "") for side in sides]
        self.folder = folder or next((corpus for corpus in said if Path(corpus).is_dir()), next(iter(said), ""))
        self._asked: dict[tuple[str, str], tuple[Benchmark, list[Question], str]] = {}
        self._sums: dict[tuple[Path, str], Sums] = {}

    def sums(self, side: Side, name: str) -> Sums:
        """Of one run's score with the true pictures.

        Raises:
            ValueError, OSError: answers or files are not there, or are others than those scored.
        """
        key = name, json.dumps(settings_of(name, side.results), sort_keys=True)
        if key not in self._asked:
            made = benchmark(name, self.folder, side)
            questions = made.questions()
            self._asked[key] = made, questions, fingerprint(questions)["sha256"]
        if (side.path, name) not in self._sums:
            self._sums[side.path, name] = side.score(*self._asked[key], "none")[0]
        return self._sums[side.path, name]

    def interval(self, side: Side, draws: int) -> list[float]:
        """95 % interval of a run's Avg: pictures drawn again, of each benchmark its own. Raises as `sums`."""
        again = []
        for name in AVERAGED:
            sums = self.sums(side, name)
            again.append(sums.value(drawn_again(sums.by_picture, np.random.default_rng(list(name.encode())), draws)))
        return np.quantile(np.mean(again, axis=0), [0.025, 0.975]).tolist()


def sizes(cfg: DictConfig, known: dict[str, MobileVLM]) -> dict[str, int]:
    """Tokens of a picture and parameters of the projector; no weight is made.

    Args:
        known: keeps what is slow to build, tower and language model, for rows that share them.
    """
    module = OmegaConf.to_container(cfg.model.module, resolve=True)
    projector = instantiate(module.pop("projector"))
    key = json.dumps(module, sort_keys=True)
    if key not in known:
        known[key] = meta_model(cfg.model.module)
    with torch.device("meta"):
        net = MobileVLM(known[key].vision, projector, known[key].language)
    return {"image_tokens": net.image_tokens, "projector_parameters": count_parts(net)["projector"]}


def average_of(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], view: str = "none") -> float | None:
    """Avg of a cell's scores; None unless all six are there."""
    return average({name: views[view]["value"] for name, views in scores.items() if view in views})


def as_asked(cell: Cell) -> Cell:
    """The same cell with the benchmarks and controls that its run was asked for: a table finds it whatever these were."""
    said, cfg = cell.run.config_dict() if (cell.run.folder / "config.yaml").exists() else {}, copy(cell.cfg)
    for key in {"benchmark", "controls", "evaluate"} & said.keys():
        OmegaConf.update(cfg, key, said[key], merge=False, force_add=True)
    return replace(cell, cfg=cfg)


def measure(cell: Cell, side: Side | None) -> dict[str, Any]:
    """What a table tells of a cell."""
    stages, facts, told, results = trained(cell.run), cell.run.facts, outcome(cell.run), side.results if side else {}
    whole = all(name in stages for name in STAGES if list(cell.cfg.data[name]))
    seconds = sum(stage["seconds"] for stage in stages.values()) if whole else None
    seen = sum(sum(stage["samples"].values()) * cell.cfg.recipe[name].epochs for name, stage in stages.items())
    state = as_asked(cell).state()
    state = told.get("state", state) if state == "missing" else state  # one that failed before it had a configuration
    scores = results.get("benchmarks", {})
    return {
        "seed": int(cell.cfg.seed),
        "name": cell.name,
        "folder": str(cell.run.folder),
        "state": state,
        "error": None if state in ("done", "running") else told.get("error"),
        "differs": [line.strip() for line in cell.run.differs(cell.cfg)],
        "scores": {
            name: {view: {key: score[key] for key in ("value", "interval")} for view, score in views.items()}
            for name, views in scores.items()
        },
        "questions": {name: asked["sha256"] for name, asked in results.get("questions", {}).items()},
        "files": {name: counted(views["none"], results["generated"]) for name, views in scores.items()},
        "generated": results.get("generated"),
        "unusual": unusual(results) if results else [],
        "seconds": seconds,
        "samples_per_second": seen / seconds if seconds else None,
        "precision": sorted({stage["precision"] for stage in stages.values()}),
        "devices": max((stage["devices"] for stage in stages.values()), default=None),
        "hardware": facts.get("hardware"),
        "commit": facts.get("commit"),
        "commit_of_scores": results.get("commit"),
    }


def summary(
    cells: Mapping[int, Cell], sides: Mapping[int, Side], answers: Answers, benchmarks: Sequence[str], draws: int
) -> dict[str, Any]:
    """A row over its seeds: its scores, what it cost, and its `cells`.

    Returns:
        `scores`, of each benchmark, of Avg, and of Avg with each control (`blind`, `shuffled`): {"seeds", "values" of each,
        "mean", "interval", "over": `seeds`, or `pictures` of a single one}; None for what is not known.
    """
    measured = [measure(cell, sides.get(seed)) for seed, cell in cells.items()]
    row: dict[str, Any] = {"scores": {}}

    def add(key: str, values: Iterable[float | None], interval: Sequence[float] | None = None) -> None:
        found = {cell["seed"]: value for cell, value in zip(measured, values, strict=True) if value is not None}
        mean, ends = (fmean(found.values()), over_seeds(list(found.values()))) if found else (None, None)
        over = "seeds" if ends else "pictures" if interval else None
        score = {"seeds": list(found), "values": list(found.values()), "mean": mean, "interval": ends or interval}
        row["scores"][key] = score | {"over": over}

    for name in benchmarks:
        true = [cell["scores"].get(name, {}).get("none") for cell in measured]
        own = [score["interval"] for score in true if score]
        add(name, [score and score["value"] for score in true], own[0] if len(own) == 1 else None)
    averages = {cell["seed"]: average_of(cell["scores"]) for cell in measured}
    interval, alone = None, [seed for seed, value in averages.items() if value is not None]
    if len(alone) == 1:
        try:
            interval = answers.interval(sides[alone[0]], draws)
        except (ValueError, OSError) as error:
            row["note"] = f"no interval of Avg ({error})"
    add("avg", averages.values(), interval)
    for view in ("blind", "shuffled"):
        add(view, [average_of(cell["scores"], view) for cell in measured])
    for key in ("seconds", "samples_per_second"):
        known = [cell[key] for cell in measured if cell[key]]
        row[key] = fmean(known) if known else None
    return row | {"cells": measured}


def neighbours(
    upper: str, lower: str, sides: Mapping[str, Mapping[int, Side]], answers: Answers, draws: int
) -> dict[str, Any]:
    """A row against the one above it, on the seeds that both have.

    Returns:
        {"rows", "seeds", "benchmarks": {name: entry}, "avg": entry or None, "not_compared": {name: why}}; an entry has the
        means `a` (upper) and `b`, their difference b - a, the seeds' `differences` and their t interval, and where the sums
        are known the paired interval and test of `mvlm.report`.
    """
    seeds = [seed for seed in sides[upper] if seed in sides[lower]]
    both = [sides[row][seed] for row in (upper, lower) for seed in seeds]
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    sums: dict[str, Sequence[Sums]] = {}
    for name in dict.fromkeys(name for side in both for name in side.results["benchmarks"]):
        if why := next((why for other in both[1:] if (why := unlike(both[0], other, name, "none"))), ""):
            skipped[name] = why
            continue
        scores = [side.results["benchmarks"][name]["none"] for side in both]
        found[name] = apart([score["value"] for score in scores]) | {"questions": len(scores[0]["per_question"])}
        try:
            known = [answers.sums(side, name) for side in both]
        except (ValueError, OSError) as error:
            known, found[name]["note"] = from_marks(both, name, "none", error)
        sums[name] = [together(known[: len(seeds)]), together(known[len(seeds) :])] if known else []
    avg = judge(found, sums, draws)
    if avg is not None:
        avg |= apart([average_of(side.results["benchmarks"]) for side in both])
    return {"rows": [upper, lower], "seeds": seeds, "benchmarks": found, "avg": avg, "not_compared": skipped}


def apart(values: Sequence[float]) -> dict[str, Any]:
    """Means and differences of the upper row's values, seed by seed, and the lower's, which come after them."""
    upper, lower = values[: len(values) // 2], values[len(values) // 2 :]
    differences = [b - a for a, b in zip(upper, lower, strict=True)]
    means = {"a": fmean(upper), "b": fmean(lower), "difference": fmean(differences)}
    return means | {"differences": differences, "seeds_interval": over_seeds(differences)}


def verdict(entry: Mapping[str, Any]) -> str:
    """`n.s.`, also where only the seeds' own interval holds zero; else Holm's p."""
    if "p_holm" not in entry:
        return "not tested"
    if entry["p_holm"] >= LEVEL:
        return "n.s."
    if (ends := entry["seeds_interval"]) and ends[0] <= 0 <= ends[1]:
        return "n.s. over seeds"
    return f"p = {entry['p_holm']:.3f}" if entry["p_holm"] >= 0.0005 else "p < 0.001"


def tables(
    sweep: str,
    *,
    model: str | None = None,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
    seeds: int | None = None,
    protocol: Protocol = "paper",
    folder: str | Path | None = None,
    draws: int = DRAWS,
) -> Iterator[dict[str, Any]]:
    """Each table of a page of sweeps/, as its cells stand now, in plain types: what table.json holds.

    Args:
        model: which; what the rows say, or else train.py's default, if None.
        overrides: further words that the cells were trained with.
        seeds: see `find`.
        folder: of the benchmark files; where the runs found them if None.
        draws: of bootstrap and randomization.

    Raises:
        ValueError: see `Sweep.read`, `published`, `find` and `Side.open`.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol={protocol}: there are {', '.join(get_args(Protocol))}")
    words = [f"protocol={protocol}", *([f"model={model}"] if model else []), *overrides]
    model = model or next(page["model"] for page in OmegaConf.load(CONF / "train.yaml").defaults if "model" in page)
    for swept in Sweep.read(sweep):
        paper, cells = published(swept), find(swept, words, Path(runs), seeds)
        sides: dict[str, dict[int, Side]] = {}
        for row, some in cells.items():
            files = {seed: cell.run.folder / f"results{beside(protocol)}.json" for seed, cell in some.items()}
            sides[row] = {seed: Side.open(file) for seed, file in files.items() if file.exists()}
        every = [side for some in sides.values() for side in some.values()]
        answers, known = Answers(every, folder), {}
        report: dict[str, Any] = {
            "sweep": swept.name,
            "title": swept.title,
            "published": swept.published,
            "protocol": protocol,
            "model": model,
            "overrides": list(overrides),
            "seeds": list(next(iter(cells.values()))),
            "draws": draws,
            "benchmarks": list(dict.fromkeys([*AVERAGED, *(n for side in every for n in side.results["benchmarks"])])),
            "rows": [],
            "pairs": [],
        }
        keys = list(dict.fromkeys(key for sets in swept.rows.values() for key in sets))
        said = {row: {key: next(iter(some.values())).value(key) for key in keys} for row, some in cells.items()}
        for row, some in cells.items():
            sets = said[row]
            entry = {
                "row": row,
                "model": sets.get("model", model),
                "sets": sets,
                **sizes(next(iter(some.values())).cfg, known),
            }
            entry |= summary(some, sides[row], answers, report["benchmarks"], draws)
            entry |= {"paper": paper.get(row), "paper_model": swept.rows[row].get("model", PAPER_MODEL)}
            report["rows"].append(entry)
        for upper, lower in pairwise(swept.rows):
            one, two = said[upper], said[lower]
            changes = {key: [one[key], two[key]] for key in keys if one[key] != two[key]}
            report["pairs"].append(neighbours(upper, lower, sides, answers, draws) | {"changes": changes})
        entries = [entry for pair in report["pairs"] for entry in (*pair["benchmarks"].values(), pair["avg"]) if entry]
        adjusted = holm({str(number): entry["p"] for number, entry in enumerate(entries) if "p" in entry})
        for number, entry in enumerate(entries):
            entry |= {"p_holm": adjusted[str(number)]} if "p" in entry else {}
            entry["verdict"] = verdict(entry)
        yield report | {"tests": len(adjusted), "unlike_the_paper": unlike_the_paper(report)}


def unlike_the_paper(report: Mapping[str, Any]) -> list[str]:
    """Why a table's scores and the paper's are not to be compared; empty for the paper's own models on the published files."""
    rows, why = report["rows"], []
    cells = [cell for row in rows for cell in row["cells"] if cell["scores"]]
    models = dict.fromkeys(
        f"{row['model']} and not {row['paper_model']}" for row in rows if row["model"] != row["paper_model"]
    )
    words = [word for word in report["overrides"] if not of_machine(word)]
    if models:
        why.append(f"the model is {', '.join(models)}")
    if any(cell["generated"] for cell in cells):
        why.append("the benchmarks are generated, the pocket world's, not the published ones")
    elif any("no published version" in told for cell in cells for told in cell["files"].values()):
        why.append("benchmark files are of no published version")
    if report["protocol"] != "paper":
        why.append(f"the protocol is {report['protocol']}, not the paper's")
    if unusual := dict.fromkeys(way for cell in cells for way in cell.get("unusual", ())):
        why.append(f"answers were asked for otherwise: {', '.join(unusual)}")
    if words:
        why.append(f"trained with {' '.join(words)}")
    return why if report["published"] else []
