"""A sweep's table from run folders made by hand, whose truth is known: scores, seeds, intervals, differences, and every way to print it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import runpy
import shutil
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from mvlm import build, report, score, sheet, sweep, table
from mvlm.benchmark.base import Sums
from mvlm.benchmark.evaluate import AVERAGED, answers_file, evaluate
from mvlm.cli import CONF, ROOT
from mvlm.plan import count_parts, meta_model
from mvlm.run import Run, write_json
from mvlm.score import fingerprint
from mvlm.sweep import Cell, Sweep

DRAWS = 1000
"""The smallest p is then 1/1001, and Holm's of 28 tests below 0.05."""

RIGHT = {
    "every second": lambda n: n % 2 == 0,
    "every third": lambda n: n % 3 == 0,
    "but every third": lambda n: n % 3 > 0,
    "all": lambda n: True,
    "none": lambda n: False,
}
"""Which questions are answered rightly, by their number. The controls are wrong throughout."""


def answer(name: str, truth, right: bool) -> str:
    if name == "sqa":
        return "ABCDE"[truth[0] if right else (truth[0] + 1) % truth[1]]
    if name == "mmbench":
        return truth[0] if right else next(letter for letter in truth[1] if letter != truth[0])
    if name in ("pope", "mme"):
        return truth if right else {"yes": "no", "no": "yes"}[truth]
    return (truth if isinstance(truth, str) else truth[0]) if right else "neither"


@cache
def composed_once(sweep: str, row: str, *words: str) -> Cell:
    (swept,) = Sweep.read(sweep)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return Cell.composed([*swept.overrides(row), "model=nano", *words])


def composed(sweep: str, row: str, runs: Path, seed: int = 0, *words: str) -> Cell:
    """A row's cell in a folder of runs."""
    cell = composed_once(sweep, row, *words)
    return table.with_seed(replace(cell, run=Run(runs / cell.name)), seed)


def begin(cell: Cell) -> Cell:
    """The run folder of a cell whose training has begun."""
    cell.run.folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cell.cfg, resolve=True)), cell.run.folder / "config.yaml")
    cell.run.note(commit="0123456789abcdef+changes", hardware={"processor": "x", "cores": 2, "devices": []})
    return cell


@pytest.fixture(scope="module")
def train(nano_cache: Path, tmp_path_factory: pytest.TempPathFactory):
    """`train(cell, "all")`: the run folder as the cell would leave it, had it answered so. 60 samples an epoch in 10 s and in 30 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVLM_CACHE", str(nano_cache))
        cfg = composed("table7", "1", Path("none")).cfg
        folder = build.corpus(cfg).benchmarks
        found = score.benchmarks(cfg.benchmark, folder)
        asked = {made.name: made.questions() for made in found}
        prints = {name: fingerprint(questions) for name, questions in asked.items()}
        kept = {}

        def answered(right: str, only: tuple[str, ...]) -> tuple[Path, dict]:
            """Answers and results, made once."""
            if (right, only) in kept:
                return kept[right, only]
            answers, some = tmp_path_factory.mktemp("answers"), [made for made in found if made.name in only]
            for made, view in product(some, ("none", "blind", "shuffled")):
                lines = [
                    {"id": q.id, "prompt": q.text, "text": answer(made.name, q.truth, view == "none" and RIGHT[right](n)), "stopped": True}
                    for n, q in enumerate(asked[made.name])
                ]  # fmt: skip
                answers_file(answers, made, view).write_text("".join(json.dumps(line) + "\n" for line in lines))
            results = evaluate(None, some, answers, controls=["blind", "shuffled"])
            results |= {"generated": True, "corpus": str(folder), "questions": {name: prints[name] for name in only}}
            return kept.setdefault((right, only), (answers, results))

        def made(cell: Cell, right: str, only: tuple[str, ...] = AVERAGED) -> Cell:
            begin(cell)
            for stage, seconds in (("pretrain", 10.0), ("finetune", 30.0)):
                history = [{"step": n, "loss": 5 / n, "sight_gap": n / 9} for n in range(1, 4)]
                told = {"samples": {"a": 20, "b": 40}, "seconds": seconds, "precision": "32-true", "devices": 1}
                (cell.run.folder / stage).mkdir()
                write_json(cell.run.folder / stage / "stage.json", told | {"history": history})
            answers, results = answered(right, only)
            shutil.copytree(answers, cell.run.folder / "answers")
            write_json(cell.run.folder / "results.json", results)
            (cell.run.folder / "index.html").write_text("the cell's own page")
            return cell

        yield made


SEEDS = ("every second", "every third", "but every third")


@pytest.fixture(scope="module")
def told(train, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Table 7 with rows that are alike, opposite, partly there and not there; see the tests."""
    runs = tmp_path_factory.mktemp("runs")
    cell = lambda row, seed: composed("table7", row, runs, seed)  # noqa: E731
    for seed, right in enumerate(SEEDS):
        train(cell("1", seed), right)
        train(cell("2", seed), right)
        train(cell("3", seed), "all")
    for seed in (0, 1):
        train(cell("4", seed), "none")
    write_json(begin(cell("4", 2)).run.folder / "outcome.json", {"state": "failed", "error": "error: no room [/tmp]"})
    train(cell("6", 0), SEEDS[0])
    running = begin(cell("6", 1)).run
    running.lock()  # it is held as long as this run is known
    killed = cell("6", 2).run.folder
    killed.mkdir()
    write_json(killed / "outcome.json", {"state": "killed", "error": "by SIGKILL"})
    train(cell("7", 0), SEEDS[0])
    (found,) = table.tables("table7", model="nano", runs=runs, draws=DRAWS)
    assert running.locked
    return json.loads(json.dumps(found))


