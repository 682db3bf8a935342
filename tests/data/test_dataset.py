"""Records to samples: against the reference's dataset, and one test an error."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from mvlm.batch import IMAGE_TOKEN
from mvlm.data.dataset import LlavaDataset, RecordError
from mvlm.data.image import PictureError, Pictures
from mvlm.data.prompt import template
from mvlm.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
BATCHES = {b["name"]: b for b in json.loads((REFERENCE / "text/batches.json").read_text())}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
TOKENIZER = load_tokenizer(REFERENCE / "tokenizer")


@pytest.fixture
def make(tmp_path):
    """A dataset of records, a picture a.png beside them."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 12), "red").save(tmp_path / "pictures/a.png")

    def build(records, version="v1", **options):
        file = tmp_path / "data.json"
        file.write_text(records if isinstance(records, str) else json.dumps(records))
        options = {
            "image_tokens": 2,
            "images": tmp_path / "pictures",
            "pictures": Pictures(14, "pad", **CLIP),
        } | options
        return LlavaDataset(file, template=template(version), tokenizer=TOKENIZER, **options)

    return build


def record(answer="A boat.", **fields):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return {"id": "x", "image": "a.png", "conversations": turns} | fields


TEXT = {"id": "t", "conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two of them."}]}


@pytest.mark.parametrize("name", BATCHES)
def test_samples_equal_the_reference(name, make):
    expected = BATCHES[name]
    dataset = make(
        expected["records"],
        expected["version"],
        images=REFERENCE / "images",
        pictures=Pictures(336, expected["image_aspect_ratio"], **CLIP),
        image_tokens=1,
        max_length=expected["model_max_length"],
    )
    assert dataset.lengths.tolist() == expected["modality_lengths"]
    for k, sample in enumerate(dataset[i] for i in range(len(dataset))):
        ids = expected["input_ids"][k]
        assert sample.input_ids == ids[: len(sample.input_ids)]
        assert set(ids[len(sample.input_ids) :]) <= {0}
        has_image = not expected["images_zero"][k]
        assert (dataset.picture(k) is not None) == has_image
        if IMAGE_TOKEN in sample.input_ids:
            digest = hashlib.sha256(sample.pixels.numpy().tobytes()).hexdigest()
            assert digest == expected["images_sha256"][k]
        else:  # text only, or its tag was cut off; the reference would send a picture that the text never uses
            assert sample.pixels is None


def test_a_sample(make, tmp_path):
    dataset = make([record(), TEXT], source="pets")
    first, second = dataset[0], dataset[1]
    assert (len(dataset), dataset.lengths.tolist()) == (2, [6, -5])
    assert (first.id, first.source, first.picture) == ("x", "pets", str(tmp_path / "pictures/a.png"))
    assert first.pixels.shape == (3, 14, 14) and first.features is None
    assert first.input_ids.count(IMAGE_TOKEN) == 2
    assert second.pixels is None and second.picture is None and IMAGE_TOKEN not in second.input_ids
    assert dataset.pictures_used == [first.picture]
    again = pickle.loads(pickle.dumps(dataset))[0]  # as workers that are spawned get it
    assert again.input_ids == first.input_ids and torch.equal(again.pixels, first.pixels)
    with pytest.raises(IndexError):
        dataset[2]
    assert len(list(dataset)) == 2


def test_features_take_the_place_of_pixels(make, tmp_path):
    features = {str(tmp_path / "pictures/a.png"): torch.ones(4, 8)}
    sample = make([record()], features=features)[0]
    assert sample.pixels is None and sample.features is features[sample.picture]


def test_a_cut_off_tag_takes_the_picture_with_it(make):
    long = record(conversations=[*TEXT["conversations"], *record()["conversations"]])
    assert make([long], max_length=200)[0].pixels is not None
    cut = make([long], max_length=130)[0]
    assert cut.pixels is None and IMAGE_TOKEN not in cut.input_ids and len(cut.input_ids) == 130


