"""POPE's files, prompt and score; the golden predictions were scored by LLaVA's evaluator, split by split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mvlm.benchmark.pope import POPE, SPLITS, f1, said

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "pope.json").read_text())


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


def test_the_golden_figures(benchmark):
    score = benchmark.score({f"{c['category']}/{c['question_id']}": c["prediction"] for c in GOLDEN["cases"]})
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
    assert f1(np.array(0), np.array(0), np.array(0)) == 0


def test_bad_input(benchmark, tmp_path):
    with pytest.raises(ValueError, match=r"coco_pope_random.json is missing.*POPE"):
        POPE(tmp_path / "nowhere").questions()
    for other in ('{"question_id": 1}', '[{"question_id": 1}]', "not json"):
        (tmp_path / "coco_pope_popular.json").write_text(other)
        with pytest.raises(ValueError, match=r"popular.json is laid out otherwise .line 1"):
            benchmark.questions()


def test_empty_and_very_long_answers(benchmark):
    # To the official parser an empty answer is a yes, and so is a long one without a no.
    expected = benchmark.score(all_saying("Yes")).value
    assert benchmark.score(all_saying("")).value == benchmark.score(all_saying("dog " * 50_000)).value == expected
    assert benchmark.score(all_saying("No")).value == 0