def row_of(told: dict, name: str) -> dict:
    return next(row for row in told["rows"] if row["row"] == name)


def pair_of(told: dict, lower: str) -> dict:
    return next(pair for pair in told["pairs"] if pair["rows"][1] == lower)


# -- the numbers


def test_students_t_against_printed_tables() -> None:
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}
    assert {n: round(table.student_t(n), 3) for n in printed} == printed
    assert round(table.student_t(4, 0.99), 3) == 4.604


def test_scores_are_means_over_seeds_with_students_interval(told) -> None:
    row = row_of(told, "1")
    for key in (*AVERAGED, "avg"):
        got = row["scores"][key]
        views = [cell["scores"] for cell in row["cells"]]
        by_hand = [
            fmean(v[n]["none"]["value"] for n in AVERAGED) if key == "avg" else v[key]["none"]["value"] for v in views
        ]
        assert got["seeds"] == [0, 1, 2] and got["values"] == pytest.approx(by_hand) and got["over"] == "seeds"
        assert got["mean"] == pytest.approx(sum(by_hand) / 3)
        half = 4.302653 * stdev(by_hand) / math.sqrt(3)
        assert got["interval"] == pytest.approx([got["mean"] - half, got["mean"] + half], rel=1e-5)
    assert row["scores"]["blind"]["mean"] == row["scores"]["shuffled"]["mean"] == 0 != row["scores"]["avg"]["mean"]


def test_of_one_seed_the_interval_is_the_scores_own(told) -> None:
    row = row_of(told, "7")
    for key in AVERAGED:
        assert row["scores"][key]["interval"] == row["cells"][0]["scores"][key]["none"]["interval"]
        assert row["scores"][key]["over"] == "pictures"
    avg = row["scores"]["avg"]
    widths = np.array([np.ptp(row["scores"][key]["interval"]) for key in AVERAGED])
    # Benchmarks are drawn independently: variances add. Of a dozen pictures the distributions are lumpy, hence 30 %.
    assert np.ptp(avg["interval"]) == pytest.approx(math.sqrt((widths**2).sum()) / 6, rel=0.3)
    assert avg["over"] == "pictures" and avg["interval"][0] < avg["mean"] < avg["interval"][1]


def test_sizes_and_speed(told) -> None:
    row = row_of(told, "2")
    net = meta_model(composed("table7", "2", Path("none")).cfg.model.module)
    assert (row["image_tokens"], row["projector_parameters"]) == (net.image_tokens, count_parts(net)["projector"])
    assert [row["image_tokens"] for row in told["rows"]] == [64, 16, 64, 16, 16, 16, 16]
    assert row["seconds"] == 40 and row["samples_per_second"] == 120 / 40  # one epoch of 60 samples a stage


