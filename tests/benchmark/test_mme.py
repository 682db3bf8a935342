"""MME's files, prompts and score; the golden predictions were scored by MME's own tool, and by lmms-eval: every
`lmms_eval_parsed` and both sums are matched."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mvlm.benchmark.base import Question
from mvlm.benchmark.mme import MME, PERCEPTION, points, prompt, said

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "mme.json").read_text())
DIFFERENT = json.loads((REFERENCE / "metrics" / "differences.json").read_text())[
    "cases_scored_differently_by_lmms_eval"
]
APART = ("posters", "celebrity")
"""Written here as the official artwork or landmark are: pictures and questions in folders of their own."""


@pytest.fixture
def benchmark(tmp_path) -> MME:
    for case in GOLDEN["cases"]:
        folder = tmp_path / case["subtask"]
        images, texts = (
            (folder / "images", folder / "questions_answers_YN") if case["subtask"] in APART else (folder, folder)
        )
        for each in (images, texts):
            each.mkdir(parents=True, exist_ok=True)
        (images / f"{case['image']}{'.png' if case['subtask'] == 'OCR' else '.jpg'}").touch()
        with (texts / f"{case['image']}.txt").open("a") as file:
            file.write(f"{case['question']}\t{case['answer']}\n")
    return MME(tmp_path)


def predictions(answer: str | None = None) -> dict[str, str]:
    """By our ids; None for the golden ones."""
    seen: dict[str, int] = {}
    by_id = {}
    for case in GOLDEN["cases"]:
        key = f"{case['subtask']}/{case['image']}"
        seen[key] = seen.get(key, 0) + 1
        by_id[f"{key}/{seen[key]}"] = case["prediction"] if answer is None else answer
    return by_id


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['image']}-{case['answer']}")
def test_every_golden_answer_is_parsed_and_judged_alike(case):
    assert said(case["prediction"]) == case["parsed"]
    assert (said(case["prediction"]) == case["answer"].lower()) == case["correct"]
    assert said(case["prediction"], "harness") == case["lmms_eval_parsed"]


def test_the_harness_differs_in_as_many_cases_as_counted_there():
    assert sum(case["parsed"] != said(case["prediction"], "harness") for case in GOLDEN["cases"]) == DIFFERENT["mme"]


def all_points(protocol: str) -> dict[str, float]:
    sums = {name: np.zeros(4) for name in GOLDEN["subtasks"]}
    for one, two in zip(GOLDEN["cases"][::2], GOLDEN["cases"][1::2], strict=True):
        right = [said(case["prediction"], protocol) == case["answer"].lower() for case in (one, two)]
        sums[one["subtask"]] += [sum(right), 2, all(right), 1]
    return {name: float(points(some)) for name, some in sums.items()}


def test_the_golden_points_of_all_fourteen_categories():
    for name, ours in all_points("paper").items():
        assert ours == pytest.approx(GOLDEN["subtasks"][name]["score"], abs=1e-9)


def test_both_sums_of_the_harness(benchmark):
    by_name = all_points("harness")
    perception = sum(by_name[name] for name in PERCEPTION)
    assert perception == pytest.approx(GOLDEN["lmms_eval"]["perception"], abs=1e-9)
    assert sum(by_name.values()) - perception == pytest.approx(GOLDEN["lmms_eval"]["cognition"], abs=1e-9)
    score = MME(benchmark.folder, "harness").score(predictions())
    assert (score.unit_value, score.value) == pytest.approx((perception, perception / 20), abs=1e-9)


def test_the_golden_perception(benchmark):
    score = benchmark.score(predictions())
    assert score.unit_value == pytest.approx(GOLDEN["perception"], abs=1e-9)
    assert score.value == pytest.approx(GOLDEN["perception"] / 20, abs=1e-9)
    for category in PERCEPTION:
        assert score.detail[category] == pytest.approx(GOLDEN["subtasks"][category]["score"], abs=1e-9)
    other = sum(GOLDEN["subtasks"][category]["other"] for category in PERCEPTION)
    assert score.detail["count neither yes nor no"] == other
    assert score.interval[0] < score.value < score.interval[1]


def test_the_prompt_and_both_layouts(benchmark):
    questions = {q.id: q for q in benchmark.questions()}
    assert questions.keys() == {key for key in predictions() if key.split("/")[0] in PERCEPTION}
    question = questions["posters/posters_001/2"]
    assert question.text == "Is it no 1?\nAnswer the question using a single word or phrase."
    assert question.image == benchmark.folder / "posters" / "images" / "posters_001.jpg"
    assert questions["OCR/OCR_000/1"].image == benchmark.folder / "OCR" / "OCR_000.png"


def test_the_prompts_differ_only_where_the_closing_sentence_stands_oddly():
    ending = "\nAnswer the question using a single word or phrase."
    for question, paper, harness in (
        ("Is it? Please answer yes or no.", "Is it?", "Is it?"),
        ("Is it?Please answer yes or no.", "Is it?", "Is it?Please answer yes or no."),
        ("Say. Please answer yes or no. Is it?", "Say. Please answer yes or no. Is it?", "Say. Is it?"),
    ):
        assert (prompt(question), prompt(question, "harness")) == (paper + ending, harness + ending)
    assert (MME("").max_new_tokens, MME("", "harness").max_new_tokens) == (128, 16)


def test_bad_input(benchmark, tmp_path):
    with pytest.raises(ValueError, match=r"existence is missing.*MME"):
        MME(tmp_path / "nowhere").questions()
    text = tmp_path / "scene" / "scene_000.txt"
    for other in ("Is it?\tYes\n", "Is it? Yes\nIs it? No\n", "Is it?\tYes\nIs it?\tMaybe\n", ""):
        text.write_text(other)
        with pytest.raises(ValueError, match=r"scene_000\.txt is laid out otherwise"):
            benchmark.questions()
    for file in (tmp_path / "scene").glob("*.txt"):
        file.unlink()
    with pytest.raises(ValueError, match=r"scene holds no .txt"):
        benchmark.questions()


def test_a_missing_picture_is_named(benchmark, tmp_path):
    (tmp_path / "count" / "count_000.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 34 pictures are missing, the first is .*count_000\.jpg"):
        benchmark.questions()


def test_empty_very_long_and_all_right_answers(benchmark):
    for protocol in ("paper", "harness"):
        for answer in ("", "    ", "perhaps " * 1_250):
            score = MME(benchmark.folder, protocol).score(predictions(answer))
            assert (score.value, score.detail["count neither yes nor no"]) == (0, score.items)
    # Behind four spaces the paper's rule sees no yes; the harness strips them.
    assert benchmark.score(predictions("    Yes")).value == 0
    assert MME(benchmark.folder, "harness").score(predictions("    Yes")).unit_value == pytest.approx(500)
    # All yes: half of each category, and no picture with both right: 50 points a category.
    assert benchmark.score(predictions("Yes, " * 50_000)).unit_value == pytest.approx(500)
    truth = {q.id: q.truth for q in benchmark.questions()}
    assert benchmark.score(truth).unit_value == pytest.approx(2000)


def test_a_category_that_a_draw_misses_is_no_loss() -> None:
    """Two categories of one picture each, all right: every draw of pictures has the full score, whichever of them it holds."""
    questions = [
        Question(f"{group}/{n}", "Is it?", Path(f"{group}.png"), "yes", group)
        for group in ("existence", "count")
        for n in (1, 2)
    ]
    score = MME.marked(SimpleNamespace(protocol="paper"), questions, {q.id: "yes" for q in questions})
    assert score.unit_value == 400
    assert score.sums.value(np.array([[2, 2, 1, 1] + [0] * 36])) == pytest.approx(20)
