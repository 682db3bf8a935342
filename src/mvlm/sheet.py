"""A sweep's table as text: in the terminal, as Markdown, LaTeX and CSV, and as a page with plots.

All of it is made of what `mvlm.table.tables` yields, the paper's values in lines of their own. A score that is not there is told by a
word, never by a blank or a zero; what produced the scores and what their intervals are stands under every table.
"""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mvlm import plot
from mvlm.benchmark.evaluate import AVERAGED
from mvlm.page import Html, document, table
from mvlm.run import beside, commit_told, duration, write_json
from mvlm.score import TITLES
from mvlm.table import LEVEL, average_of, histories

HEADS = {**TITLES, "avg": "Avg", "blind": "Avg blind", "shuffled": "Avg shuffled"}

LABELS = ("LLM", "Res", "D", "T", "design", "D&T")
"""The paper's columns that say what a row is."""

PRINTED = {"mme": 20}
"""What a score is multiplied by to be printed as the paper does: MME-P in points of 2000. Avg counts the score itself."""


# -- what must be read with it


def listed(values: Iterable[Any]) -> str:
    """Each once, in order: a, b, c."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in ("", None))) or "not recorded"


def warning(report: Mapping[str, Any]) -> str:
    """What keeps anybody from taking the scores for the paper's; nothing where they may be compared."""
    why = report["unlike_the_paper"]
    return f"These scores are not the paper's and cannot be compared with them: {'; '.join(why)}." if why else ""


