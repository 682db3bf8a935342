"""Two runs compared: every test and interval against a second way to get it; what cannot be compared is named with its reason."""

from __future__ import annotations

import json
import math
import re
import runpy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from mvlm import report, score
from mvlm.benchmark.base import Sums
from mvlm.run import Run
from mvlm.score import collect

ROOT = Path(__file__).resolve().parents[1]


def mean(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[:, 0] / sums[:, 1]


def marks(values, pictures=None) -> Sums:
    """Sums of marks; a picture each if not said otherwise."""
    return Sums.of([(value, 1) for value in values], range(len(values)) if pictures is None else pictures, mean)


def test_mcnemar_against_published_numbers() -> None:
    # Approval ratings, 86 and 150 changed their minds (Agresti, Categorical Data Analysis, table 10.1); the exact p is that of the
    # R package exact2x2 for this table.
    assert report.mcnemar(86, 150) == pytest.approx(3.716e-05, rel=1e-3)
    assert report.mcnemar(5, 15) == pytest.approx(0.04139, abs=5e-6)  # R: binom.test(5, 20)
    assert report.mcnemar(0, 0) == report.mcnemar(7, 7) == 1


@pytest.mark.parametrize("fell", range(8))
def test_mcnemar_against_all_coins(fell: int) -> None:
    """Of all ways that seven coins may fall, the share that is at least as uneven."""
    uneven = [abs(2 * sum(coins) - 7) >= abs(2 * fell - 7) for coins in product((0, 1), repeat=7)]
    assert report.mcnemar(fell, 7 - fell) == pytest.approx(np.mean(uneven))


def test_exchanging_against_all_exchanges() -> None:
    """Soft marks on eight pictures of one to three questions: p by all 256 exchanges."""
    draw = np.random.default_rng(5)
    pictures = [picture for picture in range(8) for _ in range(1 + picture % 3)]
    one, two = draw.integers(4, size=(2, len(pictures))) / 3
    two = np.minimum(1, two + 0.5)
    a, b = marks(one, pictures), marks(two, pictures)
    difference = 100 * (two.mean() - one.mean())
    every = []
    for swap in product((False, True), repeat=8):
        swapped = np.array([swap[picture] for picture in pictures])
        every.append(100 * (np.where(swapped, one, two).mean() - np.where(swapped, two, one).mean()))
    exact = np.mean(np.abs(every) >= abs(difference) - 1e-9)
    assert 0.01 < exact < 0.5, "the example is neither clear nor void"
    p = report.p_value(difference, report.exchanged(a, b, np.random.default_rng(0)))
    # Four standard errors of a share of 10,000 draws, and the one that is added.
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / report.DRAWS) + 1e-4)


def test_exchanging_single_questions_is_mcnemars_test() -> None:
    one = [1] * 9 + [0] * 21 + [1] * 30  # 9 fall, 21 rise
    two = [0] * 9 + [1] * 21 + [1] * 30
    exact = report.mcnemar(9, 21)
    p = report.p_value(20, report.exchanged(marks(one), marks(two), np.random.default_rng(0)))
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / report.DRAWS) + 1e-4)


def test_more_questions_a_picture_are_no_more_evidence() -> None:
    """Every question asked ten times of its picture: the same interval and p. McNemar's test would be fooled, and is not used."""
    one, two = [1] * 6 + [0] * 14 + [1] * 30, [0] * 6 + [1] * 14 + [1] * 30
    once = marks(one), marks(two)
    often = [marks(np.repeat(values, 10), np.repeat(range(50), 10)) for values in (one, two)]
    for kind in (report.exchanged, report.bootstrapped):
        apart = [kind(*sums, np.random.default_rng(0)) for sums in (once, often)]
        assert apart[0] == pytest.approx(apart[1])
    assert report.mcnemar(60, 140) < 1e-7 < 0.1 < report.mcnemar(6, 14)


