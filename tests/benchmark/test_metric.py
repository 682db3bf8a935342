"""The metric against the benchmark's own score, in one process and gathered from several; the part that is asked while training."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest
import torch

from mvlm.benchmark.base import Question
from mvlm.benchmark.evaluate import evaluate
from mvlm.benchmark.metric import BenchmarkMetric, part_of, validate
from mvlm.benchmark.mme import MME, PERCEPTION
from mvlm.benchmark.pope import POPE, SPLITS

GROUPS = ("a", "b")


@pytest.fixture
def pope(tmp_path) -> POPE:
    """Six questions in three splits about two pictures, in the official files."""
    (tmp_path / "val2014").mkdir()
    for split in SPLITS:
        lines = [
            {"question_id": k, "image": f"{k % 2}.jpg", "text": "Is it?", "label": ("yes", "no")[k % 2]}
            for k in range(4)
        ]
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    for k in range(2):
        (tmp_path / "val2014" / f"{k}.jpg").write_text(f"{k} picture")
    return POPE(tmp_path)


@pytest.fixture
def said(pope) -> dict[str, str]:
    """Answers of every kind: right, wrong, empty, and with the signs that JSON and a line must survive."""
    texts = ["yes", "no", "", 'No, "never"\n\u2028 \ud83d\ude00 nein', "yes"]
    return {q.id: texts[place % 5] for place, q in enumerate(pope.questions())}


def test_it_is_the_benchmarks_own_score(pope, said):
    metric, score = BenchmarkMetric(pope), pope.score(said)
    assert 0 < score.value < 100
    for key, text in said.items():
        metric.update([key], [text])
    # Exact: the same function of the same texts.
    assert {k: v.item() for k, v in metric.compute().items()} == {
        "value": score.value, "unit_value": score.unit_value, "items": 12,
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    metric.reset()
    metric.update([], [])
    with pytest.raises(ValueError, match="12 of 12 questions have no answer"):
        metric.compute()


@pytest.mark.parametrize("shares", [(9, 3), (12, 0)])
def test_processes_with_uneven_shares_get_the_score_of_all(pope, said, together, shares):
    """The second share is empty once: then its state has neither the others' length nor their type."""
    pairs = list(said.items())
    parts = [pairs[: shares[0]], pairs[shares[0] :]]

    def work(rank: int) -> dict[str, float]:
        metric = BenchmarkMetric(pope)
        for key, text in parts[rank] + pairs[:1]:  # the first question twice: a padded sampler
            if parts[rank]:
                metric.update([key], [text])
        found = {k: v.item() for k, v in metric.compute().items()}
        assert len(metric.said) == len(parts[rank] + pairs[:1]) * bool(parts[rank]), (
            "the own state is back after the sync"
        )
        return found

    score = pope.score(said)
    expected = {"value": score.value, "unit_value": score.unit_value, "items": 12}
    assert together(2, work, patience=60) == [expected, expected]


def test_a_question_answered_twice_counts_once_as_first_told(pope, said):
    metric = BenchmarkMetric(pope)
    metric.update(list(said), list(said.values()))
    metric.update(list(said), ["no" if text == "yes" else "yes" for text in said.values()])
    assert metric.compute()["value"].item() == pope.score(said).value


def test_a_part_is_scored_by_the_same_rules(pope, said):
    """Another way to the same: the official files cut down to the part."""
    metric = BenchmarkMetric(pope, items=4)
    ids = {q.id for q in metric.questions}
    assert 4 <= len(ids) < 12
    metric.update(list(ids), [said[key] for key in ids])
    part = {key: value.item() for key, value in metric.compute().items()}
    for split in SPLITS:
        path = pope.folder / f"coco_pope_{split}.json"
        lines = [line for line in path.read_text().split("\n") if any(_is(q, split, line) for q in metric.questions)]
        path.write_text("\n".join(lines))
    assert {q.id for q in pope.questions()} == ids
    assert part == {"value": pope.score(said).value, "unit_value": pope.score(said).unit_value, "items": len(ids)}


def _is(question: Question, split: str, line: str) -> bool:
    return question.group == split and question.id.split("/")[-1] == str(json.loads(line)["question_id"])


def make(pictures: int, asked: int, groups: int) -> list[Question]:
    return [
        Question(f"{p}.{n}", "?", f"{p}".encode(), None, f"g{p % groups}")
        for p in range(pictures)
        for n in range(asked)
    ]


def test_a_part_holds_whole_pictures_of_every_group():
    questions = make(pictures=60, asked=3, groups=7)
    for items in (1, 30, 100):
        part = part_of(questions, items)
        assert set(Counter(q.image for q in part).values()) == {3}
        assert {q.group for q in part} == {f"g{n}" for n in range(7)}
        assert max(items, 21) <= len(part) < max(items, 21) + 3
        assert part == [q for q in questions if q in part] == part_of(questions, items)
    assert part_of(questions, 30) != part_of(questions, 30, seed=1)
    assert part_of(questions, 1000) == questions
    texts = [Question(str(n), "?", None, None) for n in range(9)]
    assert len(part_of(texts, 4)) == 4, "without pictures they are drawn one by one"


def test_mmes_pairs_stay_together(tmp_path):
    for category in PERCEPTION:
        (tmp_path / category).mkdir()
        for k in range(3):
            (tmp_path / category / f"{k}.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
            (tmp_path / category / f"{k}.jpg").write_text("picture")
    metric = BenchmarkMetric(MME(tmp_path), items=30)
    assert len(metric.questions) == 30 and {q.group for q in metric.questions} == set(PERCEPTION)
    metric.update([q.id for q in metric.questions], [q.truth for q in metric.questions])
    assert metric.compute()["unit_value"].item() == 2000, "a part can have all points, too"


def test_validation_is_the_evaluation_of_the_part(tmp_path, pope, model, loop):
    """The same loop, the same scores as the whole evaluation where the part is everything; in training nothing is left changed."""
    model.train()
    model.vision.eval()  # a frozen part that its trainer keeps in eval mode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, features = torch.get_rng_state(), {}
    told = validate(model, [BenchmarkMetric(pope, items=1000)], features=features, max_new_tokens=3, **loop)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.language.training and not model.vision.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    results = evaluate(model, [pope], tmp_path / "answers", max_new_tokens=3, **loop)
    assert told == {"pope": results["benchmarks"]["pope"]["none"]["value"], "pope_items": 12}, "one of six: no average"
    model.vision.shown = 0
    assert validate(model, [BenchmarkMetric(pope)], features=features, max_new_tokens=3, **loop) == told
    assert model.vision.shown == 0, "a frozen tower's features are kept"