def seeds_told(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {listed(seeds)}"


def files_told(cells: Iterable[Mapping[str, Any]]) -> str:
    """Which benchmark files were answered."""
    cells = [cell for cell in cells if cell["scores"]]
    if all(cell["generated"] for cell in cells):
        return "generated pocket benchmarks" if cells else "no scores"
    names = dict.fromkeys(name for cell in cells for name in cell["files"])
    return "benchmark files: " + ", ".join(
        f"{HEADS.get(n, n)} {listed(c['files'].get(n) for c in cells)}" for n in names
    )


def hardware_told(cell: Mapping[str, Any]) -> str:
    """What a cell was trained on."""
    if not cell["hardware"] or cell["devices"] is None:
        return ""
    gpus = cell["hardware"]["devices"][: cell["devices"]]
    cores = f"{cell['hardware']['cores']} cores ({cell['hardware']['processor']})"
    on = " + ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)) or cores
    return f"{on} in {listed(cell['precision'])}"


def caption(report: Mapping[str, Any]) -> list[str]:
    """Sentences under the table."""
    rows = report["rows"]
    cells = [cell for row in rows for cell in row["cells"]]
    over = {score["over"] for row in rows for score in row["scores"].values()}
    commits = {
        key: listed(commit_told(cell[key]) for cell in cells if cell["scores"])
        for key in ("commit", "commit_of_scores")
    }
    lines = [
        f"Ours: model {listed(row['model'] for row in rows)}, protocol {report['protocol']}, {files_told(cells)}, "
        f"{seeds_told(report['seeds'])}; trained on {listed(map(hardware_told, cells))} at commit {commits['commit']}"
        f"{'' if len(set(commits.values())) == 1 else ', scored at ' + commits['commit_of_scores']}."
    ]
    if "seeds" in over:
        lines.append(
            "±: half the 95 % interval of the mean over seeds, by Student's t; the questions are the same for all seeds."
        )
    if "pictures" in over:
        lines.append(
            "± with †: one seed: training noise not included; half the 95 % interval over the choice of pictures."
        )
    lines += [
        "MME-P in points of 2000; Avg = (GQA + SQA-I + VQA-T + POPE + MME-P / 20 + MMB-dev) / 6.",
        "Avg blind and shuffled: the same questions without a picture and with another question's. What is gained over them is seen.",
        "Samples/s and time: of a seed's two stages, loading and encoding of pictures included, scoring not; other work on the machine slows them.",
    ]
    if report["published"]:
        lines.append(
            f"The paper's: {report['published'].replace('table', 'Table ')} of MobileVLM V2 (arXiv 2402.03766), one training a row of "
            f"model {listed(row['paper_model'] for row in rows)}, to which its tokens and parameters belong; it prints no intervals."
        )
        lines += [
            f"In the paper's row {row['row']}, {row['paper']['note']}."
            for row in rows
            if (row["paper"] or {}).get("note")
        ]
    partly = {
        row["row"]: [f"seed {cell['seed']} {cell['state']}" for cell in row["cells"] if cell["state"] != "done"]
        for row in rows
    }
    if told := [f"row {row} ({', '.join(states)})" for row, states in partly.items() if states]:
        lines.append(f"Not done: {'; '.join(told)}.")
    differs: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
        if cell["differs"]:
            differs.setdefault(tuple(cell["differs"]), []).append(cell["name"])
    for some, names in differs.items():
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        lines.append(
            f"Trained with another configuration than is composed now: {', '.join(names)}: {'; '.join(some[:3])}{more}."
        )
    for name in report["benchmarks"]:
        if len({cell["questions"].get(name) for cell in cells if name in cell["scores"]}) > 1:
            lines.append(
                f"{HEADS.get(name, name)}: the cells did not all answer the same questions, so do not compare its rows."
            )
    if len({hardware_told(cell) for cell in cells if cell["seconds"]}) > 1:
        lines.append(
            "The cells were not all trained on the same hardware, so do not compare their samples/s and times."
        )
    return lines + [f"Row {row['row']}: {row['note']}." for row in rows if "note" in row]


def caption_of_pairs(report: Mapping[str, Any]) -> list[str]:
    """Sentences under the differences."""
    lines = []
    if report["tests"]:
        lines += [
            "Lower row minus upper row in points (MME: points / 20), with the 95 % interval of a paired bootstrap over pictures "
            f"({report['draws']:,} draws). p: answers exchanged picture by picture at random ({report['draws']:,} draws), or McNemar's "
            "exact test where one run a row has one question a picture, right or wrong.",
            f"{report['tests']} tests were made, and p is Holm's, which allows for that. n.s.: not significant, p of {LEVEL:g} or more.",
        ]
    if any(len(pair["seeds"]) > 1 for pair in report["pairs"]):
        lines.append(
            "Runs are paired seed by seed and their differences averaged; a picture is drawn, or exchanged, for all at once. Seeds: the "
            "95 % interval of the mean difference by Student's t over the seeds; where it holds zero, n.s. over seeds."
        )
    if any(len(pair["seeds"]) == 1 for pair in report["pairs"]):
        lines.append(
            "Pairs of one seed: training noise not included. Such a p tells two trainings apart, not two recipes."
        )
    told: dict[str, list[str]] = {}
    for pair in report["pairs"]:
        name = " - ".join(reversed(pair["rows"]))
        if not pair["seeds"]:
            told.setdefault("not compared, for no seed has scores of both rows", []).append(name)
        elif pair["seeds"] != report["seeds"]:
            told.setdefault(f"on {seeds_told(pair['seeds'])} alone, which both rows have", []).append(name)
        for key, why in pair["not_compared"].items():
            told.setdefault(f"not compared, {why} (A is the upper row)", []).append(f"{name} {HEADS.get(key, key)}")
        for key, entry in pair["benchmarks"].items():
            if "note" in entry:
                told.setdefault(entry["note"], []).append(f"{name} {HEADS.get(key, key)}")
    return lines + [f"{', '.join(names)}: {why}." for why, names in told.items()]


# -- as text


def grid(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    """Heads, and lines: `ours` or `theirs` (the paper's), each with its cells, a cell being a value and its spread.

    What is not there is told by a word: the cell's state, or that it was not scored.
    """
    rows, names = report["rows"], report["benchmarks"]
    labels = [label for label in LABELS if any(label in (row["paper"] or {}) for row in rows)]
    labels = labels or list(dict.fromkeys(key for row in rows for key in row["sets"]))
    keys = (*names, "avg", "blind", "shuffled")
    head = [
        "row",
        *labels,
        "tokens",
        "params (M)",
        *(HEADS.get(key, key) for key in keys),
        "samples/s",
        "time",
        "seeds",
    ]
    lines = []
    for row in rows:
        paper, cells = row["paper"] or {}, row["cells"]
        said = [ticked(paper.get(label, row["sets"].get(label, ""))) for label in labels]
        parameters = row["projector_parameters"]
        size = [f"{row['image_tokens']:,}", f"{parameters / 1e6:.{2 if parameters > 1e5 else 4}f}"]
        scores = [score_told(row, key) for key in keys]
        speed = f"{row['samples_per_second']:.3g}" if row["samples_per_second"] else absent(row)
        time = duration(row["seconds"]) if row["seconds"] else absent(row)
        seeds = f"{sum(bool(cell['scores']) for cell in cells)} of {len(cells)}"
        plain = [(text, "") for text in (row["row"], *said, *size)]
        lines.append(("ours", [*plain, *scores, (speed, ""), (time, ""), (seeds, "")]))
        if report["published"]:
            forms = {"Tokens": ",", "Params": ".2f"}
            size = [f"{paper[key]:{form}}" if key in paper else "" for key, form in forms.items()]
            printed = [paper.get(HEADS.get(key, key)) for key in (*names, "avg")]
            texts = ["-" if value is None else f"{value:.1f}" for value in printed]
            theirs = [f"paper, {row['paper_model']}", *[""] * len(labels), *size, *texts, *[""] * 5]
            lines.append(("theirs", [(text, "") for text in theirs]))
    return head, lines


def ticked(value: Any) -> str:
    """The paper's ticks and crosses."""
    return ("✓" if value else TIMES) if isinstance(value, bool) else str(value)


def score_told(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """A score as it is printed, and its spread; of a control none."""
    score, times = row["scores"][key], PRINTED.get(key, 1)
    if score["mean"] is None:
        return absent(row, key), ""
    value = f"{times * score['mean']:.1f}"
    if score["interval"] is None or key in ("blind", "shuffled"):
        return value, ""
    half = times * (score["interval"][1] - score["interval"][0]) / 2
    return value, f"± {half:.1f}{'†' if score['over'] == 'pictures' else ''}"


def absent(row: Mapping[str, Any], key: str = "") -> str:
    """Why a row has no value: its cells' states; of scored cells that they have not this one."""
    if key == "avg" and any(cell["scores"] for cell in row["cells"]):
        return f"{max(len(set(AVERAGED) & set(cell['scores'])) for cell in row['cells'])} of 6 scored"
    return listed("not scored" if key and cell["scores"] else cell["state"] for cell in row["cells"])


def between(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.1f}, {ends[1]:.1f}]"


def differences(report: Mapping[str, Any]) -> tuple[list[str], list[list[list[str]]]]:
    """Heads and rows of the differences; a cell is its lines: the difference, its intervals, the verdict."""
    names = [name for name in report["benchmarks"] if any(name in pair["benchmarks"] for pair in report["pairs"])]
    rows = []
    for pair in report["pairs"]:
        changes = [f"{key} {one} → {two}" for key, (one, two) in pair["changes"].items()]
        row = [[" - ".join(reversed(pair["rows"]))], changes]
        for entry in (*map(pair["benchmarks"].get, names), pair["avg"]):
            told = ["not compared"]
            if entry:
                told = [f"{entry['difference']:+.1f}", entry["verdict"]]
                told[1:1] = [between(entry["interval"])] if "interval" in entry else []
                told[-1:-1] = [f"seeds {between(entry['seeds_interval'])}"] if entry["seeds_interval"] else []
            row.append(told)
        rows.append(row)
    return ["rows", "what changes", *map(points, (*names, "avg"))], rows


def points(name: str) -> str:
    """What a difference is a difference of: as it counts in Avg, so MME's points / 20."""
    return HEADS.get(name, name) + (f" / {PRINTED[name]}" if name in PRINTED else "")


# -- as files


def markdown(report: Mapping[str, Any]) -> str:
    """The table and the differences, for a README."""
    head, lines = grid(report)
    texts = [(kind, [" ".join(filter(None, cell)) for cell in cells]) for kind, cells in lines]
    body = [[f"*{text}*" if text and kind == "theirs" else text for text in cells] for kind, cells in texts]
    parts = [f"# {report['title']}, model {listed(row['model'] for row in report['rows'])}"]
    parts += [f"**{told}**"] if (told := warning(report)) else []
    parts += [pipes(head, body), *caption(report)]
    head, rows = differences(report)
    parts += ["## Neighbouring rows", pipes(head, [[" ".join(cell) for cell in row] for row in rows])]
    return "\n\n".join([*parts, *caption_of_pairs(report)]) + "\n"


def pipes(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


TIMES = "\N{MULTIPLICATION SIGN}"

TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "]": "{]}", "→": r"$\to$",
    "±": r"$\pm$", "†": r"$\dagger$", TIMES: r"$\times$", "✓": r"$\checkmark$",
}  # fmt: skip
"""What LaTeX reads otherwise. A bracket after the end of a line would be taken for the line's own argument."""


def tex(text: str) -> str:
    """Text for LaTeX."""
    return "".join(TEX.get(letter, letter) for letter in text)


def latex(report: Mapping[str, Any]) -> str:
    """The table, to be put into a paper: one float, rules by booktabs."""
    head, lines = grid(report)
    left = head.index("tokens")
    body = []
    for kind, cells in lines:
        texts = [tex(value) + (rf" {{\scriptsize {tex(spread)}}}" if spread else "") for value, spread in cells]
        grey = [rf"\textcolor{{gray}}{{{text}}}" if text else "" for text in texts]
        body.append(" & ".join(texts if kind == "ours" else grey) + r" \\")
    return "\n".join(
        [
            r"% Needs \usepackage{amssymb,booktabs,graphicx,xcolor}",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{tex(' '.join(filter(None, [report['title'] + '.', warning(report)])))}}}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}",
            r"\toprule",
            " & ".join(map(tex, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\smallskip\parbox{\textwidth}{\scriptsize",
            *map(tex, caption(report)),
            "}",
            r"\end{table*}",
        ]
    ) + "\n"  # fmt: skip


def sheet(report: Mapping[str, Any]) -> str:
    """The table as CSV: a line a row, numbers in full, MME-P in points of 2000; where there is no number a word says why."""
    lines = []
    for row in report["rows"]:
        paper = row["paper"] or {}
        line = {"table": report["sweep"], "row": row["row"], "model": row["model"], "protocol": report["protocol"]}
        line |= {"benchmarks": files_told(row["cells"]), **row["sets"]}
        line |= {"tokens": row["image_tokens"], "projector parameters": row["projector_parameters"]}
        for key, score in row["scores"].items():
            name, times = HEADS.get(key, key), PRINTED.get(key, 1)
            ends = score["interval"] or [None, None]
            for column, value in ((name, score["mean"]), (f"{name} low", ends[0]), (f"{name} high", ends[1])):
                why = absent(row, key) if score["mean"] is None else "not known"
                line[column] = why if value is None else times * value
            line[f"{name} interval over"] = score["over"] or "not known"
            if report["published"] and key not in ("blind", "shuffled"):
                line[f"paper's {name}"] = "not printed" if paper.get(name) is None else paper[name]
        line |= {"paper's model": row["paper_model"]} if report["published"] else {}
        line |= {key: row[key] or absent(row) for key in ("samples_per_second", "seconds")}
        scored = sum(bool(cell["scores"]) for cell in row["cells"])
        lines.append(line | {"seeds scored": scored, "seeds": len(row["cells"])})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)), restval="not set")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


