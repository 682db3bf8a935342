"""Intervals, and the words of an error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mvlm.benchmark.base import Question, answered, interval, mean_score, read_json, require_pictures


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
    once, twice = (interval(counts, range(50), lambda s: s[:, 0] / s[:, 1]) for _ in range(2))
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
    with pytest.raises(ValueError, match=r"'0' comes more than once"):
        require_pictures([questions[0], questions[0]], "the moon")
    with pytest.raises(ValueError, match="no question was found"):
        require_pictures([], "the moon")
    with pytest.raises(ValueError, match="2 of 3 questions have no answer, the first is '1'"):
        answered(questions, {"0": ""})


def test_broken_json_is_named_with_its_line(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1,\n"b" 2}')
    with pytest.raises(ValueError, match=r"x.json is not JSON.*line 2"):
        read_json(tmp_path / "x.json", "the moon")