def test_what_is_not_there_is_told_by_its_state(told) -> None:
    assert [[cell["state"] for cell in row["cells"]] for row in told["rows"]] == [
        ["done"] * 3, ["done"] * 3, ["done"] * 3, ["done", "done", "failed"], ["missing"] * 3, ["done", "running", "killed"],
        ["done", "missing", "missing"],
    ]  # fmt: skip
    assert row_of(told, "4")["cells"][2]["error"] == "error: no room [/tmp]"
    assert row_of(told, "6")["cells"][2]["error"] == "by SIGKILL", "though it died before it had a configuration"
    missing = row_of(told, "5")
    assert all(score["mean"] is None for score in missing["scores"].values()) and missing["seconds"] is None
    head, lines = sheet.grid(told)
    ours = {cells[0][0]: dict(zip(head, cells, strict=True)) for kind, cells in lines if kind == "ours"}
    for name in ("GQA", "MMB-dev", "Avg", "Avg blind", "samples/s", "time"):
        assert ours["5"][name] == ("missing", "")
    assert [ours[row]["seeds"][0] for row in "1234567"] == [f"{n} of 3" for n in (3, 3, 3, 2, 0, 1, 1)]


def test_rows_that_are_alike_do_not_differ(told) -> None:
    for pair in (pair_of(told, "2"), pair_of(told, "7")):
        for entry in (*pair["benchmarks"].values(), pair["avg"]):
            assert (entry["difference"], entry["interval"], entry["p"], entry["verdict"]) == (0, [0, 0], 1, "n.s.")
    assert pair_of(told, "2")["avg"]["seeds_interval"] == [0, 0] and pair_of(told, "7")["avg"]["seeds_interval"] is None


def test_rows_that_leave_things_out_have_what_all_others_have(tmp_path, monkeypatch) -> None:
    """What changes from one to the next is what really does: a row without a projector has the default."""
    page = "title: t [lora]\npublished: null\ncells:\n  a: {projector: ldpv2, strategy: lora}\n  b: {data: v1}\n"
    (tmp_path / "sparse.yaml").write_text(page)
    monkeypatch.setattr(sweep, "SWEEPS", tmp_path)
    for row in "ab":
        (tmp_path / "runs" / composed("sparse", row, tmp_path / "runs").name).mkdir(parents=True)
    (report,) = table.tables("sparse", model="nano", runs=tmp_path / "runs", draws=10)
    assert report["pairs"][0]["changes"] == {"strategy": ["lora", "unfreeze_llm"], "data": ["v2", "v1"]}
    assert [row["sets"]["projector"] for row in report["rows"]] == ["ldpv2", "ldpv2"]
    console = Console(file=io.StringIO(), width=100)
    sheet.show(report, console)
    assert "t [lora]" in console.file.getvalue()


def test_right_against_wrong_differs_on_the_seeds_that_both_have(told) -> None:
    pair = pair_of(told, "4")
    assert pair["seeds"] == [0, 1] and pair["changes"] == {"projector": ["pw2", "ldpv1"]}
    avg = pair["avg"]
    assert (avg["a"], avg["b"], avg["difference"], avg["differences"]) == (100, 0, -100, [-100, -100])
    assert avg["seeds_interval"] == pair["benchmarks"]["gqa"]["interval"] == [-100, -100] and avg["p"] == 1 / (
        DRAWS + 1
    )
    # Whatever pictures are drawn. 1e-9: MME's categories are averaged as floats.
    assert avg["interval"] == pytest.approx([-100, -100], abs=1e-9)
    assert avg["verdict"] == f"p = {avg['p_holm']:.3f}" and avg["p"] < avg["p_holm"] < 0.05
    # POPE has two pictures here, and exchanging both or none of them leaves the difference as it is: half of all exchanges.
    pope = pair["benchmarks"]["pope"]
    assert pope["pictures"] == 2 and pope["p"] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / DRAWS))
    assert (pope["difference"], pope["verdict"]) == (-100, "n.s.")