CURVES = {
    "loss": (
        "training loss a token",
        "Training loss by row; the first seed in full, further ones thin. Rows that learn from other data have other losses.",
    ),
    "sight_gap": (
        "loss: another picture - true one",
        "What the picture is worth, by row: held-out loss a token with another picture less that with the true one.",
    ),
}
COSTS = {"image_tokens": "tokens of a picture", "samples_per_second": "training samples / s"}


def page(report: Mapping[str, Any], folder: Path) -> str:
    """The table, the differences, the plots and the cells as one file; `folder` is where it will lie."""
    model = listed(row["model"] for row in report["rows"])
    source = f"{report['sweep']}, model {model}, protocol {report['protocol']}, {seeds_told(report['seeds'])}"
    source += ": not the paper's numbers" if report["unlike_the_paper"] else ""
    head, lines = grid(report)
    head = [broken(name) for name in head]
    body = [[stacked(cell) for cell in cells] for _, cells in lines]
    alarm = f'<p class="warning">{html.escape(warning(report))}</p>' if report["unlike_the_paper"] else ""
    sections = {"Scores": alarm + table(head, body, [kind for kind, _ in lines]) + paragraphs(caption(report))}

    head, rows = differences(report)
    body = [[stacked(cell, bold=cell[-1].startswith("p ")) for cell in row] for row in rows]
    drawn = plot.forest(report["pairs"], {name: points(name) for name in (*report["benchmarks"], "avg")}, source)
    sections["Does a row differ from the one above it?"] = (
        table(head, body, ["ours"] * len(rows)) + paragraphs(caption_of_pairs(report)) + card(
            drawn,
            "Lower row minus upper row, with the paired 95 % interval over pictures: filled and coloured where significant after Holm, "
            "else hollow. Dotted: the interval over seeds, cut off at the panel's edge. Each panel has its own scale.",
        )
    )  # fmt: skip
    cost = [(plot.tradeoff(report["rows"], key, label, source), label) for key, label in COSTS.items()]
    note = "Dotted: one seed, over pictures. Rows that cost the same stand side by side."
    told = [card(drawn, f"Avg with its interval against {label}, by row. {note}") for drawn, label in cost]
    sections["What a row costs"] = (
        f'<div class="top">{"".join(told)}</div>' if any(told) else "<p>No row has Avg yet.</p>"
    )
    past = histories(report)
    told = [card(plot.curves(past, key, label, source), text) for key, (label, text) in CURVES.items()]
    sections["Training"] = "".join(told) or "<p>No stage is trained yet.</p>"
    sections["Cells"] = cells_table(report, folder)
    about = "Upright: measured here. Slanted: what the paper prints." if report["published"] else "Measured here."
    return document(f"{report['title']} (model {model})", about, sections)


