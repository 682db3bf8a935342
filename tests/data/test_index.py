"""The index of an annotation file: what it holds is what `json` reads, and it is built again when, and only when, it must be."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mvlm.data import index
from mvlm.data.byte_tokenizer import build as build_tokenizer
from mvlm.data.dataset import LlavaDataset, RecordError
from mvlm.data.image import Pictures
from mvlm.data.index import Index, Kept, read_records
from mvlm.data.mixture import Mixture
from mvlm.data.prompt import template
from mvlm.data.tokenizer import load_tokenizer

NAMES = ("a.png", "deep/b c.png", "deep/\u00fc.png", "./a.png")
TEXT = st.text(
    st.sampled_from('a \n"\\{}[],:<\u00e9\u732b\U0001f642\u2028\x00') | st.characters(exclude_categories=["Cs"]),
    max_size=20,
)
RECORDS = st.lists(
    st.builds(
        lambda said, fields: (
            fields
            | {"conversations": [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]}
        ),
        st.lists(TEXT, min_size=1, max_size=4),
        st.fixed_dictionaries(
            {}, optional={"id": TEXT | st.integers() | st.none(), "image": st.sampled_from([*NAMES, None])}
        ),
    ),
    min_size=1,
    max_size=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture
def make(tmp_path, words):
    """`make(records)`: a dataset of them, the four pictures beside it. Without records the file stays as it is."""
    for name in NAMES:
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).touch()

    def build(records=None, name="data.json", **options):
        if records is not None:
            (tmp_path / name).write_text(json.dumps(records), encoding="utf-8")
        options = {"template": template("chatml"), "images": tmp_path / "pictures"} | options
        pictures = Pictures(14, "pad", (0, 0, 0), (1, 1, 1))
        return LlavaDataset(tmp_path / name, tokenizer=words, pictures=pictures, image_tokens=1, **options)

    return build


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """A file with a byte for each time that an index was built, in whatever process."""
    log, build = tmp_path / "builds", Index._build
    log.touch()

    def noted(self, *args):
        with open(log, "ab") as file:
            file.write(b".")
        build(self, *args)

    monkeypatch.setattr(Index, "_build", noted)
    return log


def record(text="A boat.", **fields):
    return {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}]} | fields


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 7)


def read(text: str | bytes, name="x.json"):
    return list(read_records(io.BytesIO(text.encode() if isinstance(text, str) else text), Path(name)))


WRITTEN = st.builds(
    lambda value, indent, ascii: json.dumps(value, indent=indent, ensure_ascii=ascii),
    st.lists(JSON, max_size=5),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=WRITTEN)
def test_a_list_is_read_as_json_reads_it(text, small_chunks):
    assert repr(read(text)) == repr(json.loads(text))  # as text, since NaN is not equal to itself


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=WRITTEN,
    place=st.integers(0, 200),
    cut=st.integers(0, 2),
    put=st.sampled_from(["", ",", "]", '"', "{", "\n", "\\", "1", "\ufeff"]),
)
def test_what_is_wrong_with_a_file_is_said_as_json_says_it(text, place, cut, put, small_chunks):
    place %= len(text) + 1
    text = text[:place] + put + text[place + cut :]
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        if "trailing comma" in error.msg:  # from Python 3.13 on, said one character earlier
            return
        with pytest.raises(ValueError) as told:
            read(text)
        assert f"x.json is not JSON: line {error.lineno}, column {error.colno}: {error.msg}" in str(told.value)
    else:
        if isinstance(expected, list):
            assert repr(read(text)) == repr(expected)
        else:
            with pytest.raises(ValueError, match=f"must hold a list of records, not {type(expected).__name__}"):
                read(text)


def test_bytes_that_are_no_text_are_found(small_chunks):
    for begin in range(12):
        data = b'["' + b"\xe7\x8c\xab" * begin + b"\xe9, "
        with pytest.raises(UnicodeDecodeError) as expected:
            data.decode()
        with pytest.raises(ValueError, match=f"not UTF-8 text: byte {expected.value.start}$"):
            read(data)


def test_a_record_a_line(make, tmp_path, small_chunks):
    records = [record(id=str(k), text="a\n" * k) for k in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "\n")
    dataset = make(name="data.jsonl")
    assert [dataset.record(k) for k in range(len(dataset))] == records
    assert read("", "x.jsonl") == []
    with pytest.raises(ValueError, match=r"x.jsonl is not JSON: line 1, column 1: Unexpected UTF-8 BOM"):
        read('\ufeff{"id": 1}\n', "x.jsonl")
    with pytest.raises(ValueError, match=r"x.jsonl is not JSON: line 2, column 3: Expecting value"):
        read('{"id": 1}\n  oops', "x.jsonl")
    with pytest.raises(ValueError, match=r"line 2, column 1: Extra data; a file with a record a line ends in .jsonl"):
        read('{"id": 1}\n{"id": 2}')


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS)
def test_samples_are_those_of_the_file(records, make):
    dataset = make(records)
    there = [r.get("image") for r in records]
    assert [dataset.record(k) for k in range(len(dataset))] == records
    spoken = [max(1, sum(len(turn["value"].split()) for turn in r["conversations"])) for r in records]
    assert dataset.lengths.tolist() == [n if name else -n for n, name in zip(spoken, there, strict=True)]
    paths = [None if name is None else str(dataset.images / name) for name in there]
    assert [dataset.picture(k) for k in range(len(dataset))] == paths
    assert dataset.pictures_used == [path for path in dict.fromkeys(paths) if path]
    for path in set(paths) - {None}:
        assert dataset.showing([path]).tolist() == [k for k, other in enumerate(paths) if other == path]


@settings(max_examples=60, deadline=None)
@given(total=st.integers(0, 40), dropped=st.sets(st.integers(0, 39)))
def test_numbers_without_some(total, dropped):
    dropped = np.array(sorted(k for k in dropped if k < total), np.int64)
    kept, plain = Kept(total, dropped), np.delete(np.arange(total), dropped).tolist()
    assert len(kept) == len(plain) and list(kept) == plain and np.asarray(kept).tolist() == plain
    assert not plain or kept[-1] == plain[-1]


def test_it_is_built_once(make, builds, cache):
    first = make([record(), record(image="a.png")])
    (name,) = [file for file in (cache / "index").iterdir() if file.suffix == ".arrow"]
    written = name.stat().st_mtime_ns
    again = make()
    assert again.record(1) == first.record(1) and again.sha256 == first.sha256
    assert len(builds.read_bytes()) == 1 and name.stat().st_mtime_ns == written
    make(exclude=[0], on_bad_sample="skip")  # these choose among the rows, which stay
    assert len(builds.read_bytes()) == 1
    assert not list((cache / "index").glob("*.part"))


def test_another_file_is_read_again(make, builds, tmp_path):
    old = make([record(id="a"), record(id="b")])
    new = make([record(id="c"), record(id="d")])  # as long as before
    assert [r["id"] for r in (new.record(0), new.record(1))] == ["c", "d"]
    assert old.record(0)["id"] == "a"  # what is open stays as it was
    assert old.sha256 != new.sha256 == index.hashlib.sha256((tmp_path / "data.json").read_bytes()).hexdigest()
    assert len(builds.read_bytes()) == 2


def test_pictures_that_come_and_go_are_seen(make, builds, tmp_path):
    records = [record(image="a.png"), record(image="deep/b c.png"), record(image="far/c.png")]
    with pytest.raises(RecordError, match=r"record 2: picture .*far/c.png is missing\. Repair"):
        make(records)
    assert [s.record for s in make(on_bad_sample="skip").skipped] == [2] and len(builds.read_bytes()) == 1
    (tmp_path / "pictures/far").mkdir()
    (tmp_path / "pictures/far/c.png").touch()
    assert len(make()) == 3
    (tmp_path / "pictures/deep/b c.png").unlink()
    (tmp_path / "pictures/a.png").unlink()
    with pytest.raises(
        RecordError, match=r"record 0: picture .*a.png is missing \(1 more records of this file are bad"
    ):
        make()


def test_another_way_of_checking_has_rows_of_its_own(make, builds):
    make([record("<image>", image="a.png")])
    with pytest.raises(RecordError, match="template plain needs a picture"):
        make(template=template("plain"))
    assert len(make()) == 1 and len(builds.read_bytes()) == 2


def test_other_code_reads_again(make, builds, monkeypatch):
    make([record()])
    monkeypatch.setattr(index, "CODE", "another")
    make()
    assert len(builds.read_bytes()) == 2


FIRST = (12345).to_bytes(4, "little")
"""How long the first record's text is in the index."""

DAMAGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "another file": lambda data: b"ARROW1" * 50,
    "zeros at the end": lambda data: data[:-200] + bytes(200),
    "zeros at the beginning": lambda data: bytes(400) + data[400:],
    # Where the texts begin: the first at 0, the second (see the test) beyond the end.
    "offsets": lambda data: data.replace(b"\0\0\0\0" + FIRST, b"\0\0\0\0\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_built_again(damage, make, builds, cache, caplog):
    around = len(json.dumps(record(""), separators=(",", ":")))
    records = [record("!" * (12345 - around)), *[record()] * 50]
    make(records)
    (path,) = (cache / "index").glob("*.arrow")
    whole = path.read_bytes()
    hurt = DAMAGES[damage](whole)
    assert hurt != whole
    path.write_bytes(hurt)
    with caplog.at_level(logging.WARNING):
        dataset = make()
    assert "is damaged and is built anew" in caplog.text
    assert [dataset.record(k) for k in range(51)] == records
    assert len(builds.read_bytes()) == 2 and path.read_bytes() == whole


def test_what_a_killed_process_left_does_no_harm(make, cache):
    make([record()])
    (path,) = (cache / "index").glob("*.arrow")
    path.rename(path.with_suffix(".part"))  # half of another one, say
    assert len(make()) == 1 and not path.with_suffix(".part").exists()


def test_a_failed_build_leaves_nothing(make, cache, tmp_path):
    (tmp_path / "data.json").write_text('[{}, {"id"')
    with pytest.raises(ValueError, match="is not JSON: line 1, column 11"):
        make()
    assert [file.suffix for file in (cache / "index").iterdir()] == [".lock"]


def test_a_file_that_changes_meanwhile_is_refused(make, monkeypatch, tmp_path):
    check = LlavaDataset._check

    def slow(self, *args):
        (tmp_path / "data.json").write_text("[]")
        check(self, *args)

    monkeypatch.setattr(LlavaDataset, "_check", slow)
    with pytest.raises(ValueError, match="changed while it was read"):
        make([record()])


def test_a_cache_that_cannot_be_written_is_said(make, tmp_path):
    (tmp_path / "full").write_text("no folder")
    with pytest.raises(ValueError, match=r"cannot be indexed: .* set MVLM_CACHE to a folder on a local disk"):
        make([record()], cache=tmp_path / "full")


def test_of_three_processes_one_builds(make, builds, together):
    """They are let go at once, and read thousands of records while the others wait."""
    records = [record(id=k) for k in range(3000)]
    make(records, name="warm.json")
    builds.write_bytes(b"")

    def work(rank):
        dist.barrier()
        dataset = make(name="shared.json")
        return [dataset.record(k)["id"] for k in (0, 1234, 2999)]

    shared = Path(make(records, name="shared.json").annotations)
    os.utime(shared, (1, 1))  # the index just built is of another file now
    builds.write_bytes(b"")
    assert together(3, work, patience=60) == [[0, 1234, 2999]] * 3
    assert len(builds.read_bytes()) == 1


def test_a_worker_gets_the_way_to_the_rows_and_not_the_rows(make):
    """The samples held out are a few numbers, too; 300 bytes are for them and for numbers with more digits."""
    few, many = (
        Mixture([make([record(id=k) for k in range(n)], name=f"{n}.json")]).without(np.array([3])) for n in (10, 5000)
    )
    dumped = pickle.dumps(many)
    assert len(dumped) < len(pickle.dumps(few)) + 300 and len(dumped) < 1_000_000
    again = pickle.loads(dumped)
    assert len(again) == 4999 and [again[k].id for k in (2, 3, 4998)] == ["2", "4", "4999"]
    assert np.array_equal(again.lengths, many.lengths)
    loader = DataLoader(
        many, num_workers=2, multiprocessing_context="fork", collate_fn=lambda some: some[0].id, sampler=[7, 2, 3]
    )
    assert list(loader) == ["8", "2", "4"]


def test_a_worker_does_not_take_other_rows_for_its_own(make):
    dumped = pickle.dumps(make([record(id="a")]))
    make([record(id="b"), record(id="c")])
    with pytest.raises(ValueError, match="was built anew, for its annotation file changed"):
        pickle.loads(dumped)
