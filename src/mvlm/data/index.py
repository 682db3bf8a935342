"""An annotation file as a table on disk: read and checked once, then shared by every process that trains on it.

The table is an Arrow file, a row a record of the annotation file. It is mapped into memory, so opening it reads next to nothing, the
pages belong to the system's cache, and the workers of all devices share them. Building it takes a core about 1.5 minutes a million
samples, nearly all of them for the checks; `python bench.py target=index` measures.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import rich.progress

from mvlm.data.lock import taken

SCHEMA = pa.schema(
    {"record": pa.binary(), "image": pa.binary(), "words": pa.int32(), "problem": pa.string()},
    metadata={"about": "mvlm: a row a record of an annotation file"},
)
"""See `Row`."""

CHUNK = 4 << 20
"""Bytes that are read at a time, and bytes of records that are written at a time."""
SLOW = 64 << 20
"""Bytes from which reading takes long enough to show a bar."""
DOUBTFUL = 32
"""Characters before the end of what was read so far in which a number, a word or an error may look otherwise once more is read."""
SPACE = re.compile(r"[ \t\n\r]*")
CODE = hashlib.sha256(
    b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("index", "prompt", "dataset", "shards"))
).hexdigest()[:16]
"""Rows that other code checked are read again."""

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What is kept of a record."""

    record: bytes | None
    """JSON of its fields; None where there is a problem."""
    image: bytes | None
    """Path of its picture below the folder of pictures, as the file system has it; None without one."""
    words: int
    """Words of the dialogue, at least 1; negative without a picture, 0 where there is a problem."""
    problem: str | None = None
    """JSON of [id or null, kind, reason]; None for a good record."""


