"""POPE's files, prompt and score; the golden predictions were scored by LLaVA's evaluator, split by split, and by
lmms-eval, pooled: every `lmms_eval_score` and all of `lmms_eval_all` are matched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mvlm.benchmark.pope import POPE, SPLITS, f1, said

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "pope.json").read_text())
DIFFERENT = json.loads((REFERENCE / "metrics" / "differences.json").read_text())[
    "cases_scored_differently_by_lmms_eval"
]
PREDICTIONS = {f"{case['category']}/{case['question_id']}": case["prediction"] for case in GOLDEN["cases"]}


@pytest.fixture
def benchmark(tmp_path) -> POPE:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.jpg").touch()
    for split in SPLITS:
        lines = [
            {
                "question_id": c["question_id"],
                "image": "a.jpg",
                "text": "Is there a dog in the image?",
                "label": c["label"],
            }
            for c in GOLDEN["cases"]
            if c["category"] == split
        ]
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    return POPE(tmp_path)


def all_saying(answer: str) -> dict[str, str]:
    return {f"{case['category']}/{case['question_id']}": answer for case in GOLDEN["cases"]}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["question_id"]))
def test_every_golden_answer_is_parsed_and_judged_alike(case):
    assert said(case["prediction"]) == case["parsed"]
    assert (said(case["prediction"]) == case["label"]) == case["correct"]
    assert (said(case["prediction"], "harness") == case["label"]) == case["lmms_eval_score"]


def test_the_pooled_figures_of_the_harness(benchmark):
    score = POPE(benchmark.folder, "harness").score(PREDICTIONS)
    theirs = {key: 100 * value for key, value in GOLDEN["lmms_eval_all"].items()}
    assert score.value == pytest.approx(theirs["f1_score"], abs=1e-9)
    for ours, name in (
        ("f1", "f1_score"),
        ("accuracy", "accuracy"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("label yes ratio", "yes_ratio"),  # its function counts what is true, not what is said
    ):
        assert score.detail[f"all {ours}"] == pytest.approx(theirs[name], abs=1e-9)
    assert score.detail["count neither yes nor no"] == sum(said(p, "harness") == "other" for p in PREDICTIONS.values())
    assert score.interval[0] <= score.value <= score.interval[1]
    paper = benchmark.score(PREDICTIONS)
    different = [key for key in PREDICTIONS if paper.per_question[key] != score.per_question[key]]
    assert len(different) == DIFFERENT["pope"]


def test_pooled_and_mean_differ_when_splits_do(benchmark):
    right = {q.id: q.truth for q in benchmark.questions()}
    one_wrong = {key: "no" if key.startswith("random/") else truth for key, truth in right.items()}
    assert benchmark.score(one_wrong).value == pytest.approx(200 / 3)  # F1 of 0, 100 and 100
    splits = {case["category"]: 0 for case in GOLDEN["cases"]}
    for case in GOLDEN["cases"]:
        splits[case["category"]] += case["label"] == "yes"
    found, missed = splits["popular"] + splits["adversarial"], splits["random"]
    pooled = POPE(benchmark.folder, "harness").score(one_wrong)
    assert pooled.value == pytest.approx(200 * found / (2 * found + missed))
    assert pooled.detail["random f1"] == 0 and pooled.detail["popular f1"] == 100


def test_the_golden_figures(benchmark):
    score = benchmark.score(PREDICTIONS)
    assert score.value == pytest.approx(100 * GOLDEN["mean_f1"], abs=1e-9)
    for split in SPLITS:
        for ours, theirs in {"yes ratio": "yes_ratio"}.items() | {
            (k, k) for k in ("f1", "accuracy", "precision", "recall")
        }:
            assert score.detail[f"{split} {ours}"] == pytest.approx(
                100 * GOLDEN["per_category"][split][theirs], abs=1e-9
            )
    assert sum(score.per_question.values()) == sum(case["correct"] for case in GOLDEN["cases"])
    assert score.interval[0] <= score.value <= score.interval[1]


def test_the_same_id_in_three_splits_is_three_questions(benchmark, tmp_path):
    line = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"}
    for split in SPLITS:
        (tmp_path / f"coco_pope_{split}.json").write_text(json.dumps(line) + "\n")
    questions = benchmark.questions()
    assert [q.id for q in questions] == ["random/1", "popular/1", "adversarial/1"]
    assert questions[0].text == "Is there a cat in the image?\nAnswer the question using a single word or phrase."


def test_nothing_to_divide_by_is_zero():
    assert f1(np.zeros((2, 3))) == 0


def test_bad_input(benchmark, tmp_path):
    with pytest.raises(ValueError, match=r"coco_pope_random.json is missing.*POPE"):
        POPE(tmp_path / "nowhere").questions()
    path = tmp_path / "coco_pope_random.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match=r"question id 'random/\d+' comes more than once"):
        benchmark.questions()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"coco_pope_random.json is no text"):
        benchmark.questions()
    path.write_text("\n".join(lines))
    for other in ('{"question_id": 1}', '[{"question_id": 1}]', "not json"):
        (tmp_path / "coco_pope_popular.json").write_text(other)
        with pytest.raises(ValueError, match=r"popular.json is laid out otherwise .line 1"):
            benchmark.questions()


def test_empty_and_very_long_answers(benchmark):
    # To the official parser an empty answer is a yes, and so is a long one without a no.
    expected = benchmark.score(all_saying("Yes")).value
    # To the harness they are neither, and all wrong.
    harness = POPE(benchmark.folder, "harness")
    for answer in ("", "   ", "dog " * 2_500):
        assert benchmark.score(all_saying(answer)).value == expected
        score = harness.score(all_saying(answer))
        assert (score.value, score.detail["count neither yes nor no"]) == (0, len(PREDICTIONS))
    assert benchmark.score(all_saying("No")).value == harness.score(all_saying("No")).value == 0
    assert harness.score(all_saying(" YES\n")).value == pytest.approx(harness.score(all_saying("yes")).value)