def test_holms_family_is_the_whole_table(told) -> None:
    entries = [entry for pair in told["pairs"] for entry in (*pair["benchmarks"].values(), pair["avg"]) if entry]
    assert told["tests"] == len(entries) == 4 * 7, "rows 5 and 6 have no neighbour above to compare with"
    adjusted = report.holm({str(n): entry["p"] for n, entry in enumerate(entries)})
    assert [entry["p_holm"] for entry in entries] == [adjusted[str(n)] for n in range(28)]
    for lower in "56":
        assert pair_of(told, lower)["seeds"] == [] and pair_of(told, lower)["avg"] is None
    lines = sheet.caption_of_pairs(told)
    (left_out,) = [line for line in lines if line.startswith("5 - 4, 6 - 5: not compared, for no seed")]
    assert lines[1].startswith("28 tests were made")
    apart = told | {"tests": 0, "pairs": [pair_of(told, lower) for lower in "56"]}
    assert sheet.caption_of_pairs(apart) == [left_out], "of no test nothing else is told"


def test_a_difference_that_seeds_do_not_bear_out_is_not_called_one() -> None:
    entry = {"p_holm": 0.01, "seeds_interval": [-0.1, 3.0]}
    assert table.verdict(entry) == "n.s. over seeds"
    assert (
        table.verdict(entry | {"seeds_interval": [0.1, 3.0]})
        == table.verdict(entry | {"seeds_interval": None})
        == "p = 0.010"
    )
    assert table.verdict(entry | {"p_holm": 0.05}) == "n.s." and table.verdict({"seeds_interval": None}) == "not tested"


def test_several_seeds_are_drawn_and_exchanged_together() -> None:
    """F1, which is no mean, of two seeds a side on seven pictures: against drawing each seed alone, and against all 128 exchanges."""
    draw = np.random.default_rng(3)

    def f1(sums: np.ndarray) -> np.ndarray:
        return 200 * sums[:, 0] / (sums[:, 0] + sums[:, 1])

    upper, lower = ([Sums.of(draw.integers(1, 5, (7, 2)), range(7), f1) for _ in range(2)] for _ in range(2))
    sides = report.together(upper), report.together(lower)
    value = lambda sums: float(sums.value(sums.by_picture.sum(0)[None])[0])  # noqa: E731
    difference = value(sides[1]) - value(sides[0])
    assert difference == pytest.approx(fmean(value(b) - value(a) for a, b in zip(upper, lower, strict=True)))
    alone = [report.bootstrapped(a, b, np.random.default_rng(0), 50) for a, b in zip(upper, lower, strict=True)]
    assert report.bootstrapped(*sides, np.random.default_rng(0), 50) == pytest.approx(np.mean(alone, 0)), (
        "the same pictures"
    )
    every = []
    for swap in product((0, 1), repeat=7):
        swapped = np.array(swap, bool)[:, None]
        apart = []
        for a, b in zip(upper, lower, strict=True):
            one, two = np.where(swapped, b.by_picture, a.by_picture), np.where(swapped, a.by_picture, b.by_picture)
            apart.append(f1(two.sum(0)[None])[0] - f1(one.sum(0)[None])[0])
        every.append(fmean(apart))
    exact = np.mean(np.abs(every) >= abs(difference) - 1e-9)
    p = report.p_value(difference, report.exchanged(*sides, np.random.default_rng(0)))
    # Four standard errors of a share of 10,000 draws, and the one that is added.
    assert 0.02 < exact < 0.98 and p == pytest.approx(
        exact, abs=4 * math.sqrt(exact * (1 - exact) / report.DRAWS) + 1e-4
    )


# -- beside the paper


def test_the_papers_values_stand_beside_as_printed_and_its_slip_is_told(told) -> None:
    printed = OmegaConf.to_container(OmegaConf.load(table.PUBLISHED))["table7"]
    assert [row["paper"] for row in told["rows"]] == printed
    head, lines = sheet.grid(told)
    theirs = [dict(zip(head, cells, strict=True)) for kind, cells in lines if kind == "theirs"]
    for line, paper in zip(theirs, printed, strict=True):
        assert line["row"][0] == "paper, 1.7b"
        for column in ("GQA", "SQA-I", "VQA-T", "POPE", "MME-P", "MMB-dev", "Avg"):
            assert line[column] == (f"{paper[column]:.1f}", "")
        assert (line["tokens"][0], line["params (M)"][0]) == (str(paper["Tokens"]), f"{paper['Params']:.2f}")
    assert any("row 5, the six cells average 63.42, not 63.2" in line for line in sheet.caption(told))


