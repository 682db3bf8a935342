"""Pages to look at, each one file that needs no network: scores beside their controls, the curve of sight, answered questions.

A picture is embedded once, on a card with all its questions, so a page without scripts shows everything; the little script
only hides what the filters leave out.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

CONTROLS = {"none": "true picture", "blind": "no picture", "shuffled": "another picture"}
COLOURS = {"none": "#2a6fdb", "blind": "#9aa3ad", "shuffled": "#d98a1f"}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #62707e; --line: #d9dfe5; --card: #fff; --page: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa8b5; --line: #33404c; --card: #1a232c; --page: #10171d; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; max-width: 1120px; padding: 24px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 10px; } p { color: var(--soft); margin: 4px 0 0; max-width: 85ch; }
table { border-collapse: collapse; background: var(--card); border-radius: 8px; display: block; width: fit-content; max-width: 100%;
  overflow-x: auto; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th, td { white-space: pre; } td:first-child { white-space: normal; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border: 0; }
table:not(.wide) tr:last-child td { font-weight: 600; }
body:has(.wide) { max-width: 1400px; } table.wide { font-size: 13px; } .wide :is(th, td) { padding: 6px 9px; vertical-align: top; }
.wide :is(th, td):nth-child(2) { text-align: left; } .wide td:is(:nth-child(2), :last-child) { white-space: normal; }
.wide small { display: block; color: var(--soft); white-space: nowrap; }
tr.theirs td { font-style: italic; color: var(--soft); font-size: 12px; padding-top: 0; } tr.ours td { border: 0; padding-bottom: 1px; }
.warning { border-left: 5px solid #d98a1f; background: var(--card); color: var(--ink); padding: 10px 14px; border-radius: 4px; max-width: none;
  margin-bottom: 12px; }
.top { display: flex; gap: 24px; flex-wrap: wrap; align-items: flex-start; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
.card { background: var(--card); border-radius: 8px; overflow: hidden; }
.card img { width: 100%; height: 190px; object-fit: contain; background: var(--line); display: block; }
.card ul { list-style: none; margin: 0; padding: 8px 12px 12px; } .card li { margin-top: 7px; overflow-wrap: anywhere; }
.q { color: var(--soft); white-space: pre-line; } .right { color: #1d8348; } .wrong { color: #c0392b; }
@media (prefers-color-scheme: dark) { .right { color: #58d68d; } .wrong { color: #ff8a7a; } }
form { position: sticky; top: 0; background: var(--page); padding: 10px 0; display: flex; gap: 18px; flex-wrap: wrap; align-items: center; }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; }
a { color: #2a6fdb; } @media (prefers-color-scheme: dark) { a { color: #7fb0ff; } }
[hidden] { display: none; }
figure { flex: 1 1 380px; max-width: 544px; box-sizing: border-box; margin: 0; background: var(--card); border-radius: 8px; padding: 12px; }
figcaption { color: var(--soft); font-size: 13px; }
figure svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
"""
SCRIPT = """
const selects = [...document.querySelectorAll("select")], items = [...document.querySelectorAll(".card li")];
function show() {
  let left = 0;
  for (const item of items) {
    item.hidden = selects.some((select, i) => select.value && item.dataset["f" + i] !== select.value);
    left += !item.hidden;
  }
  for (const card of document.querySelectorAll(".card")) card.hidden = !card.querySelector("li:not([hidden])");
  document.querySelector("output").textContent = `${left} of the ${items.length} on this page`;
}
addEventListener("change", show);
addEventListener("pageshow", show);
"""

T = TypeVar("T")


class Html(str):
    """A cell of a table that is HTML already."""


@dataclass(frozen=True)
class Shown:
    """One answered question as a page shows it."""

    benchmark: str
    question: str
    truth: str
    answers: Mapping[str, tuple[str, float]]
    """By what was asked (a view, a run; "" if there is but one): the answer, and its mark from 0 to 1."""
    image: Path | bytes | None
    facets: Mapping[str, str] = field(default_factory=dict)
    """What the page can be filtered by."""


