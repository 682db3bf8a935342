"""Pictures packed into tar shards are the pictures of the folder, wherever they lie and whoever reads them."""

from __future__ import annotations

import http.server
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mvlm.data import corpus, shards
from mvlm.data.byte_tokenizer import build as build_tokenizer
from mvlm.data.datamodule import StepData
from mvlm.data.dataset import LlavaDataset, RecordError
from mvlm.data.doctor import examine
from mvlm.data.image import PictureError, Pictures, open_picture
from mvlm.data.mixture import Mixture
from mvlm.data.prompt import template
from mvlm.data.shards import ShardError, Shards, pack, walk
from mvlm.data.tokenizer import load_tokenizer

NAMES = [f"{folder}/{k:03}.png" for folder in ("coco/train", "gqa", "a b") for k in range(20)] + ["ü.jpg", "z/q.v2.jpg"]
LOOK = Pictures(14, "pad", (0, 0, 0), (1, 1, 1))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """pictures/ (noise, so that no two are alike), shards/ packed of it in several shards, and pets.json about them."""
    home, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    for name in NAMES:
        (path := home / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (150, 100 + len(name), 3), np.uint8)).save(path)
    told = pack(walk(home / "pictures"), home / "shards", 1)
    sizes = [file.stat().st_size for file in (home / "shards").glob("*.tar")]
    assert told == {"pictures": len(NAMES), "shards": len(sizes), "bytes": sum(sizes), "kept": 0} and len(sizes) == 4
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This one."}]
    records = [{"id": str(k), "image": name, "conversations": turns} for k, name in enumerate(NAMES)]
    talk = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hello" * 9}]
    (home / "pets.json").write_text(json.dumps([*records, *({"conversations": talk[:2] * n} for n in range(1, 9))]))
    return home


@pytest.fixture
def make(home, tmp_path):
    def build(images=home / "shards", **options):
        words = load_tokenizer(build_tokenizer(tmp_path))
        options = {"image_tokens": 2, "cache": tmp_path / "cache", "source": "pets"} | options
        return LlavaDataset(home / "pets.json", images, template("chatml"), words, LOOK, **options)

    return build


@pytest.fixture
def copied(home, tmp_path):
    """The shards, to be hurt."""
    return Path(shutil.copytree(home / "shards", tmp_path / "shards"))


@pytest.fixture
def memory(home):
    """An object store."""
    fsspec.filesystem("memory").put(str(home / "shards") + "/", "/bucket/shards/", recursive=True)
    yield "memory://bucket/shards"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