@pytest.fixture(scope="module")
def saved(told, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the table's files."""
    return sheet.save(told, tmp_path_factory.mktemp("saved") / "out").parent


def test_nobody_can_take_nano_for_the_paper(told, saved: Path) -> None:
    said = sheet.warning(told)
    assert "the model is nano and not 1.7b" in said and "the benchmarks are generated" in said
    page = (saved / "index.html").read_text()
    texts = {name: (saved / name).read_text() for name in ("table.md", "table.tex")}
    assert said in texts["table.md"] and sheet.tex(said) in texts["table.tex"] and page.count('class="warning"') == 1
    assert (
        page.count("not the paper&#x27;s numbers") + page.count("not the paper's numbers") == page.count("<svg") == 5
    ), "in each plot"
    rows = list(csv.DictReader(io.StringIO((saved / "table.csv").read_text())))
    assert {(row["model"], row["benchmarks"]) for row in rows} == {
        ("nano", "generated pocket benchmarks"),
        ("nano", "no scores"),
    }


@pytest.mark.parametrize(
    "change, why",
    [
        ({}, []),
        ({"protocol": "harness"}, ["the protocol is harness, not the paper's"]),
        ({"overrides": ["recipe.max_length=512", "trainer=cpu"]}, ["trained with recipe.max_length=512"]),
        ({"published": None, "protocol": "harness"}, []),
    ],
)
def test_the_papers_own_models_on_the_published_files_may_be_compared(change: dict, why: list[str]) -> None:
    cell = {"scores": {"gqa": {}}, "generated": False, "files": {"gqa": "12,578 (testdev-balanced)"}}
    like = {"published": "table7", "protocol": "paper", "overrides": []}
    like["rows"] = [{"model": "1.7b", "paper_model": "1.7b", "cells": [cell]}]
    assert table.unlike_the_paper(like | change) == why
    cell["files"]["gqa"] = "40 (no published version)"
    assert table.unlike_the_paper(like) == ["benchmark files are of no published version"]


# -- the files


def test_csv_and_json_hold_the_same_numbers(told) -> None:
    rows = list(csv.DictReader(io.StringIO(sheet.sheet(told))))
    assert [row["row"] for row in rows] == [row["row"] for row in told["rows"]]
    for line, row in zip(rows, told["rows"], strict=True):
        assert "" not in line.values(), "a word says why there is no number"
        for key, score in row["scores"].items():  # noqa: F402
            name, times = sheet.HEADS[key], 20 if key == "mme" else 1
            if score["mean"] is None:
                assert line[name] == line[f"{name} low"] == "missing"
                continue
            assert float(line[name]) == times * score["mean"]
            if score["interval"]:
                assert [float(line[f"{name} low"]), float(line[f"{name} high"])] == [
                    times * end for end in score["interval"]
                ]
        assert (
            float(line["paper's MME-P"]) == row["paper"]["MME-P"] and float(line["paper's Avg"]) == row["paper"]["Avg"]
        )


def untex(text: str) -> str:
    """What `sheet.tex` made, read back."""
    back = {made: letter for letter, made in sheet.TEX.items()}
    return re.sub("|".join(map(re.escape, sorted(back, key=len, reverse=True))), lambda found: back[found[0]], text)


def test_latex_holds_the_same_table(told) -> None:
    text = sheet.latex(told)
    body = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0].splitlines()
    head, lines = sheet.grid(told)
    assert len(body) == len(lines) == 14 and f"{{{'l' * 3}{'r' * (len(head) - 3)}}}" in text
    for line, (kind, cells) in zip(body, lines, strict=True):
        assert line.endswith(r" \\")
        found = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
        if kind == "theirs":
            found = [re.fullmatch(r"(?:\\textcolor\{gray\}\{(.*)\})?", cell)[1] or "" for cell in found]
        read = [re.fullmatch(r"(.*?)(?: \{\\scriptsize (.*)\})?", cell).groups("") for cell in found]
        assert [(untex(value), untex(spread)) for value, spread in read] == cells
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}") and not re.search(
        r"(?<!\\)[&%#](?! )", plain.replace("% Needs", "").replace("{!}{%", "")
    )
    assert untex(sheet.tex(r"a_b & 50 % {x} [y] ~^ \ $#")) == r"a_b & 50 % {x} [y] ~^ \ $#"


