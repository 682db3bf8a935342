"""Counts, choice and errors of a mixture of small text-only sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm.data.dataset import LlavaDataset
from mvlm.data.image import Pictures
from mvlm.data.mixture import Mixture
from mvlm.data.prompt import template
from mvlm.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TOKENIZER = load_tokenizer(REFERENCE / "tokenizer")


@pytest.fixture
def source(tmp_path):
    def build(name, samples):
        turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This one."}]
        records = [{"id": f"{name}{k}", "conversations": turns} for k in range(samples)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        pictures = Pictures(14, "pad", (0, 0, 0), (1, 1, 1))
        return LlavaDataset(tmp_path / f"{name}.json", None, template("v1"), TOKENIZER, pictures, image_tokens=1)

    return build


def ids(mixture):
    return [sample.id for sample in mixture]


def test_whole_sources(source):
    mixture = Mixture([source("a", 3), source("b", 2)])
    assert ids(mixture) == ["a0", "a1", "a2", "b0", "b1"]
    assert mixture.counts == mixture.available == {"a": 3, "b": 2}
    assert mixture.lengths == [-3] * 5 and mixture.pictures_used == []
    assert [mixture.find(k)[1] for k in range(5)] == [0, 1, 2, 0, 1]


def test_a_choice_is_its_own(source):
    a, b = source("a", 50), source("b", 40)
    few, more = Mixture([a], {"a": 10}), Mixture([a, b], {"a": 20, "b": 0})
    assert few.counts == {"a": 10} and more.counts == {"a": 20, "b": 0}
    assert set(ids(few)) < set(ids(more))  # the smaller choice is a part of the larger, whatever is beside it
    assert ids(few) == ids(Mixture([a], {"a": 10})) != ids(Mixture([a], {"a": 10}, seed=1))
    assert len(set(ids(few))) == 10 and ids(few) != [f"a{k}" for k in range(10)]


def test_more_than_there_are(source):
    a = source("a", 4)
    with pytest.raises(ValueError, match=r"10 samples of 'a' are asked for, but there are 4: .* 3 times"):
        Mixture([a], {"a": 10})
    repeated = ids(Mixture([a], {"a": 10}, repeat=True))
    assert sorted(map(repeated.count, set(repeated))) == [2, 2, 3, 3]


def test_what_is_wrong_is_said(source):
    a = source("a", 4)
    with pytest.raises(ValueError, match="no source c in this mixture; there are a"):
        Mixture([a], {"c": 1})
    with pytest.raises(ValueError, match="two datasets are called 'a'"):
        Mixture([a, a])
    with pytest.raises(ValueError, match="has no sample"):
        Mixture([a], {"a": 0})
    with pytest.raises(ValueError, match="has no sample"):
        Mixture([])
    with pytest.raises(ValueError, match="-1 samples of 'a'"):
        Mixture([a], {"a": -1})
    with pytest.raises(IndexError):
        Mixture([a])[4]