class Index:
    """The rows of an annotation file.

    Its place is `<cache>/index/`, and its name depends on the file's path and on `key`; it may be deleted at any time. It is built
    again when the annotation file has another size or time (not by its content: hashing gigabytes at every start takes longer than
    opening; the content's hash is kept as `sha256`), when files came or went in a folder of pictures, when the code of the checks is
    another one, and when it is damaged so that its rows cannot be found (another letter in a text is not noticed). Of several
    processes one builds and the others wait.

    Args:
        annotations: a JSON file with a list of records, or `.jsonl` with one after the other.
        images: folder that the keys of `folders` start from.
        cache: where all that is made once is kept.
        key: what else the rows depend on.
        row: record -> its row.
        folders: filled by `row` with the folders of pictures it looked into, and their `changed` time before it did.

    Raises:
        ValueError: the annotation file cannot be read, or changed meanwhile; the cache cannot be written.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path | None,
        cache: Path,
        key: Collection[str | None],
        row: Callable[[Any], Row],
        folders: dict[str, int | None],
    ) -> None:
        name = json.dumps([os.path.realpath(annotations), *key])
        self.path = cache / "index" / f"{annotations.stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.arrow"
        self.stamp = _stamp(annotations)
        if self._open(images):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                _wait_for(lock, annotations)
                if not self._open(images):  # another process may have built it meanwhile
                    self._build(annotations, row, folders)
                    self._map()
        except OSError as error:
            raise ValueError(
                f"{annotations} cannot be indexed: {error}. The index is kept in {self.path.parent} and is about as large as the file; "
                "set MVLM_CACHE to a folder on a local disk that has the room and that you may write to"
            ) from error

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def words(self) -> np.ndarray:
        """int32 (N,): see `Row`."""
        return self.table["words"].to_numpy()

    def record(self, number: int) -> dict[str, Any]:
        """A good record's fields."""
        return json.loads(self.table["record"][number].as_py())

    def image(self, number: int) -> str | None:
        """Path of its picture below the folder of pictures."""
        name = self.table["image"][number].as_py()
        return None if name is None else os.fsdecode(name)

    def images(self, numbers: np.ndarray) -> list[str]:
        """The distinct pictures of these records, in order of first use."""
        distinct: dict[bytes, None] = {}
        for some in self.table["image"].take(pa.array(numbers)).drop_null().chunks:
            distinct |= dict.fromkeys(some.to_pylist())
        return [os.fsdecode(name) for name in distinct]

    def showing(self, images: Collection[str]) -> np.ndarray:
        """Numbers of the records that show one of these pictures, ascending."""
        wanted = pa.array([os.fsencode(name) for name in images], pa.binary())
        return np.flatnonzero(pc.is_in(self.table["image"], value_set=wanted).to_numpy())

    def problem(self, number: int) -> tuple[str | None, str, str]:
        """(id, kind, reason) of a bad record."""
        return tuple(json.loads(self.table["problem"][number].as_py()))

    def __getstate__(self) -> dict[str, Any]:
        """Where it lies; the process that gets this maps the same pages."""
        return {"path": self.path, "stamp": self.stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._map()["stamp"] != self.stamp:
            raise ValueError(f"{self.path} was built anew, for its annotation file changed: start again")

    def _open(self, images: Path | None) -> bool:
        """Map the table, if it is there, whole, and of these very files."""
        try:
            facts = self._map()
            self.table.validate(full=True)
        except FileNotFoundError:
            return False
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged and is built anew: %s", self.path, error)
            return False
        seen = facts["folders"].items()
        return facts["stamp"] == self.stamp and all(changed(Path(images or ".", name)) == then for name, then in seen)

    def _map(self) -> dict[str, Any]:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        if not reader.schema.equals(SCHEMA, check_metadata=True):
            raise ValueError(f"its columns are {reader.schema.names}")
        # The last batch is empty and carries what is known only at the end.
        facts = json.loads(
            reader.get_batch_with_custom_metadata(reader.num_record_batches - 1).custom_metadata[b"facts"]
        )
        self.table, self.sha256 = reader.read_all(), facts["sha256"]
        return facts

    def _build(self, annotations: Path, row: Callable[[Any], Row], folders: dict[str, int | None]) -> None:
        aside, digest, rows, size = self.path.with_suffix(".part"), hashlib.sha256(), [], 0
        bar = {"description": f"indexing {annotations.name}", "transient": True, "disable": self.stamp[0] < SLOW}

        def batch() -> pa.RecordBatch:
            columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
            return pa.record_batch([pa.array(c, t) for c, t in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)

        try:
            with (
                rich.progress.open(annotations, "rb", **bar) as file,
                open(aside, "wb") as sink,
                pa.ipc.new_file(sink, SCHEMA) as writer,
            ):
                for record in read_records(file, annotations, digest.update):
                    rows.append(row(record))
                    size += len(rows[-1].record or rows[-1].problem)
                    if size > CHUNK:
                        writer.write_batch(batch())
                        rows, size = [], 0
                writer.write_batch(batch())
                rows = []
                facts = {"stamp": self.stamp, "sha256": digest.hexdigest(), "folders": folders}
                writer.write_batch(batch(), custom_metadata={"facts": json.dumps(facts)})
                writer.close()
                os.fsync(sink.fileno())  # a crash of the machine must not leave a whole name on half a file
            if _stamp(annotations) != self.stamp:
                raise ValueError(f"{annotations} changed while it was read: start again")
            aside.replace(self.path)
        finally:
            aside.unlink(missing_ok=True)


class Kept:
    """The numbers from 0 to `total` without some, as a sequence that takes room for the latter only.

    Args:
        dropped: ascending.
    """

    def __init__(self, total: int, dropped: np.ndarray) -> None:
        self.total, self.dropped = total, dropped
        self._kept_before = dropped - np.arange(len(dropped))

    def __len__(self) -> int:
        return self.total - len(self.dropped)

    def __getitem__(self, index: int) -> int:
        index = range(len(self))[index]
        return index + bisect_right(self._kept_before, index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.delete(np.arange(self.total, dtype=dtype), self.dropped)


def changed(path: Path) -> int | None:
    """When a folder last got or lost a file, in nanoseconds; None if there is none."""
    try:
        return os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return None


def read_records(file: BinaryIO, path: Path, seen: Callable[[bytes], Any] = lambda data: None) -> Iterator[Any]:
    """The values of a JSON list (or, in `.jsonl`, of one value after the other), a few megabytes in memory at a time.

    Args:
        path: named in errors; its suffix tells the format.
        seen: told all bytes in order.

    Raises:
        ValueError: what `json.loads` of the whole file would say, with line and column; no list.
    """
    lines, scan, decode = (
        path.suffix == ".jsonl",
        json.JSONDecoder().raw_decode,
        codecs.getincrementaldecoder("utf-8")(),
    )
    text, at = "", 0
    line, column, fed = 0, 0, 0  # of the beginning of `text`, from 0; bytes read

    def more() -> bool:
        """Read on, and drop what is done; whether there was anything to read."""
        nonlocal text, at, line, column, fed
        data, pending = file.read(max(CHUNK, len(text) - at)), len(decode.getstate()[0])  # a long record doubles it
        try:
            read = decode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {fed - pending + error.start}") from None
        if not data:
            return False
        seen(data)
        column = at - 1 - text.rfind("\n", 0, at) + (0 if "\n" in text[:at] else column)
        line, fed = line + text.count("\n", 0, at), fed + len(data)
        text, at = text[at:] + read, 0
        return True

    def fail(message: str, place: int) -> None:
        begin = text.rfind("\n", 0, place) + 1
        row = line + text.count("\n", 0, place) + 1
        where = f"line {row}, column {place - begin + 1 + (0 if begin else column)}"
        cure = "; a file with a record a line ends in .jsonl" if message == "Extra data" and not lines else ""
        raise ValueError(f"{path} is not JSON: {where}: {message}{cure}")

    def peek() -> str:
        """The next character that is no space; nothing at the end."""
        nonlocal at
        while (at := SPACE.match(text, at).end()) == len(text) and more():
            pass
        return text[at : at + 1]

    def value() -> Any:
        nonlocal at
        while True:
            try:
                found, end = scan(text, at)
            except json.JSONDecodeError as error:
                sure = error.pos < len(text) - DOUBTFUL and not error.msg.startswith("Unterminated string")
                if sure or not more():
                    fail(error.msg, error.pos)
            except RecursionError:
                raise ValueError(f"{path} is nested too deeply to be a list of records") from None
            except ValueError as error:  # a number of thousands of digits
                fail(str(error), at)
            else:
                if end < len(text) - DOUBTFUL or not more():
                    at = end
                    return found

    if peek() == "\ufeff":
        fail("Unexpected UTF-8 BOM (decode using utf-8-sig)", at)
    if lines:
        while peek():
            yield value()
        return
    if peek() != "[":
        kind = type(value()).__name__
        if peek():
            fail("Extra data", at)
        raise ValueError(f"{path} must hold a list of records, not {kind}")
    at += 1
    if peek() != "]":
        yield value()
        while peek() == ",":
            at += 1
            peek()
            yield value()
        if text[at : at + 1] != "]":
            fail("Expecting ',' delimiter", at)
    at += 1
    if peek():
        fail("Extra data", at)


def _stamp(annotations: Path) -> list[Any]:
    """By which a file, and the code that checks it, are known again."""
    try:
        found = annotations.stat()
    except FileNotFoundError:
        raise ValueError(f"there is no annotation file {annotations}") from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, CODE]


def _wait_for(lock: Any, annotations: Path) -> None:
    """Take the lock; the system itself drops it when this process ends, however it ends."""
    if not taken(lock):
        log.warning("another process indexes %s; waiting for it", annotations)
        taken(lock, wait=True)