def test_markdown_holds_the_same_table(told) -> None:
    text = sheet.markdown(told)
    head, lines = sheet.grid(told)
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [1-7] \| \[", line)]
    ours = [[" ".join(filter(None, cell)) for cell in cells] for kind, cells in lines if kind == "ours"]
    assert found == ours and f"| {' | '.join(head)} |" in text
    assert "| 4 - 3 | projector pw2 → ldpv1 |" in text and re.search(
        r"-100\.0 \[-100\.0, -100\.0\] seeds \[-100\.0, -100\.0\] p = 0\.0\d\d \|", text
    )
    assert "one seed: training noise not included" in text


def test_the_page_is_one_file_with_links_to_its_cells(told, saved: Path) -> None:
    page = (saved / "index.html").read_text()
    assert "http" not in page and "src=" not in page
    links = re.findall(r'href="([^"#]+)"', page)
    assert len(links) == 13 and all((saved / link).read_text() == "the cell's own page" for link in links)
    assert "error: no room [/tmp]" in page and "by SIGKILL" in page
    assert page.count("<b>-100.0</b>") == 1, "of row 4 against 3 Avg alone is significant"
    kept = json.loads((saved / "table.json").read_text())
    assert kept == {**told, "caption": [*sheet.caption(told), *sheet.caption_of_pairs(told)]}


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_it_whole(told, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    sheet.show(told, console)
    text = console.file.getvalue()
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    lines = text.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["5"])
    assert row.split().count("missing") == (8 if width == 80 else 11)
    assert any(line.split() == ["seed", "2:", "failed", "error:", "no", "room", "[/tmp]"] for line in lines)
    assert any(
        re.match(r"Avg of 4 - 3: -100\.0 \[-100\.0, -100\.0\]  p = 0\.0\d\d  \(over seeds", line) for line in lines
    )
    assert any(
        line.split()[0:1] == ["paper"] and "59.3   65.0   53.1   84.0" in re.sub(" +", "   ", line) for line in lines
    )


# -- which runs


@pytest.fixture
def nano(nano_cache: Path, monkeypatch):
    monkeypatch.setenv("MVLM_CACHE", str(nano_cache))


def test_one_benchmark_alone_and_two_tables_by_the_script(nano, train, tmp_path: Path, monkeypatch, capsys) -> None:
    """Without the other five there is no Avg, and all that is there is shown; two tables go into two folders."""
    pages = {
        "both": {"sweeps": ["table6", "own"]},
        "table6": {"title": "Data", "published": "table6", "cells": {r: Sweep.read("table6")[0].rows[r] for r in ("(a)", "(b)")}},
        "own": {"title": "Mine", "published": None, "cells": {"x": {"projector": "ldpv1", "data": "v1", "strategy": "freeze_llm"}}},
    }  # fmt: skip
    train(composed("table6", "(a)", tmp_path / "runs"), "all", ("pope",))
    train(composed("table6", "(b)", tmp_path / "runs"), "every second", ("pope",))
    monkeypatch.setattr("mvlm.sweep.SWEEPS", tmp_path)
    for name, page in pages.items():
        OmegaConf.save(page, tmp_path / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "sweep=both", "model=nano", 'overrides=["benchmark=[pope]"]'])
    runpy.run_path(str(ROOT / "report.py"), run_name="__main__")
    assert "1 of 6" in capsys.readouterr().out
    folder = tmp_path / "report" / "both-nano"
    six, own = (json.loads((folder / name / "table.json").read_text()) for name in ("table6", "own"))
    score = row_of(six, "(a)")["scores"]
    assert (score["pope"]["mean"], score["avg"]["mean"], score["gqa"]["mean"]) == (100, None, None)
    head, lines = sheet.grid(six)
    ours = dict(zip(head, lines[0][1], strict=True))
    assert (ours["POPE"], ours["GQA"], ours["Avg"]) == (("100.0", "± 0.0†"), ("not scored", ""), ("1 of 6 scored", ""))
    (pair,) = six["pairs"]
    assert pair["avg"] is None and pair["benchmarks"]["pope"]["difference"] < 0
    assert "No row has Avg yet" in (folder / "table6" / "index.html").read_text()
    assert six["unlike_the_paper"][-1].startswith("the benchmarks are generated"), (
        "which are asked is no other training"
    )
    assert row_of(own, "x")["scores"] == score, "the same cell as Table 6's first"
    head, lines = sheet.grid(own)
    assert own["unlike_the_paper"] == [] and [kind for kind, _ in lines] == ["ours"], "the paper has no such table"
    assert head[:4] == ["row", "projector", "data", "strategy"] and "paper" not in sheet.markdown(own).replace(
        "protocol paper", ""
    )