def test_the_interval_is_that_of_paired_differences() -> None:
    one = [1] * 60 + [0] * 100 + [1] * 840
    two = [0] * 60 + [1] * 100 + [1] * 840
    low, high = np.quantile(report.bootstrapped(marks(one), marks(two), np.random.default_rng(0)), [0.025, 0.975])
    half = 196 * math.sqrt((0.16 - 0.04**2) / 1000)  # normal, variance of a difference from its flips
    # A 2.5 % quantile of 10,000 draws is known to 2.7 % of a standard deviation of 1.26; four times that; steps are of 0.1.
    assert (low, high) == pytest.approx((4 - half, 4 + half), abs=0.15)


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_exchanged_answers_scored_by_the_benchmark_itself(scored, name: str) -> None:
    """F1 and points are no means: each exchange made on the answers and scored officially gives the difference computed from sums."""
    made = next(benchmark for benchmark in scored.found if benchmark.name == name)
    questions, draw = made.questions(), np.random.default_rng(1)
    one, two = ({q.id: str(draw.choice(["yes", "no"])) for q in questions} for _ in range(2))
    first, second = made.score(one), made.score(two)
    got = report.exchanged(first.sums, second.sums, np.random.default_rng(9), draws=5)
    assert second.value - first.value == pytest.approx(
        float(second.sums.value(second.sums.by_picture.sum(0)[None])[0]) - first.value
    )
    pictures = list(dict.fromkeys(q.image for q in questions))
    differ = (first.sums.by_picture != second.sums.by_picture).any(1)
    assert len(pictures) == len(differ)
    draw = np.random.default_rng(9)
    for difference in got:
        swap = np.zeros(len(pictures), int)
        swap[differ] = draw.integers(2, size=differ.sum())
        swapped = {q.id: bool(swap[pictures.index(q.image)]) for q in questions}
        a = {key: two[key] if swapped[key] else one[key] for key in one}
        b = {key: one[key] if swapped[key] else two[key] for key in one}
        assert difference == pytest.approx(made.score(b).value - made.score(a).value)


def test_holm_against_a_worked_example() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    adjusted = report.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


@pytest.fixture
def two(scored) -> tuple[Run, Run]:
    """A is right with every second question, B with every third: so flips of both kinds everywhere."""
    order = {}
    number = lambda q: order.setdefault((q.text, q.id), len(order))  # noqa: E731
    return scored("a", lambda q, _: number(q) % 2 == 0), scored("b", lambda q, _: number(q) % 3 == 0)


def test_two_runs(two, tmp_path, scored) -> None:
    sides = [report.Side.open(run.folder) for run in two]
    got, shown = report.compare(*sides)
    flips = 0
    for name, entry in got["benchmarks"].items():
        scores = [side.results["benchmarks"][name]["none"] for side in sides]
        before, after = (score["per_question"] for score in scores)
        assert entry["difference"] == scores[1]["value"] - scores[0]["value"]
        assert entry["fell"] == [key for key in before if before[key] > after[key]] != []
        assert entry["rose"] == [key for key in before if before[key] < after[key]] != []
        assert entry["interval"][0] <= entry["difference"] <= entry["interval"][1]
        assert entry["p"] <= entry["p_holm"] <= 1 and "note" not in entry
        flips += len(entry["fell"]) + len(entry["rose"])
    avg = got["avg"]
    assert avg["difference"] == pytest.approx(np.mean([e["difference"] for e in got["benchmarks"].values()]))
    # Benchmarks are drawn independently of one another: variances add. The widths are those of lumpy distributions, hence 20 %.
    widths = np.array([np.ptp(entry["interval"]) for entry in got["benchmarks"].values()])
    assert np.ptp(avg["interval"]) == pytest.approx(math.sqrt((widths**2).sum()) / 6, rel=0.2)
    assert got["tests"] == 7 and got["not_compared"] == {} and len(shown) == flips
    page = report.save(got, shown, tmp_path / "out").read_text()
    assert page.count("<li") == flips and "http" not in page
    sources = re.findall(r'src="(data:image/jpeg[^"]*)"', page)
    assert 6 <= len(sources) == len(set(sources)) < flips, "each picture once"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == got
    assert "| POPE |" in (tmp_path / "out" / "report.md").read_text()


def test_compared_with_itself_nothing_differs(two) -> None:
    side = report.Side.open(two[0].folder)
    got, shown = report.compare(side, side)
    assert shown == [] and got["avg"]["difference"] == 0
    assert all(entry["p"] == 1 and entry["interval"] == [0, 0] for entry in got["benchmarks"].values())


def test_results_alone_suffice_for_means(two, tmp_path) -> None:
    """Without answers: the same figures where the score is a mean of marks; POPE and MME say what is missing."""
    whole, _ = report.compare(*(report.Side.open(run.folder) for run in two))
    for name, run in zip("ab", two, strict=True):
        (tmp_path / f"{name}.json").write_text((run.folder / "results.json").read_text())
    got, shown = report.compare(report.Side.open(tmp_path / "a.json"), report.Side.open(tmp_path / "b.json"))
    assert shown == [] and got["avg"] is None and got["tests"] == 4
    for name, entry in got["benchmarks"].items():
        assert "is missing" in entry["note"]
        if name in ("pope", "mme"):
            assert "p" not in entry and "without interval and test" in entry["note"]
        else:
            assert {k: entry[k] for k in ("interval", "p", "test")} == {
                k: whole["benchmarks"][name][k] for k in ("interval", "p", "test")
            }
    assert any("without interval" in line for line in report.caption(got))


