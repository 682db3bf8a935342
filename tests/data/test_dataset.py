"""Records to samples: against the reference's dataset, and one test an error."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import re
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN
from mvlm.data.dataset import MISSING, LlavaDataset, RecordError
from mvlm.data.image import PictureError, Pictures
from mvlm.data.mixture import Mixture
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


HUMAN, GPT = TEXT["conversations"]
BAD = [
    ("a record is an object with `conversations`, not list", "wrong type", []),
    ("a record is an object with `conversations`, not NoneType", "wrong type", None),
    ("no field `conversations`", "wrong type", {"id": "x"}),
    ("`conversations` must be a list", "wrong type", {"conversations": []}),
    ("`conversations` must be a list", "wrong type", {"conversations": "USER: hi"}),
    ("`conversations` must be a list", "wrong type", {"conversations": HUMAN}),
    ("turn 1 has no text in `from`", "wrong type", {"conversations": [{"value": "hi"}]}),
    ("turn 1 has no text in `from`", "wrong type", {"conversations": [["human", "hi"]]}),
    ("turn 2 has no text in `value`", "wrong type", {"conversations": [HUMAN, {"from": "gpt", "value": 3}]}),
    ("`id` is a list; it must be a text or a number", "wrong type", TEXT | {"id": [[[]]]}),
    ("`id` is a dict; it must be", "wrong type", TEXT | {"id": {"a": 1}}),
    ("turn 1 has 'system' in `from`", "unknown speaker", {"conversations": [{"from": "system", "value": "hi"}]}),
    ("turn 1 has 'Human' in `from`", "unknown speaker", {"conversations": [{"from": "Human", "value": "hi"}]}),
    ("turn 2 is a second one of 'human'", "speakers do not alternate", {"conversations": [HUMAN, HUMAN]}),
    ("the human has no turn", "no human turn", {"conversations": [GPT]}),
    (
        "turn 2 has half a surrogate pair at character 1",
        "no text",
        {"conversations": [HUMAN, GPT | {"value": "a\ud800"}]},
    ),
    ("picture .*b.png is missing", MISSING, record(image="b.png")),
    (r"picture .*\\udcff\.png is missing", MISSING, record(image="\udcff.png")),
    (r"picture .*\\ud800\.png is missing", MISSING, record(image="\ud800.png")),
    ("picture .*xxx", MISSING, record(image="x" * 100_000)),
    ("picture .*folder is no file", MISSING, record(image="folder")),
    ("`image` is a int, not a path", "wrong type", record(image=7)),
    ("`image` is a dict, not a path", "wrong type", record(image={"path": "a.png"})),
    ("`image` is '', not a path", "wrong type", record(image="")),
    (r"`image` is 'a\\x00.png', not a path", "wrong type", record(image="a\0.png")),
    ("`image` lists 2 pictures; a dialogue takes one", "several pictures", record(image=["a.png", "a.png"])),
    (r"turns \[1, 2\] each have an <image>", "several placeholders", record("<image> too")),
    (
        "an <image> inside an <image>",
        "several placeholders",
        record(conversations=[{"from": "human", "value": "<im<image>age>"}, GPT]),
    ),
    ("`image` '../a.png' leads out", "picture outside its folder", record(image="../a.png")),
    ("`image` 'x/../../a.png' leads out", "picture outside its folder", record(image="x/../../a.png")),
    ("`image` '/etc/passwd' leads out", "picture outside its folder", record(image="/etc/passwd")),
]
"""What is told, what it is counted as, the record."""


@pytest.mark.parametrize(("reason", "kind", "bad"), BAD, ids=[f"{k}-{reason}" for k, (reason, *_) in enumerate(BAD)])
def test_a_bad_record_stops_or_is_skipped(reason, kind, bad, make, tmp_path, caplog):
    (tmp_path / "pictures/folder").mkdir()
    told = rf"source pets: .*data\.json, record 1.*: .*{reason}.*\. Repair or remove it .* or set on_bad_sample=skip"
    with pytest.raises(RecordError, match=told) as raised:
        make([TEXT, bad], source="pets")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 900
    with caplog.at_level(logging.WARNING):
        dataset = make([TEXT, bad, record()], on_bad_sample="skip")
    assert [dataset[k].id for k in range(len(dataset))] == ["t", "x"]
    assert "1 of 3 records skipped; the first is record 1" in caplog.text
    assert [dataset.record_number(k) for k in range(2)] == [0, 2]
    (skipped,) = dataset.skipped
    assert (skipped.source, skipped.record, skipped.kind) == ("data", 1, kind) and str(skipped).isprintable()


def png_header(width, height):
    """A PNG that claims a size and holds a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(b"\0" * 99)),
    )
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IEND", b"")])


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


