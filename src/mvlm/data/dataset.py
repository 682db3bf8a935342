"""A LLaVA-format JSON file and its image folder as a map-style dataset of samples."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from mvlm.batch import IMAGE_TOKEN
from mvlm.data.cache import cache_folder
from mvlm.data.image import PictureError, Pictures
from mvlm.data.index import Index, Kept, Row, changed
from mvlm.data.prompt import ASSISTANT, HUMAN, IMAGE_TAG, Encoded, Template, check_turns
from mvlm.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MANY_SUBSTITUTES = 100
"""So many unreadable pictures in a row mean that the folder is gone, and not that a file is damaged."""


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


@dataclass(frozen=True)
class Skipped:
    """A record that is left out, and why."""

    record: int
    """Its place in the file, from 0."""
    id: str
    kind: Literal["missing", "format"]
    reason: str


class RecordError(ValueError):
    """A record that does not fit the format; the message names file, record and field."""


class MissingPicture(ValueError):
    """A record's picture is not in the folder."""


class LlavaDataset(Dataset[Sample]):
    """Samples of a file `[{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}, ...]}, ...]`.

    Every record is checked once, its picture for being there, and is then found in the file's index (`mvlm.data.index`), which all
    processes share: this object itself is small. A damaged picture shows when it is decoded.

    Args:
        annotations: the JSON file; `.jsonl` has a record a line instead of a list.
        images: folder that the records' `image` paths start from; None where no record has one.
        template: how dialogues become text.
        image_tokens: M, ids that stand for a picture.
        max_length: longest text in ids; the rest is cut off.
        source: name of this dataset in reports.
        on_bad_sample: `stop` raises at the first bad record. `skip` leaves bad records out (`skipped` lists them, a
            warning counts them), and puts the next readable sample in the place of one whose picture turns out
            damaged, with a warning, so that order and number of samples stay as planned.
        features: of pictures that a frozen tower has seen already: path (as in `pictures_used`) to (N, Dv).
        exclude: numbers of records to leave out, from the doctor's list.
        follow_links: allow symbolic links that lead out of `images`.
        cache: the folder of the index; MVLM_CACHE, or `cache`, if None.

    Raises:
        ValueError: the file cannot be read, is no list, or nothing is left of it; with `stop`, a RecordError.
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
        exclude: Collection[int] = (),
        follow_links: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        if on_bad_sample not in ("stop", "skip"):
            raise ValueError(f"on_bad_sample is stop or skip, not {on_bad_sample!r}")
        if image_tokens < 1 or max_length < 1:
            raise ValueError(f"image_tokens and max_length must be positive, not {image_tokens} and {max_length}")
        self.annotations, self.images = Path(annotations), None if images is None else Path(images)
        self.template, self.tokenizer, self.pictures = template, tokenizer, pictures
        self.image_tokens, self.max_length = image_tokens, max_length
        self.source = source or self.annotations.stem
        self.on_bad_sample, self.features, self.follow_links = on_bad_sample, features, follow_links
        self.cache = Path(cache or cache_folder())
        self._root = "" if images is None else os.path.join(os.path.realpath(images), "")
        self._real_folders: dict[str, str] = {}
        self._read(set(exclude))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place among the good records.

        Raises:
            PictureError: with `stop`, or when nearly everything is damaged; the message names the record.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for step in range(min(MANY_SUBSTITUTES, len(self))):
            place = (index + step) % len(self)
            try:
                return self._sample(place)
            except PictureError as error:
                message = f"{self._where(self._kept[place])}: {error}"
                if self.on_bad_sample == "stop":
                    raise PictureError(message) from error
                log.warning("%s; the next sample takes its place", message)
        raise PictureError(f"{min(MANY_SUBSTITUTES, len(self))} pictures in a row cannot be read, the last: {message}")

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
        return None if name is None else str(self.images / name)

    def showing(self, pictures: Iterable[str]) -> np.ndarray:
        """Places of the samples that show one of these pictures (paths as `picture` gives them), ascending."""
        inside = [PurePath(path) for path in pictures if self.images and PurePath(path).is_relative_to(self.images)]
        numbers = self.index.showing([str(path.relative_to(self.images)) for path in inside])
        numbers = np.setdiff1d(numbers, self._kept.dropped)
        return numbers - np.searchsorted(self._kept.dropped, numbers)

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
        return [str(self.images / name) for name in self.index.images(np.asarray(self._kept)[places])]

    def _sample(self, index: int) -> Sample:
        record = self.record(index)
        name, encoded = record.get("image"), self.encode(record)
        sample = Sample(str(record.get("id", self._kept[index])), self.source, encoded.input_ids, encoded.labels)
        # A picture without a tag, or whose tag was cut off, has no place in the text: the reference trains on the
        # text alone.
        if name is None or IMAGE_TOKEN not in encoded.input_ids:
            return sample
        path = str(self.images / name)
        if self.features is not None and path in self.features:
            return replace(sample, features=self.features[path], picture=path)
        return replace(sample, pixels=self.pictures(path), picture=path)

    def _read(self, exclude: set[int]) -> None:
        """Open the index, which is built where there is none, and leave out what is bad or excluded."""
        folders: dict[str, int | None] = {}
        root = None if self.images is None else os.path.realpath(self.images)
        self.index = Index(
            *(self.annotations, self.images, self.cache, (root, self.template.name, str(self.follow_links))),
            lambda record: self._row(record, folders),
            folders,
        )
        total, bad = len(self.index), np.flatnonzero(self.index.words == 0)
        excluded = np.array(sorted(number for number in exclude if 0 <= number < total), np.int64)
        self.excluded, self._kept = len(excluded), Kept(total, np.union1d(bad, excluded))
        self.skipped: list[Skipped] = []
        left = np.setdiff1d(bad, excluded).tolist()
        for number in left:
            name, kind, reason = self.index.problem(number)
            if self.on_bad_sample == "stop":
                more = f" ({len(left) - 1} more records are bad; python doctor.py lists all)" if len(left) > 1 else ""
                raise RecordError(f"{self._where(number, name)}: {reason}{more}")
            self.skipped.append(Skipped(number, str(number) if name is None else name, kind, reason))
        if self.skipped:
            first = self.skipped[0]
            log.warning(
                "%s: %d of %d records skipped; the first is record %d: %s",
                *(self.annotations, len(self.skipped), total, first.record, first.reason),
            )
        if not len(self):
            left_out = f", {len(self.skipped)} bad and {self.excluded} excluded" if total else ""
            raise ValueError(f"{self.annotations} holds no sample: {total} records{left_out}")

    def _row(self, record: Any, folders: dict[str, int | None]) -> Row:
        """What the index keeps of a record."""
        try:
            self._check(record, folders)
        except ValueError as error:
            name = record.get("id") if isinstance(record, dict) else None
            kind = "missing" if isinstance(error, MissingPicture) else "format"
            return Row(None, None, 0, json.dumps([None if name is None else str(name), kind, str(error)]))
        kept = {field: record[field] for field in ("id", "image", "conversations") if field in record}
        image, words = record.get("image"), max(1, sum(len(turn["value"].split()) for turn in record["conversations"]))
        return Row(
            json.dumps(kept, separators=(",", ":")).encode(),
            None if image is None else os.fsencode(PurePath(image)),
            -words if image is None else words,
        )

    def _check(self, record: Any, folders: dict[str, int | None]) -> None:
        """Everything of a record that shows without decoding its picture or tokenising its text."""
        if not isinstance(record, dict):
            raise ValueError(f"a record is an object with `conversations`, not {type(record).__name__}")
        if "conversations" not in record:
            raise ValueError("no field `conversations`")
        conversations, name = record["conversations"], record.get("image")
        check_turns(conversations)
        for number, turn in enumerate(conversations, 1):
            if turn["from"] not in (HUMAN, ASSISTANT):
                raise ValueError(f"turn {number} has {turn['from']!r} in `from`; it must be {HUMAN!r} or {ASSISTANT!r}")
            turn["value"].encode()  # half a surrogate pair is no text; the error is a ValueError
        if isinstance(name, list):
            raise ValueError(f"`image` lists {len(name)} pictures; a dialogue takes one")
        if name is not None:
            tagged = [number for number, turn in enumerate(conversations, 1) if IMAGE_TAG in turn["value"]]
            if len(tagged) > 1:
                raise ValueError(f"turns {tagged} each have an {IMAGE_TAG}, but there is one picture")
            self._find(name, folders)
        self.template.render(conversations, name is not None)

    def _find(self, name: Any, folders: dict[str, int | None]) -> None:
        """Raises ValueError unless `image` names a file inside the folder of pictures."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"`image` is {name!r}, not a path")
        if self.images is None:
            raise ValueError(f"`image` is {name!r}, but this dataset was given no image folder")
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise ValueError(f"`image` {name!r} leads out of the image folder")
        path, folder = os.path.join(self.images, name), os.path.dirname(name)
        if folder not in folders:
            folders[folder] = changed(Path(os.path.dirname(path)))
        if not os.path.isfile(path):
            raise MissingPicture(f"picture {path} is missing")
        if not self.follow_links and not self._inside(path):
            raise ValueError(
                f"picture {path} is a link that leads out of the image folder; follow_links=True allows it"
            )

    def _inside(self, path: str) -> bool:
        """Whether a path, all links followed, stays in the folder. Folders are looked up once: there may be a million
        files."""
        if (folder := os.path.dirname(path)) not in self._real_folders:
            self._real_folders[folder] = os.path.join(os.path.realpath(folder), "")
        real = os.path.realpath(path) if os.path.islink(path) else self._real_folders[folder]
        return real.startswith(self._root)

    def _where(self, number: int, name: str | None = None) -> str:
        return f"{self.annotations}, record {number}" + ("" if name is None else f" (id {name})")
