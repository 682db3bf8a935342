"""A LLaVA-format JSON file and its image folder as a map-style dataset of samples."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from mvlm.batch import IGNORE_INDEX, Skipped
from mvlm.data.cache import cache_folder
from mvlm.data.image import PictureError, Pictures
from mvlm.data.index import Index, Kept, Row, changed
from mvlm.data.prompt import ASSISTANT, HUMAN, IMAGE_TAG, DialogueError, Encoded, Template, check_turns
from mvlm.data.shards import ShardError, shards_of
from mvlm.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MISSING = "missing picture"
"""The kind of the records whose picture is not in the folder."""

OUTSIDE = "picture outside its folder"

CURE = (
    "Repair or remove it (python doctor.py finds all, exclude=doctor/exclude.json trains without them), or set on_bad_sample=skip, which "
    "counts such samples"
)


@dataclass(frozen=True)
class Sample:
    """A dialogue, and its picture if it has one, ready to be collated."""

    id: str
    source: str
    input_ids: list[int]
    labels: list[int]
    pixels: Tensor | None = None
    """(3, S, S), or None for text only and where there are `features`."""
    features: Tensor | None = None
    """(N, Dv), what a frozen tower gave for the picture earlier."""
    picture: str | None = None
    """Path of the picture."""
    skipped: Skipped | None = None
    """Why this sample is a blank one."""


class RecordError(ValueError):
    """A record that does not fit the format; the message names source, file, record and field."""


class LlavaDataset(Dataset[Sample]):
    """Samples of a file `[{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}, ...]}, ...]`.

    Every record is checked once, its picture for being there, and is then found in the file's index (`mvlm.data.index`), which all
    processes share: this object itself is small. A damaged picture shows when it is decoded.

    Args:
        annotations: the JSON file; `.jsonl` has a record a line instead of a list.
        images: folder that the records' `image` paths start from, or folder or URL of its shards (`mvlm.data.shards`); None where no
            record has one.
        template: how dialogues become text.
        image_tokens: M, ids that stand for a picture.
        max_length: longest text in ids; the rest is cut off.
        source: name of this dataset in reports.
        on_bad_sample: `stop` raises at the first bad record. `skip` leaves bad records out (`skipped` lists them, a
            warning counts them). A sample whose picture turns out damaged when it is decoded keeps its place and
            becomes a blank one: one token, no label, no picture, and `Sample.skipped`. So order and number of samples
            stay as planned whoever loads them, and no other sample is seen twice or out of its place.
        features: of all pictures, by a frozen tower: path (as in `pictures_used`) to (N, Dv). One that is not among
            them could not be read.
        exclude: numbers of records to leave out; or what gives them for the annotation file's SHA-256, as the doctor's list does.
        follow_links: allow symbolic links that lead out of `images`.
        cache: the folder of the index; MVLM_CACHE, or `cache`, if None.

    Raises:
        ValueError: the file cannot be read or is no list; with `stop`, a RecordError.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path | None,
        template: Template,
        tokenizer: Tokenizer,
        pictures: Pictures,
        *,
        image_tokens: int,
        max_length: int = 2048,
        source: str = "",
        on_bad_sample: Literal["stop", "skip"] = "stop",
        features: Mapping[str, Tensor] | None = None,
        exclude: Collection[int] | Callable[[str], Collection[int]] = (),
        follow_links: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        if on_bad_sample not in ("stop", "skip"):
            raise ValueError(f"on_bad_sample is stop or skip, not {on_bad_sample!r}")
        if image_tokens < 1 or max_length < 1:
            raise ValueError(f"image_tokens and max_length must be positive, not {image_tokens} and {max_length}")
        self.cache = Path(cache or cache_folder())
        self.shards = shards_of(images, self.cache)
        self.annotations, self.images = Path(annotations), None if images is None or self.shards else Path(images)
        self.template, self.tokenizer, self.pictures = template, tokenizer, pictures
        self.image_tokens, self.max_length = image_tokens, max_length
        self.source = source or self.annotations.stem
        self.on_bad_sample, self.features, self.follow_links = on_bad_sample, features, follow_links
        self._root = "" if self.images is None else os.path.join(os.path.realpath(self.images), "")
        self._real_folders: dict[str, str] = {}
        self._read(exclude)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place among the good records.

        Raises:
            PictureError: with `stop`, its picture cannot be read; the message names the record.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            return self._sample(index)
        except PictureError as error:
            skipped = self.unreadable(index, error)
            blank = [self.tokenizer.pad_id], [IGNORE_INDEX]
            return Sample(skipped.id, self.source, *blank, skipped=skipped)

    def unreadable(self, index: int, error: PictureError) -> Skipped:
        """What is told of a sample whose picture cannot be read.

        Raises:
            PictureError: with `stop`.
        """
        number = self._kept[index]
        name = shown(self.index.record(number).get("id", number), 80)
        if self.on_bad_sample == "stop":
            raise PictureError(f"{self._where(number, name)}: {shown(error)}. {CURE}", error.kind) from None
        return Skipped(self.source, number, name, error.kind, shown(error))

    def record(self, index: int) -> dict[str, Any]:
        """The record behind a sample: its `id`, `image` and `conversations`, as far as it has them."""
        return self.index.record(self._kept[index])

    def encode(self, record: dict[str, Any]) -> Encoded:
        """Ids and labels of a record."""
        return self.template.encode(
            record["conversations"],
            self.tokenizer,
            image_tokens=self.image_tokens,
            max_length=self.max_length,
            has_image=record.get("image") is not None,
        )

    def record_number(self, index: int) -> int:
        """Place of a sample's record in the file, from 0; what `exclude` takes."""
        return self._kept[index]

    def picture(self, index: int) -> str | None:
        """Path of a sample's picture, or None."""
        name = self.index.image(self._kept[index])
        return None if name is None else self._path(name)

    def showing(self, pictures: Iterable[str]) -> np.ndarray:
        """Places of the samples that show one of these pictures (paths as `picture` gives them), ascending."""
        if self.shards:
            names = [name for path in pictures if (name := self.shards.name(path)) is not None]
        else:
            inside = [PurePath(path) for path in pictures if self.images and PurePath(path).is_relative_to(self.images)]
            names = [str(path.relative_to(self.images)) for path in inside]
        numbers = self.index.showing(names)
        numbers = np.setdiff1d(numbers, self._kept.dropped)
        return numbers - np.searchsorted(self._kept.dropped, numbers)

    @property
    def excluded(self) -> list[int]:
        """Numbers of the records that `exclude` left out."""
        return np.setdiff1d(self._kept.dropped, [one.record for one in self.skipped]).tolist()

    @property
    def sha256(self) -> str:
        """Of the annotation file as it was read."""
        return self.index.sha256

    @property
    def lengths(self) -> np.ndarray:
        """int32 (N,): words of each dialogue, counted negative where it has no picture; what the samples are grouped by.

        As the reference's `modality_lengths`, except that a dialogue without a word counts as one, not zero, since
        zero has no sign."""
        return np.delete(self.index.words, self._kept.dropped)

    @property
    def pictures_used(self) -> list[str]:
        """Paths of the distinct pictures, in order of first use."""
        return self.pictures_of(np.arange(len(self)))

    def pictures_of(self, places: np.ndarray) -> list[str]:
        """The same of some samples."""
        return [self._path(name) for name in self.index.images(np.asarray(self._kept)[places])]

    def _path(self, name: str) -> str:
        return self.shards.find(name) if self.shards else str(self.images / name)

    def _sample(self, index: int) -> Sample:
        record = self.record(index)
        name, encoded = record.get("image"), self.encode(record)
        sample = Sample(shown(record.get("id", self._kept[index]), 80), self.source, encoded.input_ids, encoded.labels)
        # As the reference does: without a place for the picture it is a text.
        if name is None or encoded.unseen:
            return sample
        path = self.picture(index)
        if self.features is not None and path in self.features:
            return replace(sample, features=self.features[path], picture=path)
        pixels = self.pictures(path)
        if self.features is not None:
            raise PictureError(f"{path}: could not be read when the features were computed; start again", "no features")
        return replace(sample, pixels=pixels, picture=path)

    def _read(self, exclude: Collection[int] | Callable[[str], Collection[int]]) -> None:
        """Open the index, which is built where there is none, and leave out what is bad or excluded."""
        folders: dict[str, int | None] = {}
        root = self.shards.stamp if self.shards else None if self.images is None else os.path.realpath(self.images)
        self.index = Index(
            *(self.annotations, self.images, self.cache, (root, self.template.name, str(self.follow_links))),
            lambda record: self._row(record, folders),
            folders,
        )
        total, bad = len(self.index), np.flatnonzero(self.index.words == 0)
        numbers = {*(exclude(self.sha256) if callable(exclude) else exclude)}
        excluded = np.array(sorted(number for number in numbers if 0 <= number < total), np.int64)
        self._kept = Kept(total, np.union1d(bad, excluded))
        self.skipped: list[Skipped] = []
        left = np.setdiff1d(bad, excluded).tolist()
        for number in left:
            name, kind, reason = self.index.problem(number)
            if self.on_bad_sample == "stop":
                more = f" ({len(left) - 1} more records of this file are bad)" if len(left) > 1 else ""
                raise RecordError(f"{self._where(number, name)}: {reason}{more}. {CURE}")
            self.skipped.append(Skipped(self.source, number, str(number) if name is None else name, kind, reason))
        if self.skipped:
            first = self.skipped[0]
            log.warning(
                "%s: %d of %d records skipped; the first is record %d: %s",
                *(self.annotations, len(self.skipped), total, first.record, first.reason),
            )

    def _row(self, record: Any, folders: dict[str, int | None]) -> Row:
        """What the index keeps of a record."""
        try:
            self._check(record, folders)
        except DialogueError as error:
            name = record.get("id") if isinstance(record, dict) else None
            name = None if isinstance(name, list | dict | None) else shown(name, 80)
            return Row(None, None, 0, json.dumps([name, error.kind, shown(error)]))
        kept = {field: record[field] for field in ("id", "image") if field in record}
        kept["conversations"] = [
            turn if len(turn) == 2 else {"from": turn["from"], "value": turn["value"]}
            for turn in record["conversations"]
        ]
        image, words = record.get("image"), max(1, sum(len(turn["value"].split()) for turn in record["conversations"]))
        return Row(
            json.dumps(kept, separators=(",", ":")).encode(),
            None if image is None else os.fsencode(PurePath(image)),
            -words if image is None else words,
        )

    def _check(self, record: Any, folders: dict[str, int | None]) -> None:
        """Everything of a record that shows without decoding its picture or tokenising its text."""
        if not isinstance(record, dict):
            raise DialogueError(f"a record is an object with `conversations`, not {type(record).__name__}")
        if "conversations" not in record:
            raise DialogueError("no field `conversations`")
        if isinstance(record.get("id"), list | dict):
            raise DialogueError(f"`id` is a {type(record['id']).__name__}; it must be a text or a number")
        conversations, name = record["conversations"], record.get("image")
        check_turns(conversations)
        for number, turn in enumerate(conversations, 1):
            if turn["from"] not in (HUMAN, ASSISTANT):
                raise DialogueError(
                    f"turn {number} has {turn['from'][:40]!r} in `from`; it must be {HUMAN!r} or {ASSISTANT!r}",
                    "unknown speaker",
                )
            try:
                turn["value"].encode()
            except UnicodeEncodeError as error:
                told = f"turn {number} has half a surrogate pair at character {error.start}, which is no text"
                raise DialogueError(told, "no text") from None
        if isinstance(name, list):
            raise DialogueError(f"`image` lists {len(name)} pictures; a dialogue takes one", "several pictures")
        if name is not None:
            tagged = [number for number, turn in enumerate(conversations, 1) if IMAGE_TAG in turn["value"]]
            if len(tagged) > 1:
                raise DialogueError(
                    f"turns {tagged} each have an {IMAGE_TAG}, but there is one picture", "several placeholders"
                )
            self._find(name, folders)
        self.template.pieces(conversations, name is not None)

    def _find(self, name: Any, folders: dict[str, int | None]) -> None:
        """Raises DialogueError unless `image` names a file inside the folder of pictures."""
        if not isinstance(name, str):
            raise DialogueError(f"`image` is a {type(name).__name__}, not a path")
        if not name or "\0" in name:
            raise DialogueError(f"`image` is {name!r}, not a path")
        if self.images is None and self.shards is None:
            raise DialogueError(
                f"`image` is {name!r}, but no image folder was given (data.images=...)", "no image folder"
            )
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise DialogueError(f"`image` {name!r} leads out of the image folder", OUTSIDE)
        if self.shards:
            try:
                return self.shards.check(name)
            except ShardError as error:
                raise DialogueError(str(error), MISSING) from None
        path, folder = os.path.join(self.images, name), os.path.dirname(name)
        if folder not in folders:
            folders[folder] = changed(Path(os.path.dirname(path)))
        if not os.path.isfile(path):
            told = "is no file" if os.path.exists(path) else "is missing"
            raise DialogueError(f"picture {path} {told}", MISSING)
        if not self.follow_links and not self._inside(path):
            raise DialogueError(
                f"picture {path} is a link that leads out of the image folder; follow_links=true allows it", OUTSIDE
            )

    def _inside(self, path: str) -> bool:
        """Whether a path, all links followed, stays in the folder. Folders are looked up once: there may be a million
        files."""
        if (folder := os.path.dirname(path)) not in self._real_folders:
            self._real_folders[folder] = os.path.join(os.path.realpath(folder), "")
        real = os.path.realpath(path) if os.path.islink(path) else self._real_folders[folder]
        return real.startswith(self._root)

    def _where(self, number: int, name: str | None = None) -> str:
        told = "" if name is None else f" (id {name})"
        source = "" if self.source == str(self.annotations) else f"source {self.source}: "
        return f"{source}{self.annotations}, record {number}{told}"


def shown(value: object, length: int = 300) -> str:
    """Something out of a file as it may be printed: at most so long, in one line, nothing that moves a cursor or turns a text round."""
    text = str(value)
    text = text if len(text) <= length else text[: length - 1] + "\u2026"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