NOISE = Image.frombytes("RGB", (64, 64), bytes((k * k) % 251 for k in range(64 * 64 * 3)))
UNREADABLE = [
    ("a JPEG cut off", "damaged or cut off", "damaged picture", saved(NOISE, "JPEG")[:-600]),
    ("a PNG cut off", "damaged or cut off", "damaged picture", saved(NOISE, "PNG")[:-600]),
    ("a WebP cut off", "damaged or cut off|not a picture", None, saved(NOISE, "WEBP", lossless=True)[:-600]),
    ("no byte", "the file is empty", "empty file", b""),
    ("another file", "this is not a picture", "not a picture", b"<html>404 Not Found</html>"),
    ("no pixels", "no pixels|not a picture|damaged", None, png_header(0, 9)),
    (
        "a bomb",
        "too large: Image size .3600000000 pixels. exceeds limit",
        "too large a picture",
        png_header(60_000, 60_000),
    ),
    (
        "too large",
        "8000 x 8000 pixels are more than the limit of 50,000,000",
        "too large a picture",
        png_header(8000, 8000),
    ),
    (
        "a strip",
        "1 x 40000 pixels are too narrow for mode pad",
        "too narrow a picture",
        saved(Image.new("1", (1, 40_000)), "PNG"),
    ),
    ("gone meanwhile", "there is no such file", "missing picture", None),
    ("a folder meanwhile", r"cannot be read \(Is a directory\)", "unreadable file", ...),
]
"""Faults that show only when a picture is decoded: name, what is told, what it is counted as (None: Pillow's versions differ), content."""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("reason", "kind", "content"), [u[1:] for u in UNREADABLE], ids=[u[0] for u in UNREADABLE])
def test_an_unreadable_picture_stops_or_is_skipped(reason, kind, content, make, tmp_path):
    """By `skip` a blank sample takes its place: neighbours are neither moved nor seen twice, and nothing can be learned of it."""
    path = tmp_path / "pictures/bad.png"
    path.write_bytes(content if isinstance(content, bytes) else b"?")
    records = [record(), record(id="bad", image="bad.png"), TEXT]
    stopping, skipping = make(records), make(records, on_bad_sample="skip", source="pets")
    if not isinstance(content, bytes):
        path.unlink()
    if content is ...:
        path.mkdir()
    told = rf"source data: .*data\.json, record 1 \(id bad\): .*pictures/bad\.png: .*({reason}).*\. Repair or .* on_bad_sample=skip"
    with pytest.raises(PictureError, match=told):
        stopping[1]
    assert [skipping[k].id for k in range(3)] == ["x", "bad", "t"]
    assert [skipping[k].skipped is None for k in range(3)] == [True, False, True] and skipping.skipped == []
    blank = skipping[1]
    assert (blank.input_ids, blank.labels, blank.pixels, blank.features) == ([TOKENIZER.pad_id], [-100], None, None)
    assert (blank.skipped.source, blank.skipped.record) == ("pets", 1) and re.search(reason, blank.skipped.reason)
    assert kind in (None, blank.skipped.kind)


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
        Mixture([make([])])
    with pytest.raises(ValueError, match="holds no sample: 3 records, 2 bad and 1 excluded"):
        Mixture([make([{}, {}, TEXT], on_bad_sample="skip", exclude=[2])])
    with pytest.raises(ValueError, match="no image folder was given"):
        make([record()], images=None)
    with pytest.raises(ValueError, match="stop or skip"):
        make([TEXT], on_bad_sample="ignore")
    with pytest.raises(ValueError, match="must be positive"):
        make([TEXT], max_length=0)
    with pytest.raises(ValueError, match="nested too deeply"):
        make("[" * 200_000)
    with pytest.raises(ValueError, match=r"data\.json is not JSON: line 2, column 1: .*4300 digits"):
        make('[{},\n{"id": ' + "7" * 5000 + "}]")
    with pytest.raises(ValueError, match="there is no annotation file"):
        LlavaDataset(
            tmp_path / "none.json", None, template("v1"), TOKENIZER, Pictures(14, "pad", **CLIP), image_tokens=2
        )
    (tmp_path / "latin.json").write_bytes(b'[{"id": "\xe9"}]')
    with pytest.raises(ValueError, match="not UTF-8 text: byte 9"):
        LlavaDataset(
            tmp_path / "latin.json", None, template("v1"), TOKENIZER, Pictures(14, "pad", **CLIP), image_tokens=2
        )


def test_a_picture_without_features_could_not_be_read(make, tmp_path):
    """The same policy where the pictures were encoded before; and one that is whole again is not taken as pixels among features."""
    path = tmp_path / "pictures/b.png"
    path.write_bytes(b"nothing")
    features = {str(tmp_path / "pictures/a.png"): torch.ones(4, 8)}
    records = [record(), record(id="b", image="b.png")]
    with pytest.raises(PictureError, match=r"record 1 .*b\.png: this is not a picture"):
        make(records, features=features)[1]
    dataset = make(records, features=features, on_bad_sample="skip")
    assert dataset[0].skipped is None and dataset[1].skipped.kind == "not a picture"
    Image.new("RGB", (4, 4)).save(path)
    assert dataset[1].skipped.kind == "no features"
    with pytest.raises(PictureError, match="could not be read when the features were computed; start again"):
        make(records, features=features)[1]


