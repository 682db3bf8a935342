"""Intervals, protocols, published versions, and the words of an error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mvlm.benchmark.base import (
    Benchmark,
    Question,
    Sums,
    answered,
    mean_score,
    read_json,
    require_pictures,
)
from mvlm.benchmark.gqa import GQA
from mvlm.benchmark.mmbench import MMBench
from mvlm.benchmark.mme import MME, PERCEPTION
from mvlm.benchmark.pope import POPE
from mvlm.benchmark.sqa import SQA
from mvlm.benchmark.textvqa import TextVQA

SIX = (GQA, SQA, TextVQA, POPE, MME, MMBench)


class Five(Benchmark):
    """Five questions in two groups, of a set published with five, and once with three."""

    name, source = "five", "the moon"
    limits = {"paper": 7, "harness": 3}  # noqa: RUF012
    versions = {"whole": {"questions": 5, "x": 4}, "half": {"questions": 3}}  # noqa: RUF012
    count = 5

    def read(self):
        return [Question(str(k), "?", b"picture", "yes", "x" if k else "y") for k in range(self.count)]

    def marked(self, questions, predictions):
        marks = {q.id: float(predictions[q.id] == q.truth) for q in questions}
        return mean_score(marks, [q.image for q in questions], len(questions), {})


def test_a_score_names_its_protocol_and_the_published_version(tmp_path):
    said = {str(k): "yes" for k in range(9)}
    for protocol, limit in (("paper", 7), ("harness", 3)):
        five = Five(tmp_path, protocol, any_version=False)
        score = five.score(said)
        assert (score.protocol, score.official, five.max_new_tokens) == (protocol, "whole", limit)
    five.count = 3
    assert five.score(said).official == "half"
    five.count = 4
    told = r"it has 4 questions, 3 x, published is whole: 5 questions, 4 x; half: 3 questions.*any_version=true"
    with pytest.raises(ValueError, match=rf"another version of the moon: {told}"):
        five.questions()
    five.any_version = True
    assert five.score(said).official is None and five.score(said).as_dict()["official"] is None


@pytest.mark.parametrize("kind", SIX, ids=lambda kind: kind.name)
def test_all_six_know_both_protocols_and_refuse_others_by_name(kind, tmp_path):
    assert [kind(tmp_path, protocol).protocol for protocol in ("paper", "harness")] == ["paper", "harness"]
    with pytest.raises(ValueError, match=rf"protocol=harnes: {kind.name} knows paper, harness"):
        kind(tmp_path, "harnes")


def test_the_published_counts():
    # Sums that are told elsewhere: LLaVA's POPE file has 8,910 lines; MME has 2,374 questions, 260 of them cognition.
    assert [sum(known.values()) for known in POPE.versions.values()] == [8910, 9000]
    assert tuple(MME.versions["perception"]) == PERCEPTION
    assert sum(MME.versions["perception"].values()) == 2374 - 260
    assert all(kind.versions for kind in SIX)


def test_the_interval_of_a_proportion_is_the_binomial_one():
    # 300 right of 1,000, a picture each: normally distributed, 30 +- 196 * sqrt(0.3 * 0.7 / 1000) = 2.84 points.
    marks = {str(k): float(k < 300) for k in range(1000)}
    low, high = mean_score(marks, list(range(1000)), 1000, {}).interval
    half = 196 * math.sqrt(0.3 * 0.7 / 1000)
    # 1,000 resamples put each end within about 5 % of the half width (standard error of a 2.5 % quantile).
    assert low == pytest.approx(30 - half, abs=0.3)
    assert high == pytest.approx(30 + half, abs=0.3)


def test_questions_of_one_picture_count_as_one():
    # Ten questions a picture, all right or all wrong together: a hundred pictures' worth of evidence, not a thousand's.
    right = np.random.default_rng(3).random(100) < 0.5
    marks = {f"{p}/{q}": float(right[p]) for p in range(100) for q in range(10)}
    clustered = mean_score(marks, [p for p in range(100) for _ in range(10)], 1000, {}).interval
    single = mean_score(marks, list(range(1000)), 1000, {}).interval
    # The width grows by sqrt(10) = 3.16; each width is known to about 5 %.
    assert (clustered[1] - clustered[0]) / (single[1] - single[0]) == pytest.approx(math.sqrt(10), rel=0.15)


def test_the_interval_is_the_same_every_time():
    counts = [(k % 3 == 0, 1) for k in range(50)]
    once, twice = (Sums.of(counts, range(50), lambda s: s[:, 0] / s[:, 1]).interval() for _ in range(2))
    assert once == twice


def test_a_score_is_plain_json_types():
    score = mean_score({"a": 1.0, "b": 0.0}, ["p", "q"], 2, {"x": 1.0}).as_dict()
    assert score["protocol"] == "paper" and score["value"] == score["unit_value"] == 50
    assert isinstance(score["interval"], list)


def test_missing_things_are_named_with_their_origin(tmp_path):
    with pytest.raises(ValueError, match=r"x\.json is missing.*comes from the moon"):
        read_json(tmp_path / "x.json", "the moon")
    questions = [Question(str(k), "?", tmp_path / f"{k}.jpg", None) for k in range(3)]
    questions[0].image.touch()
    with pytest.raises(ValueError, match=r"2 of 3 pictures are missing, the first is .*1\.jpg.*the moon"):
        require_pictures(questions, "the moon")
    with pytest.raises(ValueError, match=r"'0' comes more than once, as do 0 others"):
        require_pictures([questions[0], questions[0]], "the moon")
    with pytest.raises(ValueError, match="no question was found"):
        require_pictures([], "the moon")
    with pytest.raises(ValueError, match="2 of 3 questions have no answer, the first is '1'"):
        answered(questions, {"0": ""})


def test_a_key_that_comes_twice_loses_no_question_silently(tmp_path):
    (tmp_path / "x.json").write_text('{"1": {"a": 1}, "2": {"a": 1}, "1": {"a": 2}}')
    with pytest.raises(ValueError, match=r"x.json: '1' comes more than once; take the unchanged file of the moon"):
        read_json(tmp_path / "x.json", "the moon")
    (tmp_path / "x.json").write_text('{"1": {"a": 1}, "2": {"a": 1}}')
    assert read_json(tmp_path / "x.json", "the moon") == {"1": {"a": 1}, "2": {"a": 1}}
    (tmp_path / "x.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"x.json is no text.*the moon"):
        read_json(tmp_path / "x.json", "the moon")


def test_broken_json_is_named_with_its_line(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1,\n"b" 2}')
    with pytest.raises(ValueError, match=r"x.json is not JSON.*line 2"):
        read_json(tmp_path / "x.json", "the moon")
