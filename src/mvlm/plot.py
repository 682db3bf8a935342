"""The plots of a table, as matplotlib figures: a notebook shows them as they are, a page as SVG in its own colours.

What they take is what `table.json` and `stage.json` hold, in plain types.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

THEME = {"ink": "#1c2733", "soft": "#62707e", "line": "#d9dfe5", "card": "#ffffff"}
"""The light page's colours; in SVG they become the page's variables, and so follow it into the dark."""

PALETTE = ("#2a6fdb", "#d98a1f", "#1d9a6c", "#c0392b", "#8e5bd0", "#c2559c", "#17a2b8", "#8c5a3c", "#7a8794", "#a0892c")
"""Of rows, in their order, the same in every plot; readable on a light and on a dark page."""

ON_COLOUR = "#fefefe"
"""Text on a colour of the palette; it stays as it is in the dark."""

STYLE = {
    "font.family": "sans-serif", "font.size": 9, "figure.facecolor": THEME["card"], "axes.facecolor": "none",
    "text.color": THEME["ink"], "axes.labelcolor": THEME["ink"], "axes.edgecolor": THEME["line"],
    "xtick.color": THEME["soft"], "ytick.color": THEME["soft"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": THEME["line"], "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.titlesize": 9, "axes.titlecolor": THEME["ink"], "legend.frameon": False, "legend.labelcolor": THEME["ink"],
}  # fmt: skip

POINTS = 100
"""Points of a curve at most; each is the mean of the steps that it stands for."""

STAGES = {"pretrain": "pre-training", "finetune": "multi-task training"}


def figure(title: str, width: float, height: float, columns: int = 1, **axes: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many inches, with what produced it above."""
    made = Figure(figsize=(width, height), layout="constrained")
    found = made.subplots(1, columns, squeeze=False, **axes)[0]
    made.suptitle(title, x=0.01, ha="left", fontsize=8, color=THEME["soft"])
    return made, list(found)


@rc_context(STYLE)
def tradeoff(rows: Sequence[Mapping[str, Any]], x: str, label: str, title: str = "") -> Figure | None:
    """Avg with its interval against what a row costs, each point with its row's name; None if no row has both.

    Args:
        rows: of a table.
        x: key of a row: `image_tokens`, `samples_per_second`.
        label: of the x axis.
    """
    coloured = zip(rows, cycle(PALETTE), range(1, len(rows) + 1), strict=False)
    shown = [told for told in coloured if told[0][x] and told[0]["scores"]["avg"]["mean"] is not None]
    if not shown:
        return None
    made, (ax,) = figure(title, 4.6, 3.6)
    at: dict[float, list[str]] = defaultdict(list)
    for row, *_ in shown:
        at[row[x]].append(row["row"])
    for row, colour, number in shown:
        score, beside = row["scores"]["avg"], at[row[x]]
        shift = 20 * (beside.index(row["row"]) - (len(beside) - 1) / 2)  # rows of the same cost stand side by side
        moved = ax.transData + ScaledTranslation(shift / 72, 0, made.dpi_scale_trans)
        ends = score["interval"] or [score["mean"]] * 2
        ax.plot([row[x]] * 2, ends, alpha=0)  # for the axes' limits
        line = ":" if score["over"] == "pictures" else "-"
        ax.plot([row[x]] * 2, ends, line, color=colour, linewidth=1.6, transform=moved)
        ax.plot(row[x], score["mean"], "o", color=colour, markersize=13, transform=moved)
        name = row["row"] if len(row["row"]) < 4 else str(number)
        inside = {"color": ON_COLOUR, "fontsize": 7, "fontweight": "bold", "ha": "center", "va": "center"}
        ax.text(row[x], score["mean"], name, transform=moved, **inside)
    ax.set(xlabel=label, ylabel="Avg of six benchmarks")
    ax.margins(x=0.3, y=0.08)
    if len(at) < 4:
        ax.set_xticks(sorted(at), [f"{value:,.3g}" if value % 1 else f"{value:,.0f}" for value in sorted(at)])
    return made


