"""Counts, choice and errors of a mixture of small text-only sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mvlm.data.dataset import LlavaDataset
from mvlm.data.held_out import hold_out
from mvlm.data.image import PictureError, Pictures
from mvlm.data.mixture import Mixture
from mvlm.data.prompt import template
from mvlm.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TOKENIZER = load_tokenizer(REFERENCE / "tokenizer")


@pytest.fixture
def source(tmp_path):
    def build(name, samples, images=None, shown=(), **options):
        turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This one."}]
        records = [{"id": f"{name}{k}", "conversations": turns} for k in range(samples)]
        for record, picture in zip(records, shown, strict=False):
            tagged = [{"from": "human", "value": "<image>\nWhich?"}, turns[1]]
            record |= {"image": picture, "conversations": tagged if picture else turns}
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        pictures = Pictures(14, "pad", (0, 0, 0), (1, 1, 1))
        file = tmp_path / f"{name}.json"
        return LlavaDataset(file, images, template("v1"), TOKENIZER, pictures, image_tokens=1, **options)

    return build


def ids(mixture):
    return [sample.id for sample in mixture]


def test_whole_sources(source):
    mixture = Mixture([source("a", 3), source("b", 2)])
    assert ids(mixture) == ["a0", "a1", "a2", "b0", "b1"]
    assert mixture.counts == {"a": 3, "b": 2}
    assert mixture.lengths.tolist() == [-3] * 5 and mixture.pictures_used == []
    assert [mixture.find(k)[1] for k in range(5)] == [0, 1, 2, 0, 1]


def test_samples_left_out(source):
    whole = Mixture([source("a", 5), source("b", 6), source("c", 2)])
    rest = whole.without(np.array([0, 4, 5, 11])).without(np.array([12]))
    left = [sample for k, sample in enumerate(ids(whole)) if k not in (0, 4, 5, 11, 12)]
    assert ids(rest) == left and len(rest) == len(rest.lengths) == 8
    assert rest.counts == {"a": 3, "b": 5, "c": 0} and whole.counts == {"a": 5, "b": 6, "c": 2}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), count=st.integers(0, 6))
def test_what_is_held_out_is_shown_by_no_other_sample(data, count, source, tmp_path):
    """Two sources with some pictures in common, which they name by other paths, for the second one's folder lies above."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    for k in range(9):
        Image.new("RGB", (2, 2)).save(tmp_path / f"pictures/{k}.png")
    shown = [data.draw(st.lists(st.integers(0, 8) | st.none(), min_size=24, max_size=24)) for _ in "ab"]
    pictures = [
        [None if k is None else f"{folder}{k}.png" for k in some]
        for folder, some in zip(("", "pictures/"), shown, strict=True)
    ]
    sources = [source("a", 24, tmp_path / "pictures", pictures[0]), source("b", 29, tmp_path, pictures[1])]
    mixture = Mixture(sources)
    rest, taken = hold_out(mixture, count)
    paths = [sample.picture for sample in taken]
    assert len(taken) != 1 and len(set(paths)) == len(taken) <= min(count, 53 // 8) and None not in paths

    def listed(mixture):
        found = map(mixture.find, range(len(mixture)))
        return [(dataset.record(place)["id"], dataset.picture(place)) for dataset, place in found]

    assert listed(rest) == [(name, path) for name, path in listed(mixture) if path not in paths]
    assert rest.pictures_used == [path for path in dict.fromkeys(path for _, path in listed(rest)) if path]
    assert len(rest) >= 53 - 53 // 4
    if taken:  # in turn, from the end of each source that has pictures
        last = {name[0]: path for name, path in listed(mixture) if path}
        assert paths[0] == next(iter(last.values()))


@pytest.mark.parametrize("pictures, left, held_out", [(160, 152, 8), (20, 120, 5), (8, 120, 2), (7, 160, 0)])
def test_few_pictures_with_many_questions_stay_to_be_trained_on(source, tmp_path, pictures, left, held_out):
    """At most 40 of 160 samples are kept back. Of 20 pictures each is shown by 8 of them, so 5; of 7 by 23, so none: two are the least."""
    for k in range(pictures):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{k}.png")
    mixture = Mixture([source("a", 160, tmp_path, [f"{k % pictures}.png" for k in range(160)])])
    rest, taken = hold_out(mixture, 8)
    assert (len(rest), len(taken)) == (left, held_out)


def test_where_most_is_text_the_few_pictures_stay_to_be_trained_on(source, tmp_path):
    """Of 60 texts and 15 pictures one could be kept back, which is no use; of 16 two are."""
    for k in range(16):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{k}.png")
    for pictures, taken in ((15, 0), (16, 2)):
        shown = [f"{k}.png" for k in range(pictures)]
        rest, held_out = hold_out(Mixture([source("a", 60 + pictures, tmp_path, shown)]), 8)
        assert len(held_out) == taken and (rest.lengths > 0).sum() == pictures - taken


def test_what_cannot_be_read_is_neither_held_out_nor_moved(source, tmp_path):
    """The last samples of a source are held out first: of these one picture is torn. Its sample stays in its place."""
    (tmp_path / "pictures").mkdir()
    for k in range(16):
        Image.new("RGB", (2, 2)).save(tmp_path / f"pictures/{k}.png")
    (tmp_path / "pictures/15.png").write_bytes(b"torn")
    mixture = Mixture([source("a", 16, tmp_path / "pictures", [f"{k}.png" for k in range(16)], on_bad_sample="skip")])
    rest, taken = hold_out(mixture, 2)
    assert [sample.id for sample in taken] == ["a14", "a13"]
    assert ids(rest) == [*(f"a{k}" for k in range(13)), "a15"] and rest[13].skipped.kind == "not a picture"
    stopping = Mixture([source("a", 16, tmp_path / "pictures", [f"{k}.png" for k in range(16)])])
    with pytest.raises(PictureError, match=r"record 15 \(id a15\)"):
        hold_out(stopping, 2)


def test_pictures_tried_before_training_are_counted(source, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    shown = ["x.png", None, "x.png", "x.png"]
    a = source("a", 6, tmp_path, shown, on_bad_sample="skip")
    mixture, path, error = Mixture([a]), str(tmp_path / "x.png"), PictureError("torn", "damaged picture")
    assert mixture.unreadable(path, error) == 3 and mixture.unreadable(str(tmp_path / "y.png"), error) == 0
    assert [(s.source, s.record, s.id, s.kind) for s in mixture.skipped] == [
        ("a", k, f"a{k}", "damaged picture") for k in (0, 2, 3)
    ]
    assert mixture.total == len(mixture) == 6
    with pytest.raises(PictureError, match=r"source a: .*a\.json, record 0 \(id a0\): torn\. Repair"):
        Mixture([source("a", 6, tmp_path, shown)]).unreadable(path, error)


def test_what_is_wrong_is_said(source):
    a = source("a", 4)
    with pytest.raises(ValueError, match="two datasets are called 'a'"):
        Mixture([a, a])
    with pytest.raises(ValueError, match="has no sample"):
        Mixture([])
    with pytest.raises(IndexError):
        Mixture([a])[4]
