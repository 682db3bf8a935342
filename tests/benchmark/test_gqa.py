"""GQA's files, prompt and score; the golden predictions were scored by LLaVA's conversion and the GQA tool, and by
lmms-eval: every `lmms_eval_score` is matched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm.benchmark.gqa import GQA, agrees, converted

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "gqa.json").read_text())
DIFFERENT = json.loads((REFERENCE / "metrics" / "differences.json").read_text())[
    "cases_scored_differently_by_lmms_eval"
]
PREDICTIONS = {case["question_id"]: case["prediction"] for case in GOLDEN["cases"]}


def record(case: dict) -> dict:
    kind = "verify" if case["answer"] in ("yes", "no") else "query"
    return {k: case[k] for k in ("question", "answer")} | {"imageId": "n1", "types": {"structural": kind}}


@pytest.fixture
def benchmark(tmp_path) -> GQA:
    records = {case["question_id"]: record(case) for case in GOLDEN["cases"]}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(records))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "n1.jpg").touch()
    return GQA(tmp_path)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["question_id"])
def test_every_golden_answer_is_converted_and_judged_alike(case):
    assert converted(case["prediction"]) == case["converted"]
    assert agrees(case["prediction"], case["answer"]) == case["correct"]
    assert agrees(case["prediction"], case["answer"], "harness") == case["lmms_eval_score"]


def test_the_harness_differs_in_as_many_cases_as_counted_there(benchmark):
    harness = GQA(benchmark.folder, "harness").score(PREDICTIONS)
    assert harness.value == pytest.approx(100 * sum(c["lmms_eval_score"] for c in GOLDEN["cases"]) / GOLDEN["count"])
    paper = benchmark.score(PREDICTIONS)
    different = [key for key in PREDICTIONS if paper.per_question[key] != harness.per_question[key]]
    assert len(different) == DIFFERENT["gqa"]
    assert (paper.protocol, harness.protocol) == ("paper", "harness")


def test_the_golden_accuracies(benchmark):
    score = benchmark.score(PREDICTIONS)
    # Both are the same sums of integers divided once or twice: they may differ in the last bits only.
    assert score.value == pytest.approx(GOLDEN["accuracy"], abs=1e-9)
    assert score.detail == pytest.approx({"binary": GOLDEN["binary"], "open": GOLDEN["open"]}, abs=1e-9)
    assert score.items == GOLDEN["count"] and sum(score.per_question.values()) == sum(
        c["correct"] for c in GOLDEN["cases"]
    )


@pytest.mark.parametrize(("protocol", "limit"), [("paper", 128), ("harness", 16)])
def test_the_prompt_and_the_limit(benchmark, protocol, limit):
    question = GQA(benchmark.folder, protocol).questions()[0]
    assert GQA(benchmark.folder, protocol).max_new_tokens == limit
    assert question.text == "What is it?\nAnswer the question using a single word or phrase."
    assert question.image == benchmark.folder / "images" / "n1.jpg"


def test_bad_input(benchmark, tmp_path):
    with pytest.raises(ValueError, match=r"testdev_balanced_questions.json is missing.*GQA"):
        GQA(tmp_path / "nowhere").questions()
    with pytest.raises(ValueError, match="68 of 68 questions have no answer"):
        benchmark.score({})
    with pytest.raises(ValueError, match="1 of 1 pictures are missing"):
        (tmp_path / "images" / "n1.jpg").unlink()
        benchmark.questions()
    for other in ('[{"question": "?"}]', '{"1": {"question": "?", "answer": "a"}}', '{"1": "?"}'):
        (tmp_path / "testdev_balanced_questions.json").write_text(other)
        with pytest.raises(ValueError, match="laid out otherwise"):
            benchmark.questions()


def test_an_id_that_comes_twice_in_the_file_is_told(benchmark):
    path = benchmark.folder / "testdev_balanced_questions.json"
    one, two = list(PREDICTIONS)[:2]
    path.write_text(path.read_text().replace(f'"{two}"', f'"{one}"', 1))
    with pytest.raises(ValueError, match=rf"testdev_balanced_questions.json: '{one}' comes more than once"):
        benchmark.questions()


@pytest.mark.parametrize("protocol", ["paper", "harness"])
@pytest.mark.parametrize("answer", ["", "   ", "yes " * 2_500])
def test_empty_and_very_long_answers_are_wrong_and_no_error(benchmark, protocol, answer):
    assert GQA(benchmark.folder, protocol).score(dict.fromkeys(PREDICTIONS, answer)).value == 0
