"""Plots: what they draw is what they were given; as SVG they fit into a page, light or dark."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mvlm import page, plot


def row(name: str, tokens: int, mean: float | None, over: str = "seeds") -> dict:
    score = {"mean": mean, "interval": None if mean is None else [mean - 1, mean + 2], "over": over}
    return {"row": name, "image_tokens": tokens, "samples_per_second": None, "scores": {"avg": score}}


def pair(rows: list[str], difference: float, verdict: str) -> dict:
    ends = {"interval": [difference - 1, difference + 1], "seeds_interval": [-50, 50]}
    return {"rows": rows, "benchmarks": {}, "avg": {"difference": difference, "verdict": verdict} | ends}


def test_points_have_their_rows_names_and_intervals() -> None:
    rows = [row("1", 576, 50), row("2", 144, 60, "pictures"), row("3", 144, None), row("a long name", 144, 70)]
    (ax,) = plot.tradeoff(rows, "image_tokens", "tokens").axes
    assert [text.get_text() for text in ax.texts] == ["1", "2", "4"], (
        "a long name by its number, what is not there not at all"
    )
    lines = [line for line in ax.lines if line.get_alpha() != 0]
    assert [list(line.get_ydata()) for line in lines] == [[49, 52], [50], [59, 62], [60], [69, 72], [70]]
    assert [line.get_linestyle() for line in lines[::2]] == ["-", ":", "-"], "of one seed dotted"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens", "Avg of six benchmarks")
    assert plot.tradeoff(rows, "samples_per_second", "speed") is None


def test_what_is_not_significant_is_hollow() -> None:
    pairs = [pair(["1", "2"], 4, "p = 0.010"), pair(["2", "3"], -3, "n.s."), pair(["3", "4"], 2, "n.s. over seeds")]
    (ax,) = plot.forest(pairs, {"gqa": "GQA", "avg": "Avg"}).axes
    markers = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() != plot.THEME["card"] for line in markers] == [True, False, False]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["2 - 1", "3 - 2", "4 - 3"]
    assert ax.get_xlim()[0] > -10 and ax.get_xlim()[1] < 10, "the seeds' long intervals do not widen it"
    assert plot.forest([{"rows": ["1", "2"], "benchmarks": {}, "avg": None}], {"avg": "Avg"}) is None


def test_a_long_curve_is_drawn_by_means_of_steps() -> None:
    history = [{"step": n, "loss": float(n % 5)} for n in range(1, 501)]
    made = plot.curves({"1": [{"pretrain": history}, {}]}, "loss", "loss")
    (line,) = made.axes[0].lines
    assert len(line.get_xdata()) == plot.POINTS
    assert line.get_xdata() == pytest.approx(np.arange(3, 500, 5)) and line.get_ydata() == pytest.approx(2)
    assert made.axes[0].get_xlabel() == "optimizer step, each point the mean of up to 5"
    assert plot.curves({"1": [{"pretrain": history}]}, "sight_gap", "sight") is None


def test_svg_takes_the_pages_colours_and_no_ids() -> None:
    for name, colour in plot.THEME.items():
        light = re.search(rf"--{name}: (#\w+)", page.STYLE)[1]
        assert {light, colour} in ({light}, {"#fff", "#ffffff"}), "the light page's own"
    rows = [row("<1>", 144, 60), row("2", 576, 50)]
    drawn, again = (plot.svg(plot.tradeoff(rows, "image_tokens", "tokens", "what made it")) for _ in range(2))
    assert drawn.startswith("<svg") and drawn.rstrip().endswith("</svg>") and "http" not in drawn
    assert "var(--ink)" in drawn and not set(plot.THEME.values()) & set(re.findall(r"#\w{6}", drawn))
    assert "what made it" in drawn and "&lt;1&gt;" in drawn, "text is text"
    assert drawn == again, "the same figure, the same page"
    assert not re.search(r'id="(figure|axes|patch|text|line2d)', drawn)