class Ranges(http.server.BaseHTTPRequestHandler):
    """Files by range, as an object store gives them. Of the folder `served`; the first `failing` requests fail."""

    served, failing, asked, protocol_version = None, 0, [], "HTTP/1.1"

    def do_GET(self):
        path, wanted = Path(self.served, self.path.lstrip("/")), self.headers.get("Range")
        type(self).asked.append((self.path, wanted))
        if self.failing or not path.is_file():
            type(self).failing = max(0, self.failing - 1)
            data, status = b"", 503 if path.is_file() else 404
        else:
            data, status = path.read_bytes() if self.command == "GET" else b"", 206 if wanted else 200
        self.send_response(status)
        if wanted:
            begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
            data = data[begin : end + 1]
        length = path.stat().st_size if status == 200 else len(data)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def web(home, monkeypatch):
    """The shards behind HTTP, which fsspec asks asynchronously, as it does S3."""
    monkeypatch.setattr(Ranges, "served", home)
    monkeypatch.setattr(Ranges, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/shards"
    server.shutdown()
    server.server_close()


def same(left, right):
    """Samples, but for where their picture lies."""
    assert (left.id, left.input_ids, left.labels, left.skipped) == (right.id, right.input_ids, right.labels, None)
    assert (left.pixels is None) == (right.pixels is None)
    assert left.pixels is None or torch.equal(left.pixels, right.pixels)


def test_every_file_is_in_the_shards_byte_for_byte(home, tmp_path):
    expected = {name: (home / "pictures" / name).read_bytes() for name in NAMES}
    members = {}
    for path in sorted((home / "shards").glob("*.tar")):
        assert path.stat().st_size < 1.2e6
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    assert members == expected and list(members) == sorted(NAMES, key=str.encode)
    there = Shards(str(home / "shards"), tmp_path)
    assert {name: shards.read(there.find(name)) for name in NAMES} == expected
    assert shards.read(there.find("gqa/../gqa//003.png")) == expected["gqa/003.png"], "as a folder has it"
    assert shards.read("gqa/003.png") is None and there.name("gqa/003.png") is None
    assert [there.name(there.find(name)) for name in NAMES] == NAMES


@pytest.mark.parametrize("place", ["folder", "memory", "http"])
def test_samples_are_the_folders_wherever_the_shards_lie(place, home, make, memory, web, tmp_path):
    where = {"folder": f"{home / 'shards'}/", "memory": memory, "http": web}
    plain, packed = make(home / "pictures"), make(where[place])
    assert len(plain) == len(packed) == len(NAMES) + 8 and (plain.lengths == packed.lengths).all()
    for left, right in zip(plain, packed, strict=True):
        same(left, right)
    paths = packed.pictures_used
    assert [Path(path).name for path in paths] == [Path(name).name for name in NAMES]
    assert [packed.showing([path]).tolist() for path in paths[:3]] == [[0], [1], [2]]
    assert not len(packed.showing([str(home / "pictures" / NAMES[0]), paths[0].replace("shards/0", "other/0")]))
    again = make(where[place])  # its rows and the fetched index are known
    assert again.index.path == packed.index.path and len(list((tmp_path / "cache").glob("shards/*"))) == (
        place != "folder"
    )
    (source,) = examine({"finetune": [packed]}).sources
    assert (source.samples, source.pictures, source.missing, source.corrupt) == (len(packed), len(NAMES), 0, 0)


def test_a_picture_is_one_request_for_its_range(web, make):
    packed = make(web)
    Ranges.asked.clear()
    path = packed.picture(5)
    shard, offset, size = shards.PATH.fullmatch(path).group(1, 2, 3)
    packed.pictures(path)
    assert Ranges.asked == [(f"/shards/{Path(shard).name}", f"bytes={offset}-{int(offset) + int(size) - 1}")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_connection_is_no_bad_picture(workers, web, make, monkeypatch):
    """Tried again, and then the run ends, also by `skip`: it resumes, and no good picture becomes a blank one or is put on a list."""
    monkeypatch.setattr(shards, "PAUSES", (0, 0))
    packed = make(web, on_bad_sample="skip")
    monkeypatch.setattr(Ranges, "failing", 2)
    assert packed[0].pixels is not None
    told = r"^http://\S+/00000\d\.tar cannot be fetched, tried 3 times: 503, [^\n]*\(ClientResponseError\)$"
    monkeypatch.setattr(Ranges, "failing", 999)
    with pytest.raises(ConnectionError, match=told):
        list(StepData(Mixture([packed]), 8, 4, workers=workers).train_dataloader())
    with pytest.raises(ConnectionError, match=told):
        examine({"finetune": [packed]})


@pytest.mark.parametrize("place", ["folder", "http"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_at_once(place, method, home, web, tmp_path):
    """Two of them and four threads here. This process has read before: what it holds open is forked, too."""
    there = Shards(str(home / "shards") if place == "folder" else web, tmp_path)
    expected = [shards.read(there.find(name)) for name in NAMES]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as processes, ThreadPoolExecutor(4) as threads:
        paths = [pool.map(there.find, NAMES) for pool in (processes, threads)]  # the index goes with it
        read = [pool.map(shards.read, path) for pool, path in zip((processes, threads), paths, strict=True)]
        assert [list(some) for some in read] == [expected] * 2


def test_more_shards_than_are_kept_open(home, tmp_path, monkeypatch):
    """One is kept open; of the others each is closed as soon as no thread reads it, and not before."""
    monkeypatch.setattr(shards, "_file", shards.lru_cache(1)(shards._file.__wrapped__))
    there, before = Shards(str(home / "shards"), tmp_path), len(os.listdir("/proc/self/fd"))
    names = [name for k in range(20) for name in NAMES[k::20]] * 4  # another shard each time
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(lambda name: shards.read(there.find(name)), names))
    assert read == [(home / "pictures" / name).read_bytes() for name in names]
    assert len(os.listdir("/proc/self/fd")) == before + 1


@pytest.mark.parametrize("order", ["random", "grouped"])
def test_order_and_resume_are_the_folders(order, home, make):
    folder, packed = (Mixture([make(images)]) for images in (home / "pictures", home / "shards"))
    whole = [batch for epoch in loads(folder, order) for batch in epoch]
    half = [batch for epoch in loads(packed, order, start_step=5) for batch in epoch]
    same_batches(whole[5 * 2 :], half)
    devices = [[b for e in loads(packed, order, world_size=2, rank=r) for b in e] for r in range(2)]
    same_batches(whole, list(itertools.chain(*zip(*devices, strict=True))))


def loads(mixture, order, **where):
    """Two epochs, 9 steps each, of two micro-batches in all."""
    loader = StepData(mixture, 8, 4, order=order, seed=3, workers=1, **where).train_dataloader()
    return [list(loader) for _ in range(2)]


def same_batches(left, right):
    assert [batch.ids for batch in left] == [batch.ids for batch in right]
    for a, b in zip(left, right, strict=True):
        assert (a.pixels is None) == (b.pixels is None) and (a.pixels is None or torch.equal(a.pixels, b.pixels))


def test_a_shard_that_is_cut_off(copied, make):
    """What lies beyond its end is told before training, by policy; what goes later is told when it is read."""
    last = copied / "000003.tar"
    packed = make(copied)
    os.truncate(last, 100_000)
    with pytest.raises(
        RecordError, match=r"record \d+ \(id \d+\): picture \S+\.(png|jpg): its shard \S+/000003\.tar has 100,000 bytes"
    ):
        make(copied)
    skipping = make(copied, on_bad_sample="skip")
    gone = {one.record for one in skipping.skipped}
    assert 2 < len(gone) < 20 and {one.kind for one in skipping.skipped} == {"missing picture"}
    assert all(sample.skipped is None for sample in skipping), "the others can be read"
    with pytest.raises(
        PictureError, match=rf"record {max(gone)} .*: shard:\S+/000003\.tar@.* gives \d+ of the \d+ bytes at"
    ) as told:
        packed[max(gone)]
    assert told.value.kind == "shard cut off"
    packed.on_bad_sample = "skip"
    assert packed[max(gone)].skipped.kind == "shard cut off" and packed[max(gone)].pixels is None


def test_a_shard_that_is_missing(copied, make):
    packed = make(copied)
    (copied / "000003.tar").unlink()
    with pytest.raises(RecordError, match=r"picture \S+: its shard \S+/000003\.tar is missing \(\d+ more records"):
        make(copied)
    bad = [one.record for one in make(copied, on_bad_sample="skip").skipped]
    with pytest.raises(
        PictureError, match=rf"record {bad[0]} \(id {bad[0]}\): shard:\S+/000003\.tar@\S+: there is no such file"
    ):
        packed[bad[0]]


def test_a_picture_that_is_not_in_the_shards(home, make, tmp_path):
    for name, kind in (("gqa/099.png", "missing picture"), ("gqa", "missing picture"), ("zzz", "missing picture")):
        assert problem(make, tmp_path, name)[:2] == (kind, f"picture {name} is not in {home / 'shards'}/index.arrow")
    for name in ("../pictures/gqa/003.png", str(home / "pictures/gqa/003.png"), "gqa/../../pictures/gqa/003.png"):
        assert problem(make, tmp_path, name)[0] == "picture outside its folder"
    kind, reason = problem(make, tmp_path, "\ud800.png")
    assert kind == "missing picture" and "half a surrogate pair" in reason


def problem(make, tmp_path, name):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This one."}]
    records = [{"id": str(k), "image": image, "conversations": turns} for k, image in enumerate(["gqa/003.png", name])]
    (tmp_path / "one.json").write_text(json.dumps(records))
    known = make()
    packed = LlavaDataset(
        tmp_path / "one.json", known.shards.location, known.template, known.tokenizer, LOOK, image_tokens=1,
        on_bad_sample="skip", cache=tmp_path / "cache",
    )  # fmt: skip
    (one,) = packed.skipped
    return one.kind, one.reason


def test_other_bytes_than_were_packed(copied, make):
    """The place is right and a picture may even be there: nothing but its CRC-32 tells that it is another one."""
    packed = make(copied)
    (copied / "000000.tar").write_bytes((copied / "000000.tar").read_bytes()[::-1])
    shown = next(k for k in range(len(packed)) if "/000000.tar" in packed.picture(k))
    with pytest.raises(
        PictureError, match=r"000000\.tar has other bytes at \d+ than were packed: damaged, or of another"
    ) as told:
        packed[shown]
    assert told.value.kind == "damaged shard"


def test_a_worker_gets_the_way_to_the_index(copied, make):
    packed = make(copied)
    assert len(pickle.dumps(packed.shards)) < 500
    rows = pickle.dumps(packed)
    same(pickle.loads(rows)[1], packed[1])
    shutil.rmtree(copied)
    pack([("one.png", next(walk(Path(packed.annotations).parent / "pictures"))[1])], copied)
    with pytest.raises(ValueError, match="packed anew: start again"):
        pickle.loads(rows)


def damaged(path, hurt):
    whole = path.read_bytes()
    path.write_bytes(hurt(whole))
    assert path.read_bytes() != whole


@pytest.mark.parametrize("hurt", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d[:200] + bytes(len(d) - 200)])
def test_a_damaged_index_is_told(hurt, copied, make):
    damaged(copied / "index.arrow", hurt)
    with pytest.raises(ValueError, match=r"index\.arrow is (no index of shards, or )?damaged"):
        make(copied)


def test_an_index_that_names_another_shard_is_told(copied, make):
    """Its numbers are all that leads to a file."""
    table = pa.ipc.open_file(pa.BufferReader((copied / "index.arrow").read_bytes())).read_all()
    for number in (4, -1):
        column = pa.array([number] * len(NAMES), pa.int32())
        with pa.ipc.new_file(copied / "index.arrow", table.schema) as writer:
            writer.write_table(table.set_column(1, table.schema.field(1), column))
        with pytest.raises(
            ValueError, match=r"index\.arrow is no index of shards, or damaged: it names other shards than its 4"
        ):
            make(copied)


def test_an_index_of_something_else_is_told(tmp_path, make):
    with pa.ipc.new_file(tmp_path / "index.arrow", pa.schema({"x": pa.int32()})) as writer:
        writer.write_batch(pa.record_batch([pa.array([1])], ["x"]).cast(pa.schema({"x": pa.int32()})))
    with pytest.raises(ValueError, match="is no index of shards"):
        make(tmp_path)


def test_what_is_not_at_a_url_is_told(memory, make, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"there is no memory://bucket/pictures/index\.arrow, or no answer: .* python -m mvlm\.data\.shards packs",
    ):
        make("memory://bucket/pictures")
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        make("nowhere://bucket")
    with pytest.raises(ValueError, match="goes through simplecache, and fsspec's caches are torn when several"):
        make(f"simplecache::{memory}")
    (tmp_path / "mine.json").write_text("[]")
    empty = corpus.Corpus(tmp_path, {"a": {"file": "mine.json", "images": memory}})
    (mine, own) = corpus.sources_of(empty, ["a", str(tmp_path / "mine.json")], memory)[:1] * 2
    assert mine.images == own.images == memory


def test_shards_in_a_store_that_change_are_fetched_anew(memory, make):
    before = make(memory)
    fsspec.filesystem("memory").rm("/bucket/shards/000003.tar")
    with pytest.raises(RecordError, match=r"its shard memory://bucket/shards/000003\.tar is missing"):
        make(memory)
    pack(walk(before.annotations.parent / "pictures/gqa"), before.cache / "gqa")
    fsspec.filesystem("memory").put(str(before.cache / "gqa/index.arrow"), "/bucket/shards/index.arrow")
    assert make(memory, on_bad_sample="skip", exclude=range(62)).shards.digest != before.shards.digest


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/a.png", "x/../a.png", "./a.png", "x//a.png", "..", ""])
def test_names_that_lead_elsewhere_are_not_packed(name, home, tmp_path):
    with pytest.raises(ValueError, match="is no plain path below the folder"):
        pack([("fine.png", home / "pictures/ü.jpg"), (name, home / "pictures/ü.jpg")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_names_twice_links_and_other_things_are_not_packed(home, tmp_path, monkeypatch):
    picture = home / "pictures/ü.jpg"
    with pytest.raises(ValueError, match=r"1 names stand twice among the files, 'b\.jpg' first"):
        pack([(name, picture) for name in ("a.jpg", "b.jpg", "b.jpg")], tmp_path / "out")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="there is no file to pack"):
        pack(walk(tmp_path / "folder"), tmp_path / "out")
    (tmp_path / "folder/link.png").symlink_to(picture)
    (tmp_path / "folder/coco").symlink_to(home / "pictures/coco")
    with pytest.raises(ValueError, match=r"folder/\S+ is a symbolic link; follow_links=true"):
        pack(walk(tmp_path / "folder"), tmp_path / "out")
    names = {name for name, _ in walk(tmp_path / "folder", follow_links=True)}
    assert names == {"link.png", *(name for name in NAMES if name.startswith("coco"))}
    os.mkfifo(tmp_path / "folder/pipe")
    with pytest.raises(ValueError, match="pipe is no file"):
        pack(walk(tmp_path / "folder", follow_links=True), tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        pack(walk(home / "pictures"), home / "shards")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1_000_000))
    with pytest.raises(
        ValueError, match=r"62 files need about 0\.00 GB more in \S+out\.part, and 0\.00 GB are free there: make room"
    ):
        pack(walk(home / "pictures"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    pass


def test_packing_goes_on_where_it_stopped(home, tmp_path, monkeypatch):
    """Killed in the third shard: two are kept, and in the end all is as in one go, byte for byte. A picture that was changed is packed anew."""
    pictures = Path(shutil.copytree(home / "pictures", tmp_path / "pictures"))
    time.sleep(0.02)  # else the system's clock may not tell a shard from what was packed into it
    write = shards._write

    def killed(shard, *others):
        if shard.name == "000002.tar":
            shard.with_suffix(".half").write_bytes(b"half of it")
            raise Killed
        return write(shard, *others)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards, "_write", killed)
        pack(walk(pictures), tmp_path / "out", 1)
    assert sorted(p.name for p in (tmp_path / "out.part").iterdir()) == ["000000.tar", "000001.tar", "000002.half"]
    os.truncate(tmp_path / "out.part/000001.tar", 10_000)
    shutil.copytree(tmp_path / "out.part", tmp_path / "changed.part")
    assert pack(walk(pictures), tmp_path / "out", 1)["kept"] == 1
    for path in (home / "shards").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 5 and not (tmp_path / "out.part").exists()
    first = pictures / min(NAMES, key=str.encode)
    first.write_bytes(first.read_bytes()[::-1])
    assert pack(walk(pictures), tmp_path / "changed", 1)["kept"] == 0
    there = Shards(str(tmp_path / "changed"), tmp_path)
    assert shards.read(there.find(min(NAMES, key=str.encode))) == first.read_bytes()


def test_a_file_that_changes_while_it_is_packed(home, tmp_path):
    (tmp_path / "a.png").write_bytes(b"12345")
    one = shards.File("a.png", str(tmp_path / "a.png"), 4, 0)
    with pytest.raises(ValueError, match=r"a\.png changed while it was packed \(4 bytes, now 5\): start again"):
        shards._write(tmp_path / "000000.tar", [one], lambda size: None)
    assert not (tmp_path / "000000.tar").exists()


def test_odd_files(tmp_path):
    """An empty one, names that are long, or no text, or look like a place in a shard."""
    name = "shard:x/000000.tar@0+1-00000000/y.png"
    odd = {"empty.png": b"", "x" * 200 + "/" + "y" * 90: b"1", os.fsdecode(b"\xe9.png"): b"22", name: b"3"}
    for file, data in odd.items():
        (tmp_path / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / file).write_bytes(data)
    pack(walk(tmp_path / "in"), tmp_path / "out")
    there = Shards(str(tmp_path / "out"), tmp_path)
    assert {file: shards.read(there.find(file)) for file in odd} == odd
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == odd
    with pytest.raises(PictureError, match=r"empty\.png: the file is empty"):
        open_picture(there.find("empty.png"))
    with pytest.raises(ShardError, match=r"picture none\.png is not in"):
        there.find("none.png")


@pytest.mark.parametrize(
    "words, told",
    [
        ("imges=x out=y", "no key 'imges'; did you mean 'images'"),
        ("images=nowhere out=y", "images=nowhere is no folder"),
        ("out=y", "images= is no folder"),
        ("images=.", "out= must be a new folder"),
        ("images=. out=s3://bucket", "copy it to a store afterwards"),
        ("images=. out=shards", "lies in images=."),
        ("images=. out=../y shard_mb=big", "shard_mb is a whole number"),
        ("images=. out=../y shard_mb=0", "at least 1 MB"),
    ],
)
def test_the_command_tells_what_is_wrong(words, told, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        shards.main(words.split())


def test_the_command(home, tmp_path, capsys):
    shards.main([f"images={home / 'pictures'}/", f"out={tmp_path / 'out'}", "shard_mb=2"])
    assert capsys.readouterr().out.strip() == f"62 files in 2 shards, 0.00 GB: data.images={tmp_path / 'out'}"
    shards.main(["--help"])
    assert "python -m mvlm.data.shards images=pictures/" in capsys.readouterr().out