BAD = {
    "a record is an object": [],
    "no field `conversations`": {"id": "x"},
    "`conversations` must be a list of at least one turn": {"conversations": []},
    "turn 1 has no text in `from`": {"conversations": [{"value": "hi"}]},
    "turn 2 has no text in `value`": {"conversations": [TEXT["conversations"][0], {"from": "gpt", "value": 3}]},
    "turn 1 has 'system' in `from`": {"conversations": [{"from": "system", "value": "hi"}]},
    "turn 2 is a second one of 'human'": {"conversations": [TEXT["conversations"][0]] * 2},
    "surrogates not allowed": {"conversations": [{"from": "human", "value": "\ud800"}]},
    "picture .*b.png is missing": record(image="b.png"),
    "`image` is 7, not a path": record(image=7),
    "`image` is '', not a path": record(image=""),
    "`image` lists 2 pictures": record(image=["a.png", "a.png"]),
    r"turns \[1, 2\] each have an <image>": record("<image> too"),
    r"`image` '../a.png' leads out": record(image="../a.png"),
    r"`image` 'x/../../a.png' leads out": record(image="x/../../a.png"),
    r"`image` '/etc/passwd' leads out": record(image="/etc/passwd"),
    r"`image` is 'a\\x00.png', not a path": record(image="a\0.png"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_stops_or_is_skipped(reason, make, caplog):
    with pytest.raises(RecordError, match=rf"data\.json, record 1.*: .*{reason}"):
        make([TEXT, BAD[reason]])
    with caplog.at_level(logging.WARNING):
        dataset = make([TEXT, BAD[reason], record()], on_bad_sample="skip")
    assert [dataset[k].id for k in range(len(dataset))] == ["t", "x"]
    assert [s.record for s in dataset.skipped] == [1]
    assert "1 of 3 records skipped; the first is record 1" in caplog.text
    assert [dataset.record_number(k) for k in range(2)] == [0, 2]
    assert dataset.skipped[0].kind == ("missing" if "missing" in reason else "format")


def test_links(make, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere/c.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "pictures/link.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "pictures/folder")
    os.symlink(tmp_path / "pictures/a.png", tmp_path / "pictures/inside.png")
    assert make([record(image="inside.png")])[0].pixels is not None
    for name in ("link.png", "folder/c.png"):
        with pytest.raises(RecordError, match="a link that leads out of the image folder"):
            make([record(image=name)])
        assert make([record(image=name)], follow_links=True)[0].pixels is not None


def test_bad_files_are_said(make, tmp_path):
    with pytest.raises(ValueError, match=r"data\.json is not JSON: line 2, column 3"):
        make("[{},\n  oops]")
    with pytest.raises(ValueError, match="must hold a list of records, not dict"):
        make({"id": "x"})
    with pytest.raises(ValueError, match=r"data\.json holds no sample: 0 records"):
        make([])
    with pytest.raises(ValueError, match="holds no sample: 3 records, 2 bad and 1 excluded"):
        make([{}, {}, TEXT], on_bad_sample="skip", exclude=[2])
    with pytest.raises(ValueError, match="was given no image folder"):
        make([record()], images=None)
    with pytest.raises(ValueError, match="stop or skip"):
        make([TEXT], on_bad_sample="ignore")
    with pytest.raises(ValueError, match="must be positive"):
        make([TEXT], max_length=0)
    with pytest.raises(ValueError, match="nested too deeply"):
        make("[" * 200_000)
    with pytest.raises(ValueError, match="there is no annotation file"):
        LlavaDataset(
            tmp_path / "none.json", None, template("v1"), TOKENIZER, Pictures(14, "pad", **CLIP), image_tokens=2
        )
    (tmp_path / "latin.json").write_bytes(b'[{"id": "\xe9"}]')
    with pytest.raises(ValueError, match="not UTF-8 text: byte 9"):
        LlavaDataset(
            tmp_path / "latin.json", None, template("v1"), TOKENIZER, Pictures(14, "pad", **CLIP), image_tokens=2
        )


def test_damaged_pictures(make, tmp_path, caplog):
    (tmp_path / "pictures/bad.png").write_bytes(b"nothing")
    bad = record(id="bad", image="bad.png")
    with pytest.raises(PictureError, match=r"data\.json, record 1: .*bad\.png: this is not a picture"):
        make([record(), bad])[1]
    dataset = make([record(), bad, TEXT], on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        assert [dataset[k].id for k in range(3)] == ["x", "t", "t"]
    assert "bad.png: this is not a picture; the next sample takes its place" in caplog.text
    with pytest.raises(PictureError, match="2 pictures in a row cannot be read"):
        make([bad, bad], on_bad_sample="skip")[0]


def test_excluded_records(make):
    dataset = make([record(id="a"), record(id="b"), TEXT], exclude=[1])
    assert [s.id for s in dataset] == ["a", "t"] and dataset.excluded == 1


def test_plain_needs_a_picture(make):
    with pytest.raises(RecordError, match="template plain needs a picture"):
        make([TEXT], "plain")