def spread(items: Sequence[T], number: int) -> list[T]:
    """At most `number` of the items, evenly spread over them, in their order."""
    if len(items) <= number:
        return list(items)
    return [items[k * len(items) // number] for k in range(number)]


def picture_of(image: Path | bytes, side: int = 256) -> Image.Image:
    """A picture as the model is shown it, shrunk to at most `side` pixels wide and high."""
    from mvlm.data.image import open_picture

    picture = open_picture(image)
    picture.thumbnail((side, side))
    return picture


def thumbnail(image: Path | bytes) -> str:
    """A shrunk picture as a data URL: some 10 kB of a photograph."""
    buffer = io.BytesIO()
    picture_of(image).save(buffer, "JPEG", quality=75)
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


def curve_figure(history: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The curve with its caption. Empty without such figures."""
    drawn = curve(history)
    return drawn and (
        f'<figure>{drawn}<figcaption>Held-out loss a token with the <span style="color:{COLOURS["none"]}">true</span> picture and '
        f'with <span style="color:{COLOURS["shuffled"]}">another</span>. The gap is what the model sees.</figcaption></figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], kinds: Sequence[str] = ()) -> str:
    """Rows under their heads; the first column names them.

    Args:
        kinds: `ours` or `theirs`, of each row of a wide table.
    """

    def line(tag: str, cells: Sequence[Any], kind: str = "") -> str:
        inner = (cell if isinstance(cell, Html) else html.escape(str(cell)) for cell in cells)
        return f"<tr{kind}>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in inner) + "</tr>"

    classes = [f' class="{kind}"' for kind in kinds] or [""] * len(rows)
    lines = "".join(line("td", row, kind) for row, kind in zip(rows, classes, strict=True))
    return ('<table class="wide">' if kinds else "<table>") + line("th", head) + lines + "</table>"


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Benchmarks as rows; the true picture, the controls and the number of questions as columns.

    `scores[benchmark]` maps a view, or `items`, to a text or a number.
    """
    columns = {
        c: CONTROLS.get(c, "questions") for c in (*CONTROLS, "items") if any(c in row for row in scores.values())
    }
    return table(["", *columns.values()], [[name, *(row.get(c, "") for c in columns)] for name, row in scores.items()])


def gallery(shown: Sequence[Shown], filters: bool = False) -> str:
    """One card a picture, with all that was asked about it; with selections above that narrow it by the facets."""
    if not shown:
        return "<p>There is none.</p>"
    facets = list(dict.fromkeys(name for item in shown for name in item.facets)) if filters else []
    form = ""
    for name in facets:
        options = "".join(
            f"<option>{html.escape(value)}</option>"
            for value in dict.fromkeys(item.facets[name] for item in shown if name in item.facets)
        )
        form += f'<label>{html.escape(name)} <select><option value="">all</option>{options}</select></label>'
    small = {image: thumbnail(image) for image in {item.image for item in shown} if image is not None}
    cards: dict[str, list[Shown]] = {}
    for item in shown:  # by what is seen: ScienceQA keeps the same picture in several files
        cards.setdefault(small.get(item.image, ""), []).append(item)
    out = ""
    for source, items in cards.items():
        picture = f'<img src="{source}" alt="the picture of these questions">' if source else ""
        out += f'<div class="card">{picture}<ul>{"".join(_item(item, facets) for item in items)}</ul></div>'
    form = f'<form>{form}<output aria-live="polite"></output></form>' if facets else ""
    return f'{form}<div class="cards">{out}</div>' + (f"<script>{SCRIPT}</script>" if facets else "")


def _item(item: Shown, facets: Sequence[str]) -> str:
    data = "".join(f' data-f{k}="{html.escape(item.facets.get(name, ""))}"' for k, name in enumerate(facets))
    lines = [f'<span class="q">{html.escape(item.benchmark)}: {html.escape(item.question)}</span>']
    for name, (text, mark) in item.answers.items():
        right = mark >= 0.5
        said = html.escape(text[:120]) or "(nothing)"
        asked = f'<span class="q">{html.escape(name)}:</span> ' if name else ""
        lines.append(f'{asked}<b class="{"right" if right else "wrong"}">{"✓" if right else "✗"} {said}</b>')
    if any(mark < 0.5 for _, mark in item.answers.values()):
        lines.append(f'<span class="q">it is</span> {html.escape(item.truth)}')
    return f"<li{data}>{'<br>'.join(lines)}</li>"


def document(title: str, about: str, sections: Mapping[str, str]) -> str:
    """A whole page, self-contained. `sections`: heading -> HTML."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"
        f"{body}</html>\n"
    )
