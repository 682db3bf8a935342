"""ScienceQA's files, prompt and score; the golden predictions were scored by LLaVA's evaluator, and by lmms-eval: every
`lmms_eval_score` is matched (those without an answer line, which the harness never sees, as an empty answer)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm.benchmark.sqa import FAILED, SQA, chosen, harness_prompt, parsed, prompt

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "scienceqa.json").read_text())
DIFFERENT = json.loads((REFERENCE / "metrics" / "differences.json").read_text())[
    "cases_scored_differently_by_lmms_eval"
]
# The evaluator counts a question as one with a picture if the tag is in the stored prompt, so only if it was answered.
SEEN = [case for case in GOLDEN["cases"] if case["counted_as_image"]]


@pytest.fixture
def benchmark(tmp_path) -> SQA:
    problems = {
        case["id"]: {k: case[k] for k in ("question", "choices", "answer")}
        | {"hint": "", "image": "image.png" if case["counted_as_image"] else None, "split": "test", "subject": "s"}
        for case in GOLDEN["cases"]
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1"], "test": list(problems)}))
    for case in SEEN:
        (tmp_path / "images" / "test" / case["id"]).mkdir(parents=True)
        (tmp_path / "images" / "test" / case["id"] / "image.png").touch()
    return SQA(tmp_path)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_every_golden_answer_is_parsed_and_judged_alike(case):
    letter = FAILED if case["prediction"] is None else parsed(case["prediction"])
    assert letter == case["parsed"]
    assert chosen(letter, len(case["choices"])) == case["predicted_index"]
    assert (chosen(letter, len(case["choices"])) == case["answer"]) == case["correct"]


def right_by_the_harness(case: dict) -> bool:
    return chosen(parsed(case["prediction"] or "", "harness"), len(case["choices"])) == case["answer"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_every_golden_answer_is_judged_as_by_the_harness(case):
    assert right_by_the_harness(case) == case["lmms_eval_score"]


def test_the_harness_differs_in_as_many_cases_as_counted_there(benchmark):
    assert sum(right_by_the_harness(case) != case["correct"] for case in GOLDEN["cases"]) == DIFFERENT["scienceqa"]
    score = SQA(benchmark.folder, "harness").score({case["id"]: case["prediction"] for case in SEEN})
    assert score.value == pytest.approx(100 * sum(case["lmms_eval_score"] for case in SEEN) / len(SEEN))


def test_the_golden_accuracy_on_pictures(benchmark):
    score = benchmark.score({case["id"]: case["prediction"] for case in SEEN})
    assert round(score.value, 2) == GOLDEN["image_accuracy"]  # two decimals is what the evaluator prints
    assert (score.items, sum(score.per_question.values())) == (GOLDEN["image_count"], GOLDEN["image_correct"])
    assert score.detail["count without a letter"] == sum(case["parsed"] == FAILED for case in SEEN)
    assert score.detail["s"] == score.value


def test_the_prompts_of_the_golden_run():
    runs = json.loads((REFERENCE / "eval_runs" / "expected.json").read_text())["ldpnetv2"]["sqa"]
    asked = {line["answer_line"]["question_id"]: line["answer_line"]["prompt"] for line in runs}
    for item in json.loads((REFERENCE / "eval_runs" / "sqa.json").read_text()):
        question, context, options = item["conversations"][0]["value"].replace("<image>", "").strip().split("\n")
        choices = [part.split(" ", 1)[1] for part in options.removeprefix("Options: (").split(" (")]
        problem = {"question": question, "hint": context.removeprefix("Context: "), "choices": choices}
        assert prompt(problem, "QCM") == asked[item["id"]].removeprefix("<image>\n")


def test_the_layout_of_the_official_question_file():
    problem = {"question": "Which  one?", "hint": "", "choices": ["a", "b"]}
    assert prompt(problem) == (
        "Context: N/A\nQuestion: Which one?\nOptions: (A) a (B) b\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_the_prompt_of_the_harness():
    problem = {"question": "Which  one?", "hint": "Look.", "choices": ["a", "b"]}
    asked = "Which  one?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly."
    assert harness_prompt(problem) == "Context: Look.\n" + asked
    assert harness_prompt(problem | {"hint": ""}) == asked


@pytest.mark.parametrize("protocol", ["paper", "harness"])
def test_only_questions_with_a_picture_are_asked(benchmark, protocol):
    assert {q.id for q in SQA(benchmark.folder, protocol).questions()} == {case["id"] for case in SEEN}


def test_pictures_are_cut_in_the_paper_alone(benchmark):
    harness = SQA(benchmark.folder, "harness")
    assert (benchmark.crops, harness.crops) == (True, False)
    assert (benchmark.max_new_tokens, harness.max_new_tokens) == (1024, 16)


def test_bad_input(benchmark, tmp_path):
    with pytest.raises(ValueError, match="order is CQM or QCM"):
        SQA(tmp_path, order="QMC")
    with pytest.raises(ValueError, match="order=QCM is for protocol=paper"):
        SQA(tmp_path, "harness", order="QCM")
    once = (tmp_path / "pid_splits.json").read_text()
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": [SEEN[0]["id"]] * 2}))
    with pytest.raises(ValueError, match=f"question id '{SEEN[0]['id']}' comes more than once"):
        benchmark.questions()
    (tmp_path / "pid_splits.json").write_text(once)
    with pytest.raises(ValueError, match=r"problems.json is missing.*ScienceQA"):
        SQA(tmp_path / "nowhere").questions()
    (tmp_path / "pid_splits.json").write_text('{"test": ["7"]}')
    with pytest.raises(ValueError, match=r"laid out otherwise.*'7'"):
        benchmark.questions()
    (tmp_path / "pid_splits.json").write_text('["7"]')
    with pytest.raises(ValueError, match="laid out otherwise"):
        benchmark.questions()


@pytest.mark.parametrize("protocol", ["paper", "harness"])
@pytest.mark.parametrize("answer", ["", "   ", "A" * 10_000, "The answer is A. " * 600, "The answer is " * 700])
def test_empty_and_very_long_answers_are_wrong_and_no_error(benchmark, protocol, answer):
    score = SQA(benchmark.folder, protocol).score({case["id"]: answer for case in SEEN})
    assert (score.value, score.detail["count without a letter"]) == (0, len(SEEN))


def test_files_of_one_content_are_one_picture(benchmark):
    """The interval draws whole pictures, and a picture asked about in several problems has a file in each."""
    for number, case in enumerate(SEEN):
        path = benchmark.folder / "images" / "test" / case["id"] / "image.png"
        path.write_bytes(bytes([number // 2]))
    score = benchmark.score({case["id"]: case["prediction"] or "" for case in SEEN})
    assert len(score.sums.by_picture) == (len(SEEN) + 1) // 2
    assert score.sums.by_picture[:, 1].max() == 2
