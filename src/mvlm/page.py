"""A run folder as one page to look at: scores beside their controls, the curve of sight, pictures with questions and answers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

CONTROLS = {"none": "true picture", "blind": "no picture", "shuffled": "another picture"}
COLOURS = {"none": "#2a6fdb", "blind": "#9aa3ad", "shuffled": "#d98a1f"}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #62707e; --line: #d9dfe5; --card: #fff; --page: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa8b5; --line: #33404c; --card: #1a232c; --page: #10171d; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; max-width: 1120px; padding: 24px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 10px; } p { color: var(--soft); margin: 4px 0 0; max-width: 85ch; }
table { border-collapse: collapse; background: var(--card); border-radius: 8px; overflow: hidden; }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { font-weight: 600; border: 0; }
.top { display: flex; gap: 24px; flex-wrap: wrap; align-items: flex-start; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
.card { background: var(--card); border-radius: 8px; overflow: hidden; }
.card img { width: 100%; height: 190px; object-fit: contain; background: var(--line); display: block; }
.card ul { list-style: none; margin: 0; padding: 8px 12px 12px; } .card li { margin-top: 7px; }
.q { color: var(--soft); } .right b { color: #1d8348; } .wrong b { color: #c0392b; } .wrong s { color: var(--soft); text-decoration: none; }
@media (prefers-color-scheme: dark) { .right b { color: #58d68d; } .wrong b { color: #ff8a7a; } }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 12px; } figcaption { color: var(--soft); font-size: 13px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
"""


@dataclass(frozen=True)
class Shown:
    """One answered question as the page shows it; `value` is its score, 0 to 1."""

    benchmark: str
    question: str
    truth: str
    answer: str
    value: float
    image: Path | bytes | None


def thumbnail(image: Path | bytes, side: int = 420) -> str:
    """A picture as a data URL, at most `side` pixels wide or high."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((side, side))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(history: Mapping[str, Sequence[Mapping[str, float]]], width: int = 520, height: int = 230) -> str:
    """Held-out loss with true and with shuffled pictures over all stages, as SVG. Empty without such figures."""
    points, offset, borders = [], 0, []
    for stage, entries in history.items():
        points += [(offset + e["step"], e["sight_true"], e["sight_shuffled"]) for e in entries if "sight_true" in e]
        offset += max((e["step"] for e in entries), default=0)
        borders.append((stage, offset))
    if len(points) < 2:
        return ""
    low, high = 0.0, max(max(p[1:]) for p in points) * 1.05
    left, bottom = 34, height - 22

    def xy(step: float, loss: float) -> tuple[float, float]:
        return left + (width - left - 8) * step / offset, bottom - (bottom - 10) * (loss - low) / (high - low)

    def line(column: int, colour: str) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*xy(p[0], p[column])) for p in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>'

    marks, start = "", 0
    for stage, end in borders:
        x0, x1 = xy(start, 0)[0], xy(end, 0)[0]
        marks += f'<line x1="{x1:.1f}" x2="{x1:.1f}" y1="10" y2="{bottom}" stroke="var(--line)"/>'
        marks += f'<text x="{(x0 + x1) / 2:.1f}" y="{height - 6}" text-anchor="middle">{html.escape(stage)} ({end - start} steps)</text>'
        start = end
    for i in range(5):
        loss = low + (high - low) * i / 4
        y = xy(0, loss)[1]
        marks += f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        marks += f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>'
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="held-out loss over steps">'
        + marks + line(2, COLOURS["shuffled"]) + line(1, COLOURS["none"]) + "</svg>"
    )  # fmt: skip


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Benchmarks as rows, the true picture and the controls as columns. `scores[benchmark][control]` is a text or a number."""
    controls = [c for c in CONTROLS if any(c in row for row in scores.values())]
    head = "".join(f"<th>{CONTROLS[c]}</th>" for c in controls)
    rows = ""
    for name, row in scores.items():
        cells = "".join(f"<td>{html.escape(str(row.get(c, '-')))}</td>" for c in controls)
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def gallery(shown: Sequence[Shown]) -> str:
    """One card a picture, with all that was asked about it."""
    cards: dict[Any, list[Shown]] = {}
    for item in shown:
        if item.image is not None:
            cards.setdefault(item.image, []).append(item)
    out = ""
    for image, items in cards.items():
        lines = ""
        for i in items:
            right = i.value >= 0.5
            said = html.escape(i.answer[:120]) or "(nothing)"
            truth = "" if right else f" <s>(it is {html.escape(i.truth)})</s>"
            lines += (
                f'<li class="{"right" if right else "wrong"}"><span class="q">{html.escape(i.benchmark)}: '
                f"{html.escape(i.question)}</span><br><b>{'✓' if right else '✗'} {said}</b>{truth}</li>"
            )
        out += (
            f'<div class="card"><img src="{thumbnail(image)}" alt="a picture of the benchmark"><ul>{lines}</ul></div>'
        )
    return f'<div class="cards">{out}</div>'


def page(
    title: str,
    about: str,
    scores: Mapping[str, Mapping[str, Any]],
    history: Mapping[str, Sequence[Mapping[str, float]]],
    shown: Sequence[Shown],
) -> str:
    """The whole page, self-contained."""
    drawn = curve(history)
    figure = (
        f'<figure>{drawn}<figcaption>Held-out loss a token with the <span style="color:{COLOURS["none"]}">true</span> picture and '
        f'with <span style="color:{COLOURS["shuffled"]}">another</span>. The gap is what the model sees.</figcaption></figure>'
        if drawn
        else ""
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"
        f'<h2>Scores</h2><div class="top">{score_table(scores)}{figure}</div>'
        f"<h2>Questions and answers</h2>{gallery(shown)}</html>\n"
    )