def cells_table(report: Mapping[str, Any], folder: Path) -> str:
    """Every cell with its state, its error and a link to its own page."""
    lines = []
    for row in report["rows"]:
        for cell in row["cells"]:
            own = Path(cell["folder"]) / f"index{beside(report['protocol'])}.html"
            link = html.escape(Path(os.path.relpath(own.resolve(), folder.resolve())).as_posix())
            name = Html(f'<a href="{link}">{html.escape(cell["name"])}</a>') if own.exists() else cell["name"]
            alone = {"scores": {"avg": {"mean": average_of(cell["scores"]), "interval": None}}, "cells": [cell]}
            took = duration(cell["seconds"]) if cell["seconds"] else cell["state"]
            avg = score_told(alone, "avg")[0]
            lines.append(
                [
                    row["row"],
                    name,
                    cell["seed"],
                    cell["state"],
                    avg,
                    took,
                    commit_told(cell["commit"]),
                    cell["error"] or "",
                ]
            )
    head = ["row", "run folder", "seed", "state", "Avg", "training", "commit", "error"]
    return table(head, lines, ["ours"] * len(lines))


def stacked(lines: Sequence[str], bold: bool = False) -> Html:
    """A cell whose first line is the value."""
    first, *rest = (html.escape(line) for line in lines if line) if any(lines) else [""]
    return Html((f"<b>{first}</b>" if bold else first) + "".join(f"<small>{line}</small>" for line in rest))