def test_excluded_records(make):
    dataset = make([record(id="a"), record(id="b"), TEXT], exclude=[1])
    assert [s.id for s in dataset] == ["a", "t"] and len(dataset.excluded) == 1


def test_plain_needs_a_picture(make):
    with pytest.raises(RecordError, match="template plain needs a picture"):
        make([TEXT], "plain")


ODD = [
    "USER:",
    " ASSISTANT:",
    "</s>",
    "<s>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "\0\x07\x1b[31m",
    "\u202eabc",
    "\ufeff",
]


@pytest.mark.parametrize("said", ODD)
def test_odd_text_is_only_text(said, make):
    """Control characters, other directions of writing, special strings: learned in an answer as they are, nowhere else."""
    sample = make(
        [
            record(f"so {said} it", conversations=None)
            | {
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat {said} is {said}?"},
                    {"from": "gpt", "value": f"so {said} it"},
                ]
            }
        ]
    )[0]
    learned = [label for label in sample.labels if label >= 0]
    assert learned[-1] == TOKENIZER.eos_id and TOKENIZER.decode(learned) == f"so {said} it"
    assert [sample.input_ids.count(TOKENIZER.special_id(s)) for s in ("<s>", "</s>", "<unk>")] == [1, 1, 0]
    assert sample.input_ids.count(IMAGE_TOKEN) == 2 and IMAGE_TOKEN not in sample.labels


@pytest.mark.parametrize(
    "text",
    ["word " * 200_000, "a" * 1_000_000, "\u732b" * 300_000, "<image>" * 140_000],
    ids=["words", "one word", "signs", "tags"],
)
def test_a_megabyte_of_text(text, make):
    """It is cut, and takes seconds at most: BPE of one endless word would be quadratic if done naively."""
    began = time.process_time()
    turns = [{"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": "A boat."}]
    dataset = make([record(conversations=turns), TEXT], max_length=200)
    sample = dataset[0]
    assert time.process_time() - began < 10
    assert 110 < len(sample.input_ids) <= 201 and sample.input_ids.count(IMAGE_TOKEN) == 2
    assert dataset[1].id == "t"


def test_equal_ids_are_fine(make):
    assert [s.id for s in make([record(), record(), record(id=None), record(id=7), record(id=0.5)])] == [
        "x",
        "x",
        "None",
        "7",
        "0.5",
    ]


SAID = st.lists(st.sampled_from([*ODD, "<image>", "<im<image>age>", "boat"]) | st.text(max_size=4), max_size=4).map(
    "".join
)
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": SAID})
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["human", "gpt", "a.png", "bad.png", "\udcff"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "image", "conversations", "from", "value"]), inner, max_size=4)
    ),
    max_leaves=12,
)
ANYTHING_LIKE = ANY | st.fixed_dictionaries(
    {
        "conversations": st.lists(TURN | ANY, max_size=4)
        | st.lists(SAID, min_size=1, max_size=4).map(
            lambda said: [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
        )
    },
    optional={"id": ANY, "image": st.sampled_from(["a.png", "bad.png", "none.png", "../a.png", None]) | ANY},
)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=st.lists(ANYTHING_LIKE, max_size=6), version=st.sampled_from(["v1", "plain"]))
def test_any_record(records, version, make, tmp_path):
    """Whatever JSON holds: `stop` raises ValueError or none is bad; `skip` reads the same good ones, counts the others, and never
    raises again. No placeholder is labelled, and there are as many as the picture has tokens, or none."""
    (tmp_path / "pictures/bad.png").write_bytes(b"?")
    dataset = make(records, version, on_bad_sample="skip")
    assert len(dataset) + len(dataset.skipped) == len(records)
    samples = list(dataset)
    for k, sample in enumerate(samples):
        assert len(sample.input_ids) == len(sample.labels) > 0 and sample.id.isprintable()
        assert all(label in (IGNORE_INDEX, i) for i, label in zip(sample.input_ids, sample.labels, strict=True))
        seen = sample.picture is not None
        assert IMAGE_TOKEN not in sample.labels and sample.input_ids.count(IMAGE_TOKEN) == 2 * seen == 2 * (
            sample.pixels is not None
        )
        assert (sample.skipped is not None) == (dataset.picture(k) == str(tmp_path / "pictures/bad.png"))
    for one in [*dataset.skipped, *(s.skipped for s in samples if s.skipped)]:
        assert one.kind and one.reason and str(one).isprintable()
    if dataset.skipped:
        with pytest.raises(RecordError, match=f"record {dataset.skipped[0].record}\\b"):
            make(records, version)