def test_the_seeds_are_those_on_the_disk_or_those_that_are_asked_for(nano, train, tmp_path: Path) -> None:
    words = ["model=nano", "recipe.max_length=512"]
    for row, seed in (("(a)", 4), ("(b)", 1)):
        begin(composed("table6", row, tmp_path, seed, words[-1]))
    begin(composed("table6", "(c)", tmp_path, 2))  # trained without these words
    (swept,) = Sweep.read("table6")
    found = table.find(swept, words, tmp_path, None)
    assert [[(seed, cell.state()) for seed, cell in some.items()] for some in found.values()] == [
        [(1, "missing"), (4, "unfinished")], [(1, "unfinished"), (4, "missing")], [(1, "missing"), (4, "missing")],
    ]  # fmt: skip
    assert all(list(some) == [0, 1] for some in table.find(swept, words, tmp_path, 2).values())


def test_other_questions_and_another_configuration_are_told(nano, train, tmp_path: Path) -> None:
    a, b = (train(composed("table6", row, tmp_path), "all", ("pope",)) for row in ("(a)", "(b)"))
    results = b.run.results()
    results["questions"]["pope"]["sha256"] = "0"
    write_json(b.run.folder / "results.json", results)
    OmegaConf.save(OmegaConf.merge(a.run.config, {"recipe": {"max_length": 7}}), a.run.folder / "config.yaml")
    (found,) = table.tables("table6", model="nano", runs=tmp_path, draws=1)
    assert found["pairs"][0]["not_compared"] == {"pope": "the same ids, but other prompts, truths or pictures"}
    text = sheet.markdown(found)
    assert "POPE: the cells did not all answer the same questions" in text
    assert (
        f"Trained with another configuration than is composed now: {a.name}: recipe.max_length: 7 there, 2048 here."
        in text
    )


def test_another_seed_is_what_would_be_composed(nano) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        zero, three = (Cell.composed(["model=nano", "recipe.max_length=512", f"seed={n}"]) for n in (0, 3))
    made = table.with_seed(zero, 3)
    assert (made.name, made.cfg, made.overrides) == (three.name, three.cfg, three.overrides) and re.fullmatch(
        r".*-s3-[0-9a-f]{6}", made.name
    )


@pytest.mark.parametrize(
    "sweep, words, told",
    [
        ("table7", ["projector=pw2"], "projector: the row table7 1 sets that itself"),
        ("table4", ["model=1.7b"], "model: the row table4 MobileVLM V2 1.7B sets that itself"),
        ("table7", ["seed=1"], "seed: not in overrides="),
        ("table7", ["runs=elsewhere"], "runs: not in overrides="),
        ("table7", ["recipe.max_lenght=3"], "did you mean 'recipe.max_length'"),
        ("table8", [], "there is no sweeps/table8.yaml; did you mean 'table"),
        ("table6", ["model=nano"], "train it, python train.py -m sweeps=table6 model=nano, or name the folder"),
    ],
)
def test_what_cannot_be_a_table_says_why(nano, tmp_path: Path, sweep: str, words: list[str], told: str) -> None:
    with pytest.raises(ValueError) as error:
        list(table.tables(sweep, runs=tmp_path, overrides=words))
    assert told in str(error.value)


@pytest.mark.parametrize("cfg", [{"sweep": None, "compare": []}, {"sweep": "table7", "compare": ["a", "b"]}])
def test_the_script_wants_a_table_or_two_runs(cfg: dict) -> None:
    main = runpy.run_path(str(ROOT / "report.py"))["main"]
    with pytest.raises(ValueError, match="name a table, sweep=table7, or two run folders"):
        main(OmegaConf.create(cfg))
