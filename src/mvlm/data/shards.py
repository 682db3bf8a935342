"""Pictures in tar shards with an index, for object stores and network disks, where millions of small files are slow or cannot lie.

    python -m mvlm.data.shards images=pictures/ out=shards/ shard_mb=512      the same line again goes on where it stopped

`data.images=shards/`, or `data.images=s3://bucket/shards` once they are copied there, then stands for the folder in every script. The
shards are plain tar files in WebDataset's layout, a picture a member under its path below the folder; `index.arrow` has each
picture's shard, offset, size and CRC-32. So a picture is one ranged read: of a file, or through fsspec of a URL (`s3://` needs the package
s3fs, `gs://` gcsfs; rights and options are said as these want it).

Why not as a stream: WebDataset reads a shard from its first picture to its last and shuffles what is in a buffer, and litdata deals
chunks of a format of its own to devices and workers. So the order depends on how many of them there are. Here it stays a function of seed
and epoch, grouped by length, and a run resumes at any step, for a picture is found by its name wherever it lies. The price is a request a
picture; more workers hide the waiting. Reading at random touches every shard within a few steps, so a cache of whole shards would fetch
them all first: where a local disk has the room, copy them there and train from it.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
from rich.progress import Progress, TransferSpeedColumn, track

INDEX = "index.arrow"
SCHEMA = pa.schema(
    {"name": pa.large_binary(), "shard": pa.int32(), "offset": pa.int64(), "size": pa.int64(), "crc32": pa.uint32()}
)
"""A row a picture, ascending by name (the bytes that the file system has). A shard is named by its number alone, so no row leads
out of the folder. The metadata `facts` have the shards' sizes and a digest of all rows."""
PATH = re.compile(r"shard:(.*?/\d{6,}\.tar)@(\d+)\+(\d+)-([0-9a-f]{8})/(.*)", re.DOTALL)
"""What a picture in a shard is called: where its bytes are, then its name. Whoever has the path needs nothing else to read it."""
BLOCK = 512
"""Of a tar file."""
OPEN = 64
"""Shards that a process keeps open."""
PAUSES = (1, 4)
"""Seconds before a request that failed is tried again."""

log = logging.getLogger(__name__)


class ShardError(ValueError):
    """A picture that its shard does not give; `kind` says why in a few words."""

    def __init__(self, message: str, kind: str = "missing picture") -> None:
        super().__init__(message)
        self.kind = kind