@rc_context(STYLE)
def forest(pairs: Sequence[Mapping[str, Any]], titles: Mapping[str, str], title: str = "") -> Figure | None:
    """Differences between neighbouring rows with their intervals, a panel a score, hollow where not significant; None without any.

    Args:
        pairs: a table's.
        titles: of the scores that are shown, by their keys; a score that no pair has is left out.
    """
    entries = {
        key: [(place, entry) for place, pair in enumerate(pairs) if (entry := _difference(pair, key))] for key in titles
    }
    entries = {key: found for key, found in entries.items() if found}
    if not entries:
        return None
    made, panels = figure(title, max(4.0, 1.2 + 1.4 * len(entries)), 1.1 + 0.36 * len(pairs), len(entries), sharey=True)
    for ax, (key, found) in zip(panels, entries.items(), strict=True):
        ax.axvline(0, color=THEME["soft"], linewidth=1)
        for place, entry in found:
            sure = entry["verdict"].startswith("p ")
            colour = (PALETTE[2] if entry["difference"] > 0 else PALETTE[3]) if sure else THEME["soft"]
            ax.plot(entry["interval"], [place] * 2, color=colour, linewidth=2)
            fill = colour if sure else THEME["card"]
            ax.plot(entry["difference"], place, "o", markersize=6, color=colour, markerfacecolor=fill)
        ax.set(title=titles[key], ylim=(len(pairs) - 0.4, -0.6), xlim=ax.get_xlim())
        for place, entry in found:  # of few seeds it may be very long: it does not widen the panel
            if entry["seeds_interval"]:
                ax.plot(entry["seeds_interval"], [place + 0.25] * 2, color=THEME["soft"], linewidth=1.2, linestyle=":")
        ax.locator_params(axis="x", nbins=4)
        ax.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(pairs)), [f"{pair['rows'][1]} - {pair['rows'][0]}" for pair in pairs])
    panels[len(panels) // 2].set_xlabel("difference in points")
    return made


def _difference(pair: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """A pair's entry of a score, if it has an interval."""
    entry = pair["avg"] if key == "avg" else pair["benchmarks"].get(key)
    return entry if entry and "interval" in entry else None


@rc_context(STYLE)
def curves(
    histories: Mapping[str, Sequence[Mapping[str, Sequence[Mapping[str, float]]]]],
    key: str,
    label: str,
    title: str = "",
) -> Figure | None:
    """A figure of the histories over the steps, a panel a stage, a colour a row, a line a seed; None if no step has it.

    Args:
        histories: row -> its runs, each {stage: entries of stage.json's history}.
        key: `loss`, `sight_gap`, ... of an entry.
        label: of the y axis.
    """
    present = [
        stage
        for stage in STAGES
        if any(key in entry for runs in histories.values() for run in runs for entry in run.get(stage, ()))
    ]
    if not present:
        return None
    made, panels = figure(title, 1.0 + 4.0 * len(present), 3.1, len(present), sharey=key != "loss")
    for ax, stage in zip(panels, present, strict=True):
        longest = 1
        for (row, runs), colour in zip(histories.items(), cycle(PALETTE), strict=False):
            lines = [
                points for run in runs if (points := [(e["step"], e[key]) for e in run.get(stage, ()) if key in e])
            ]
            for number, points in enumerate(lines):
                size = -(-len(points) // POINTS)
                longest = max(longest, size)
                blocks = [np.mean(points[k : k + size], 0) for k in range(0, len(points), size)]
                ax.plot(
                    *zip(*blocks, strict=True),
                    "o-" if len(blocks) < 12 else "-",
                    color=colour,
                    markersize=3,
                    linewidth=1.4 if number == 0 else 0.8,
                    alpha=0.9 if number == 0 else 0.5,
                    label=row if number == 0 else None,
                )
        mean = f", each point the mean of up to {longest}" if longest > 1 else ""
        ax.set(title=STAGES[stage], xlabel=f"optimizer step{mean}", ylabel=label if ax is panels[0] else "")
        ax.set_xlim(left=0)
        ax.locator_params(axis="x", integer=True)
    handles = {text: handle for ax in panels for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    made.legend(handles.values(), handles, loc="outside right center", title="row", title_fontsize=8)
    return made


def svg(drawn: Figure) -> str:
    """A figure as SVG to stand inside a page: its text as text, the theme's colours as the page's variables."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mvlm"}):  # the same figure, the same text
        drawn.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # several figures share a page
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows both
    for name, colour in THEME.items():
        text = text.replace(colour, f"var(--{name})")
    return text
