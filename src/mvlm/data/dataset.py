"""A LLaVA-format JSON file and its image folder as a map-style dataset of samples."""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from mvlm.batch import IMAGE_TOKEN
from mvlm.data.image import PictureError, Pictures
from mvlm.data.prompt import ASSISTANT, HUMAN, IMAGE_TAG, Encoded, Template, check_turns
from mvlm.data.tokenizer import Tokenizer

SHOW_PROGRESS = 100_000
"""Records from which reading takes long enough to show a bar."""

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

    Every record is checked in one pass here, its picture for being there; a damaged picture shows when it is decoded.

    Args:
        annotations: the JSON file.
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
        self.skipped: list[Skipped] = []
        self.excluded = 0
        self._root = "" if images is None else os.path.join(os.path.realpath(images), "")
        self._real_folders: dict[str, str] = {}
        self._read(set(exclude))

    def __len__(self) -> int:
        return len(self._numbers)

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
                message = f"{self._where(self._numbers[place])}: {error}"
                if self.on_bad_sample == "stop":
                    raise PictureError(message) from error
                log.warning("%s; the next sample takes its place", message)
        raise PictureError(f"{min(MANY_SUBSTITUTES, len(self))} pictures in a row cannot be read, the last: {message}")

    def record(self, index: int) -> dict[str, Any]:
        """The record behind a sample: its `id`, `image` and `conversations`, as far as it has them."""
        return json.loads(self._blob[self._ends[index - 1] if index else 0 : self._ends[index]])

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
        return self._numbers[index]

    def picture(self, index: int) -> str | None:
        """Path of a sample's picture, or None."""
        name = self.record(index).get("image")
        return None if name is None else str(self.images / name)

    @property
    def lengths(self) -> list[int]:
        """Words of each dialogue, counted negative where it has no picture; what the samples are grouped by.

        As the reference's `modality_lengths`, except that a dialogue without a word counts as one, not zero, since
        zero has no sign."""
        return list(self._lengths)

    @property
    def pictures_used(self) -> list[str]:
        """Paths of the distinct pictures, in order of first use."""
        paths = (self.picture(k) for k, length in enumerate(self._lengths) if length > 0)
        return list(dict.fromkeys(paths))

    def _sample(self, index: int) -> Sample:
        record = self.record(index)
        name, encoded = record.get("image"), self.encode(record)
        sample = Sample(str(record.get("id", self._numbers[index])), self.source, encoded.input_ids, encoded.labels)
        # A picture without a tag, or whose tag was cut off, has no place in the text: the reference trains on the
        # text alone.
        if name is None or IMAGE_TOKEN not in encoded.input_ids:
            return sample
        path = str(self.images / name)
        if self.features is not None and path in self.features:
            return replace(sample, features=self.features[path], picture=path)
        return replace(sample, pixels=self.pictures(path), picture=path)

    def _read(self, exclude: set[int]) -> None:
        """One pass over the file. Records are kept as bytes in one block: as Python objects they would be copied into
        every worker, page by page, because reading an object writes its reference count."""
        records = _load(self.annotations)
        self._numbers, self._ends, self._lengths = array("q"), array("q"), array("q")
        blob = bytearray()
        progress = track(records, f"checking {self.source}", disable=len(records) < SHOW_PROGRESS, transient=True)
        for number, record in enumerate(progress):
            if number in exclude:
                self.excluded += 1
                continue
            try:
                self._check(record)
            except ValueError as error:
                if self.on_bad_sample == "stop":
                    raise RecordError(f"{self._where(number, record)}: {error}") from None
                name = str(record.get("id", number)) if isinstance(record, dict) else str(number)
                kind = "missing" if isinstance(error, MissingPicture) else "format"
                self.skipped.append(Skipped(number, name, kind, str(error)))
                continue
            words = sum(len(turn["value"].split()) for turn in record["conversations"])
            kept = {field: record[field] for field in ("id", "image", "conversations") if field in record}
            blob += json.dumps(kept, separators=(",", ":")).encode()
            self._numbers.append(number)
            self._ends.append(len(blob))
            self._lengths.append(max(1, words) if record.get("image") is not None else -max(1, words))
        self._blob = bytes(blob)
        if self.skipped:
            first = self.skipped[0]
            log.warning(
                "%s: %d of %d records skipped; the first is record %d: %s",
                *(self.annotations, len(self.skipped), len(records), first.record, first.reason),
            )
        if not self._numbers:
            left_out = f", {len(self.skipped)} bad and {self.excluded} excluded" if records else ""
            raise ValueError(f"{self.annotations} holds no sample: {len(records)} records{left_out}")

    def _check(self, record: Any) -> None:
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
            self._find(name)
        self.template.render(conversations, name is not None)

    def _find(self, name: Any) -> None:
        """Raises ValueError unless `image` names a file inside the folder."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"`image` is {name!r}, not a path")
        if self.images is None:
            raise ValueError(f"`image` is {name!r}, but this dataset was given no image folder")
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise ValueError(f"`image` {name!r} leads out of the image folder")
        path = os.path.join(self.images, name)
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

    def _where(self, number: int, record: Any = None) -> str:
        name = record.get("id") if isinstance(record, dict) else None
        return f"{self.annotations}, record {number}" + (f" (id {name})" if name is not None else "")


def _load(annotations: Path) -> list[Any]:
    try:
        records = json.loads(annotations.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no annotation file {annotations}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{annotations} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{annotations} is nested too deeply to be a list of records") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{annotations} is not UTF-8 text: byte {error.start}") from None
    if not isinstance(records, list):
        raise ValueError(f"{annotations} must hold a list of records, not {type(records).__name__}")
    return records