class Shards:
    """Where the pictures of a packed folder lie.

    The index is mapped into memory, so all processes share its pages; one that is not on this machine is fetched once. Files are
    opened and connections made by the process that reads, in `read`.

    Args:
        location: folder or URL of the shards, without a slash at the end.
        cache: where an index that is not on this machine is kept.

    Raises:
        ValueError: there is no index, or it is damaged; the URL's kind is not known, or its package not installed.
    """

    def __init__(self, location: str, cache: Path) -> None:
        self.location = location
        self.path = _fetched(location, cache) if is_url(location) else Path(location, INDEX)
        self.digest = self._map()["digest"]
        try:
            self.table.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(f"{self.path} is damaged ({error}): copy or pack the shards again") from None
        with ThreadPoolExecutor(16) as pool:
            self.sizes = list(pool.map(_size, map(self._shard, range(len(self.packed)))))
        """Bytes of each shard now; None for one that is missing."""

    @property
    def stamp(self) -> str:
        """By which these very pictures, and what is there of their shards, are known again."""
        return hashlib.sha256(f"{self.digest} {self.sizes}".encode()).hexdigest()

    def find(self, name: str) -> str:
        """The path of a picture that is in the index, for `read`.

        Raises:
            ShardError: it is not.
        """
        row = self._row(name)
        shard, offset, size, crc = (column[row] for column in self._columns)
        return f"shard:{self._shard(shard)}@{offset}+{size}-{crc:08x}/{name}"

    def check(self, name: str) -> None:
        """Raises ShardError unless a picture is in the index, and its shard is there and long enough, as far as that is known."""
        row = self._row(name)
        shard, offset, size, _ = (int(column[row]) for column in self._columns)
        there = self.sizes[shard]
        if there is None:
            raise ShardError(f"picture {name}: its shard {self._shard(shard)} is missing")
        if there < offset + size:
            told = f"has {there:,} bytes, and {self.packed[shard]:,} when it was packed; the picture ends at {offset + size:,}"
            raise ShardError(f"picture {name}: its shard {self._shard(shard)} {told}")

    def name(self, path: str) -> str | None:
        """The name in a path that `find` gave; None for a path of something else."""
        found = PATH.fullmatch(path)
        return found[5] if found and found[1].rpartition("/")[0] == self.location else None

    def __getstate__(self) -> dict[str, Any]:
        """Where it lies; the process that gets this maps the same pages."""
        return {"location": self.location, "path": self.path, "digest": self.digest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._map()["digest"] != self.digest:
            raise ValueError(f"{self.path} is another one now, for the pictures were packed anew: start again")

    def _map(self) -> dict[str, Any]:
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
            facts = json.loads((self.table.schema.metadata or {})[b"facts"])
            if not self.table.schema.equals(SCHEMA):
                raise ValueError(f"its columns are {self.table.schema.names}")
            self._names, *columns = (column.chunk(0) for column in self.table.columns)
            self._columns, self.packed = [column.to_numpy() for column in columns], facts["sizes"]
            if not 0 <= self._columns[0].min() <= self._columns[0].max() < len(self.packed):
                raise ValueError(f"it names other shards than its {len(self.packed)}")
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{self.path} is no index of shards, or damaged: {error}") from None
        return facts

    def _row(self, name: str) -> int:
        try:
            wanted = os.fsencode(os.path.normpath(name))
        except UnicodeEncodeError:
            raise ShardError(f"{name!r} is no name of a file: it has half a surrogate pair") from None
        row = bisect_left(self._names, wanted, key=lambda name: name.as_py())
        if row == len(self._names) or self._names[row].as_py() != wanted:
            raise ShardError(f"picture {name} is not in {self.location}/{INDEX}")
        return row

    def _shard(self, number: int) -> str:
        return f"{self.location}/{number:06}.tar"


def is_url(location: str | Path) -> bool:
    """Whether a place is one of fsspec's, and no path of this machine."""
    return isinstance(location, str) and "://" in location


def shards_of(images: str | Path | None, cache: Path) -> Shards | None:
    """The shards that pictures lie in, or None for a plain folder.

    Raises:
        ValueError: as `Shards`.
    """
    if images is None or not (is_url(images) or Path(images, INDEX).is_file()):
        return None
    return Shards(str(images).rstrip("/"), cache)


def read(path: str) -> bytes | None:
    """The picture file at a path as `Shards.find` gives it; None for a path of something else.

    Safe in several threads, and in processes that were forked: a file is read without moving its position, and no
    connection is taken over from another process.

    Raises:
        ShardError: the shard ends before, or has other bytes there than were packed.
        ConnectionError: it cannot be fetched, which is no fault of the picture.
        OSError: it is missing, or the system cannot read it.
    """
    if not path.startswith("shard:") or not (found := PATH.fullmatch(path)):
        return None
    shard, offset, size = found[1], int(found[2]), int(found[3])
    if is_url(shard):
        data = _asked(shard, lambda store, file: store.cat_file(file, start=offset, end=offset + size))
    else:
        file = _file(shard)  # by this name it stays open, whatever other threads open meanwhile
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ShardError(f"{shard} gives {len(data)} of the {size} bytes at {offset}", "shard cut off")
    if zlib.crc32(data) != int(found[4], 16):
        told = f"{shard} has other bytes at {offset} than were packed: damaged, or of another packing"
        raise ShardError(told, "damaged shard")
    return data


@lru_cache(OPEN)
def _file(shard: str) -> BinaryIO:
    """A shard on a disk; closed when nobody has it any more."""
    return open(shard, "rb", buffering=0)


@lru_cache
def _store(location: str, process: int) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there; of one process."""
    return fsspec.core.url_to_fs(location)


def _asked(url: str, ask: Callable[[Any, str], Any]) -> Any:
    """What a store answers about a file. Connections break: what fails is tried three times.

    Raises:
        FileNotFoundError: at once.
        ConnectionError: the last failure.
    """
    folder, _, file = url.rpartition("/")
    store, root = _store(folder, os.getpid())
    for pause in (*PAUSES, None):
        try:
            return ask(store, f"{root}/{file}")
        except FileNotFoundError:
            raise
        except Exception as error:  # each store has its own
            if pause is None:
                told = f"{url} cannot be fetched, tried {len(PAUSES) + 1} times: {error} ({type(error).__name__})"
                raise ConnectionError(told) from None
            time.sleep(pause)
    raise AssertionError


def _size(shard: str) -> int | None:
    """Bytes of a file; None if it is missing. One whose store does not tell counts as long enough."""
    try:
        if is_url(shard):
            size = _asked(shard, lambda store, path: store.info(path).get("size"))
            return sys.maxsize if size is None else size
        return os.path.getsize(shard)
    except FileNotFoundError:
        return None


def _fetched(location: str, cache: Path) -> Path:
    """The index of shards that are somewhere else, as a file of this machine; another one as soon as that changes."""
    url = f"{location}/{INDEX}"
    if "::" in location:  # seen: four processes, one of twelve reads torn
        told = "fsspec's caches are torn when several processes fill them: leave it out, or copy the shards to a local disk"
        raise ValueError(f"{location} goes through {location.split('::')[0]}, and {told}")
    try:
        facts = _asked(url, lambda store, path: store.info(path))
    except FileNotFoundError:
        cure = "python -m mvlm.data.shards packs a folder; copy what it makes there"
        raise ValueError(
            f"there is no {url}, or no answer: pictures are read from a URL as shards alone. {cure}"
        ) from None
    except ImportError as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from None
    told = json.dumps([location, facts], sort_keys=True, default=str)
    path = cache / "shards" / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.arrow"
    if not path.exists():
        log.info("fetching %s", url)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        try:
            _asked(url, lambda store, there: store.get_file(there, str(aside)))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return path


class File(NamedTuple):
    """One to pack."""

    name: str
    path: str
    size: int
    time: int
    """When it, or its being here, last changed, in nanoseconds."""


def walk(folder: Path, follow_links: bool = False) -> Iterator[tuple[str, str]]:
    """Every file below a folder with its path there.

    Raises:
        ValueError: a symbolic link, without `follow_links`.
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(folder, followlinks=follow_links, onerror=fail):
        for path in (os.path.join(at, name) for name in (*folders, *files)):
            if not follow_links and os.path.islink(path):
                raise ValueError(f"{path} is a symbolic link; follow_links=true packs what it leads to")
        inside = "" if at == str(folder) else os.path.join(os.path.relpath(at, folder), "")
        yield from ((inside + name, os.path.join(at, name)) for name in files)


def pack(files: Iterable[tuple[str, str | Path]], out: Path, shard_mb: int = 512) -> dict[str, int]:
    """Write shards and their index.

    They lie in `<out>.part` until all are whole. What is there of an earlier attempt is read back, and stays if it has the
    same pictures and none changed since; which picture goes into which shard depends on names and sizes only.

    Args:
        files: names and what is packed under them.
        out: a folder that does not exist yet.
        shard_mb: a shard's size in millions of bytes; a larger file gets one of its own.

    Returns:
        `pictures`, `shards`, `bytes` of all shards, and shards `kept` of an earlier attempt.

    Raises:
        ValueError: a name stands twice, leads out of the folder, or is of no file; there are none; the disk has no room; a file
            changed meanwhile; `out` is there.
    """
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already: name another folder with out=, or remove it")
    if shard_mb < 1:
        raise ValueError(f"a shard has at least 1 MB, not {shard_mb}")
    looked_at = (_checked(name, path) for name, path in track(files, "finding files", transient=True))
    found = sorted(looked_at, key=lambda file: os.fsencode(file.name))
    if twice := [name for name, count in Counter(file.name for file in found).items() if count > 1]:
        raise ValueError(f"{len(twice)} names stand twice among the files, {twice[0]!r} first: each can be packed once")
    if not found:
        raise ValueError("there is no file to pack")
    aside, plan, kept, rows, sizes = out.with_name(out.name + ".part"), _cut(found, shard_mb * 10**6), 0, [], []
    aside.mkdir(parents=True, exist_ok=True)
    wanted = {f"{number:06}.tar" for number in range(len(plan))}
    for old in aside.iterdir():  # of another plan, or half of one
        if old.name not in wanted:
            old.unlink()
    _check_room(aside, found)
    with Progress(*Progress.get_default_columns(), TransferSpeedColumn(), transient=True) as progress:
        task = progress.add_task("", total=sum(file.size for file in found))
        for number, some in enumerate(plan):
            shard = aside / f"{number:06}.tar"
            progress.update(task, description=f"shard {number + 1} of {len(plan)}")
            there = _read_back(shard, some) if shard.exists() else None
            kept += there is not None
            members = there or _write(shard, some, lambda size: progress.advance(task, size))
            if there:
                progress.advance(task, sum(file.size for file in some))
            rows += [(os.fsencode(file.name), number, *member) for file, member in zip(some, members, strict=True)]
            sizes.append(shard.stat().st_size)
    facts = {"digest": hashlib.sha256(repr(rows).encode()).hexdigest(), "sizes": sizes}
    schema = SCHEMA.with_metadata({"about": "mvlm: a row a picture in tar shards", "facts": json.dumps(facts)})
    arrays = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), SCHEMA.types, strict=True)]
    with open(aside / INDEX, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
        writer.close()
        os.fsync(sink.fileno())
    aside.rename(out)
    return {"pictures": len(found), "shards": len(plan), "bytes": sum(sizes), "kept": kept}


def _checked(name: str, path: str | Path) -> File:
    if os.path.isabs(name) or name != os.path.normpath(name) or name.split(os.sep)[0] in (os.curdir, os.pardir):
        raise ValueError(f"{name!r} is no plain path below the folder, so it cannot be packed")
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no file, so it cannot be packed: remove it")
    return File(name, str(path), found.st_size, found.st_ctime_ns)


def _cut(files: list[File], limit: int) -> list[list[File]]:
    """In order, so many to a shard that their bytes stay within the limit."""
    plan, room = [], 0
    for file in files:
        if not plan or file.size > room:
            plan.append([])
            room = limit
        plan[-1].append(file)
        room -= file.size
    return plan


def _check_room(aside: Path, files: list[File]) -> None:
    """Raises ValueError unless the disk has room for what is not there yet: a header of up to three blocks, the file in whole
    blocks, and some 100 bytes of index."""
    there = sum(old.stat().st_size for old in aside.iterdir())
    needed = sum(3 * BLOCK + -(-file.size // BLOCK) * BLOCK + 100 for file in files) - there
    if needed > (free := shutil.disk_usage(aside).free):
        raise ValueError(
            f"{len(files):,} files need about {needed / 1e9:.2f} GB more in {aside}, and {free / 1e9:.2f} GB are free there: make room, "
            "or name a folder on another disk with out="
        )


def _write(shard: Path, files: list[File], done: Callable[[int], None]) -> list[tuple[int, int, int]]:
    """A shard, whole or not at all; offset, size and CRC-32 of each file in it."""
    aside, members = shard.with_suffix(".half"), []
    with open(aside, "wb") as sink:
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, path, size, _ in files:
                data = Path(path).read_bytes()
                if len(data) != size:
                    raise ValueError(f"{path} changed while it was packed ({size} bytes, now {len(data)}): start again")
                member = tarfile.TarInfo(name)  # no time and no owner: the same files make the same shards
                member.size = size
                tar.addfile(member, io.BytesIO(data))
                members.append((tar.offset - -(-size // BLOCK) * BLOCK, size, zlib.crc32(data)))
                done(size)
        os.fsync(sink.fileno())  # a crash of the machine must not leave a whole name on half a file
    aside.replace(shard)
    return members


def _read_back(shard: Path, files: list[File]) -> list[tuple[int, int, int]] | None:
    """What `_write` gave for a shard of an earlier attempt; None if it is not of these files as they are now."""
    if shard.stat().st_mtime_ns <= max(file.time for file in files):
        return None
    try:
        with tarfile.open(shard) as tar:
            there = tar.getmembers()
            if [(member.name, member.size) for member in there] != [(file.name, file.size) for file in files]:
                return None
            return [(m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read())) for m in there]
    except tarfile.TarError:
        return None


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    options = {"images": "", "out": "", "shard_mb": "512", "follow_links": "false"}
    try:
        for argument in arguments:
            key, _, value = argument.partition("=")
            if key not in options:
                near = difflib.get_close_matches(key, options, 1, 0.5)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"there is no key {key!r}{meant} (there are: {', '.join(options)})")
            options[key] = value
        images, out = Path(options["images"]), Path(options["out"])
        if not options["images"] or not images.is_dir():
            raise ValueError(f"images={options['images']} is no folder")
        if not options["out"] or is_url(options["out"]):
            raise ValueError(
                f"out={options['out']} must be a new folder on this machine; copy it to a store afterwards"
            )
        if out.resolve().is_relative_to(images.resolve()):
            raise ValueError(f"out={out} lies in images={images}, so the shards would be packed, too")
        if not options["shard_mb"].isdecimal() or options["follow_links"] not in ("true", "false"):
            raise ValueError("shard_mb is a whole number, and follow_links true or false")
        told = pack(walk(images, options["follow_links"] == "true"), out, int(options["shard_mb"]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    kept = f", {told['kept']} of them from an earlier attempt" if told["kept"] else ""
    size = f"{told['bytes'] / 1e9:.2f} GB"
    shards = f"{told['shards']:,} shard{'s' * (told['shards'] != 1)}"
    print(f"{told['pictures']:,} files in {shards}{kept}, {size}: data.images={out}")


if __name__ == "__main__":
    main(sys.argv[1:])