def broken(head: str) -> str:
    """A head of several words, or of a word and a unit, in two lines."""
    return head.replace(" ", "\n").replace("s/s", "s\n/s")


def paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def card(drawn: plot.Figure | None, told: str) -> str:
    """A figure with its caption; nothing without one."""
    if drawn is None:
        return ""
    style = f"margin-top: 14px; max-width: {96 * drawn.get_figwidth() + 24:.0f}px"
    return f'<figure style="{style}">{plot.svg(drawn)}<figcaption>{html.escape(told)}</figcaption></figure>'


def save(report: Mapping[str, Any], folder: str | Path) -> Path:
    """table.json, .csv, .md, .tex and index.html into a folder; returns the page."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", {**report, "caption": [*caption(report), *caption_of_pairs(report)]})
    texts = {"table.csv": sheet(report), "table.md": markdown(report), "table.tex": latex(report)}
    for name, text in {**texts, "index.html": page(report, folder)}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "index.html"


WIDE = 112
"""Columns from which on a terminal is shown sizes and costs, too."""


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The table in the terminal, what its rows are and where they differ."""
    console = console or Console(highlight=False)
    head, lines = grid(report)
    names = ["row", *(HEADS.get(name, name) for name in report["benchmarks"]), "Avg", "Avg blind"]
    if console.width >= WIDE:
        names = ["row", "tokens", "params (M)", *names[1:], "Avg shuffled", "samples/s", "time", "seeds"]
    printed = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, title=escape(report["title"]), title_justify="left")
    for number, name in enumerate(names):
        printed.add_column(broken(name), justify="right" if number else "left")
    for kind, cells in lines:
        stacked_cells = (
            "\n".join(filter(None, cell)).replace("± ", "±").replace("unfinished", "unfi-\nnished") for cell in cells
        )
        texts = dict(zip(head, stacked_cells, strict=True))
        texts["row"] = "paper" if kind == "theirs" else texts["row"]
        printed.add_row(*(escape(texts[name]) for name in names), style="dim italic" if kind == "theirs" else "")
    if told := warning(report):
        console.print(f"[bold yellow]{escape(told)}[/]")
    console.print(printed)
    for row in report["rows"]:
        sets = " ".join(f"{key}={value}" for key, value in row["sets"].items())
        console.print(f"[bold]{escape(row['row'])}[/]  {escape(sets)}")
        for cell in row["cells"]:
            if cell["state"] != "done" or not cell["scores"]:
                console.print(
                    f"    seed {cell['seed']}: {cell['state']}  {escape(cell['error'] or '')}", style="yellow"
                )
    for pair in report["pairs"]:
        told, entry = "not compared", pair["avg"]
        if entry:
            told = f"{entry['difference']:+.1f} {between(entry['interval'])}  {entry['verdict']}"
            told += f"  (over seeds {between(entry['seeds_interval'])})" if entry["seeds_interval"] else ""
        console.print(f"Avg of {' - '.join(reversed(pair['rows']))}: {told}", markup=False)
    for line in (*caption(report), *caption_of_pairs(report)):
        console.print(line, style="dim", markup=False)