def side(change=lambda results: None) -> report.Side:
    """Results of one benchmark, changed."""
    score = {"value": 50.0, "interval": [0.0, 100.0], "protocol": "paper", "per_question": {"1": 1.0, "2": 0.0}}
    score |= {"limit": 128, "cut_at": None}
    questions = {"gqa": {"sha256": "a", "pictures": {"1": 0, "2": 1}}}
    results = {"protocol": "paper", "corpus": "here", "benchmarks": {"gqa": {"none": score}}, "questions": questions}
    results["settings"] = {"gqa": {"order": "CQM"}}
    change(results)
    return report.Side(Path("results.json"), results)


def forget(results: dict) -> None:
    del results["questions"]
    results["corpus"] = "elsewhere"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda r: r["benchmarks"]["gqa"]["none"].update(protocol="mine"), "protocol paper in A, mine in B"),
        (lambda r: r["benchmarks"].pop("gqa"), "B has no score of it"),
        (lambda r: r["benchmarks"]["gqa"].pop("none"), "B has no answers of the view 'none'"),
        (lambda r: r["benchmarks"]["gqa"]["none"]["per_question"].update(more=1.0), "2 in A, 3 in B, 2 in both"),
        (lambda r: r["questions"]["gqa"].update(sha256="0"), "the same ids, but other prompts, truths or pictures"),
        (lambda r: r.update(settings={"gqa": {"order": "QCM"}}), "asked in other ways: order=CQM in A, QCM in B"),
        (lambda r: r["benchmarks"]["gqa"]["none"].update(limit=8, cut_at=8), "answers of B were cut off at 8 tokens"),
        (forget, "no hash of them is recorded, and A has here, B elsewhere"),
    ],
)
def test_what_cannot_be_compared_says_why(change, told: str) -> None:
    assert report.unlike(side(), side(), "gqa", "none") == ""
    with pytest.raises(ValueError, match="no benchmark that can be compared:\n  gqa: ") as error:
        report.compare(side(), side(change))
    assert told in str(error.value)


def test_answers_that_are_not_those_scored_are_noticed(two) -> None:
    sides = [report.Side.open(run.folder) for run in two]
    file = two[1].folder / "answers" / "gqa.jsonl"
    file.write_text(
        file.read_text().replace('"text": "neither"', '"text": "either"').replace('"text": "yes"', '"text": "no"')
    )
    sides[1].results["benchmarks"]["gqa"]["none"]["value"] += 1
    entry = report.compare(*sides)[0]["benchmarks"]["gqa"]
    assert "evaluate again" in entry["note"]


def test_whose_scores_are_compared(two) -> None:
    """Of a folder those of the protocol that is asked for; a file has its own."""
    folder = two[0].folder
    with pytest.raises(ValueError, match=r"results-harness\.json is missing"):
        report.Side.open(folder, "harness")
    (folder / "results-harness.json").write_text(json.dumps(side(lambda r: r.update(protocol="harness")).results))
    assert report.Side.open(folder, "harness").results["protocol"] == "harness"
    assert (
        report.Side.open(folder, "paper").results["protocol"] == "paper" == report.Side.open(folder).results["protocol"]
    )
    with pytest.raises(ValueError, match=r"has scores of protocol=harness, and protocol=paper is asked for"):
        report.Side.open(folder / "results-harness.json", "paper")


def test_a_benchmark_with_a_setting_of_its_own_is_read_as_it_was_asked(scored, monkeypatch) -> None:
    """Its questions hash otherwise by the page as it stands, and the answers would not be found to be theirs."""
    run = scored("q", lambda q, view: True)
    file = run.folder / "results.json"
    results = json.loads(file.read_text())
    results["settings"] = {"sqa": score.settings_of("sqa", {}) | {"order": "QCM"}}
    file.write_text(json.dumps(results))
    assert report.benchmark("sqa", results["corpus"], report.Side.open(run.folder)).order == "QCM"


def test_no_results_is_told_with_the_cure(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"results\.json is missing: score the run with python evaluate\.py"):
        report.Side.open(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no results\.json"):
        report.Side.open(tmp_path)


def test_the_stored_answers_of_every_view_are_collected(scored) -> None:
    run = scored("c", lambda q, view: view == "blind", ("blind",))
    results = json.loads((run.folder / "results.json").read_text())
    items = collect(results, scored.found, run.folder / "answers")
    assert {name: len(some) for name, some in items.items()} == {
        name: len(views["none"]["per_question"]) for name, views in results["benchmarks"].items()
    }
    assert all(item.outcome == "right with no picture" and not item.right for some in items.values() for item in some)


@pytest.mark.parametrize(
    ("compare", "view", "told"),
    [(["a"], "none", "name two run folders"), (["a", "b"], "seen", "view is none, blind or shuffled, not 'seen'")],
)
def test_the_script_refuses_what_it_cannot_compare(compare, view, told):
    main = runpy.run_path(str(ROOT / "report.py"))["main"]
    with pytest.raises(ValueError, match=told):
        main(OmegaConf.create({"compare": compare, "view": view}))
