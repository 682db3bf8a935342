"""What a benchmark is: questions with their pictures, and a score that is a pure function of the answers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

Protocol = Literal["paper", "harness"]
"""Whose prompts, limits and rules: `paper` the reference's own scripts and scorers, `harness` the defaults of lmms-eval
0.7.3. A score made any other way must carry another name."""

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""The two sentences that end the prompts of either protocol."""

Picture = Path | bytes
"""A file, or the file's content where a benchmark keeps its pictures inside its table."""


@dataclass(frozen=True)
class Question:
    """One prompt to be answered."""

    id: str
    """Unique in its benchmark."""
    text: str
    """The whole prompt, without image tag and chat template."""
    image: Picture | None
    truth: Any
    """Whatever the benchmark's own score compares with."""
    group: str = ""
    """Split, category or kind, where the score is told by it."""


@dataclass(frozen=True)
class Sums:
    """What a score is made of: sums over its questions, kept picture by picture, and the function of their totals.

    The questions of one picture are answered rightly or wrongly together (GQA asks 32 a picture), so whatever is drawn
    again, for an interval or a test, is drawn in whole pictures: single questions would promise too much.
    """

    by_picture: np.ndarray
    """(P, K), pictures in the order in which the questions name them first."""
    value: Callable[[np.ndarray], np.ndarray]
    """(R, K) totals -> (R,) scores, 0 to 100."""

    @classmethod
    def of(
        cls,
        counts: Sequence[Sequence[float]],
        pictures: Iterable[Hashable],
        value: Callable[[np.ndarray], np.ndarray],
    ) -> Sums:
        """From (Q, K), what each question adds to the K sums, and the picture of each of the Q questions."""
        index: dict[Hashable, int] = {}
        rows = [index.setdefault(picture, len(index)) for picture in pictures]
        by_picture = np.zeros((len(index), len(counts[0])))
        np.add.at(by_picture, rows, np.asarray(counts, float))
        return cls(by_picture, value)

    def interval(self, resamples: int = 1000) -> tuple[float, float]:
        """95 % bootstrap interval of the score, the 2.5 % and the 97.5 % quantile, the same at every call.

        It covers the choice of questions only: not the training's seed, and when every answer is right (or wrong) it has no
        width.

        Args:
            resamples: R; the ends move by a few hundredths of the width from 1,000 on.
        """
        totals = drawn_again(self.by_picture, np.random.default_rng(0), resamples)
        low, high = np.quantile(self.value(totals), [0.025, 0.975])
        return float(low), float(high)


def drawn_again(by_picture: np.ndarray, draw: np.random.Generator, draws: int) -> np.ndarray:
    """Totals, (draws, K), of as many pictures drawn with replacement as there are: (P, K)."""
    n = len(by_picture)
    return np.stack([np.bincount(draw.integers(n, size=n), minlength=n) @ by_picture for _ in range(draws)])


def percent(sums: np.ndarray) -> np.ndarray:
    """(R, 2) totals of marks and of what was marked -> (R,) means in percent."""
    return 100 * sums[:, 0] / sums[:, 1]


@dataclass(frozen=True)
class Score:
    """A benchmark's result."""

    value: float
    """0 to 100: what enters the average of the paper's tables."""
    unit_value: float
    """As the paper prints it: points for MME, else `value`."""
    items: int
    """Questions scored."""
    per_question: dict[str, float]
    """0 to 1 by question (MMBench: by circle of rotations), for paired comparisons."""
    detail: dict[str, float]
    """Figures beside the main one, in percent, MME's in points; counts where the name says so."""
    interval: tuple[float, float]
    """95 % interval of `value`, see `Sums.interval`."""
    protocol: str = "paper"
    official: str | None = None
    """The published version that the files hold by their counts; None for any others (generated, cut, newer)."""
    sums: Sums | None = field(default=None, compare=False, repr=False)
    """For the comparison of two runs (`mvlm.report`); without them it tests only scores that are the mean of the marks."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON, without the sums."""
        kept = {field: value for field, value in vars(self).items() if field != "sums"}
        return kept | {"interval": list(self.interval)}


class Benchmark(ABC):
    """A folder of official files, asked and scored by one protocol. Needs no model; reads its files when called.

    A benchmark says its `name`, `source` and `limits` and has two methods, `read` and `marked`.

    Args:
        folder: of the files, see the class.
        protocol: one of the keys of `limits`.
        any_version: take files whose counts are of no published version. The score says so either way.

    Raises:
        ValueError: the benchmark does not know the protocol.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Where the files come from, for people."""
    limits: ClassVar[Mapping[Protocol, int]]
    """A protocol's limit on an answer's length in tokens."""
    versions: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    """What is published: name -> counts, of all `questions` or of those of a group. Counts are all that a version is
    known by here: no checksum of these files was found that could be relied on."""
    cropped: ClassVar[bool] = False
    """Whether the reference cuts this benchmark's pictures to their middle although it pads all others."""

    def __init__(self, folder: str | Path, protocol: Protocol = "paper", any_version: bool = True) -> None:
        if protocol not in self.limits:
            raise ValueError(f"protocol={protocol}: {self.name} knows {', '.join(self.limits)}")
        self.folder, self.protocol, self.any_version = Path(folder), protocol, any_version

    @property
    def max_new_tokens(self) -> int:
        """The protocol's limit on an answer's length."""
        return self.limits[self.protocol]

    @property
    def crops(self) -> bool:
        """Whether pictures are cut to their middle. The harness leaves them to the model."""
        return self.cropped and self.protocol == "paper"

    def questions(self) -> list[Question]:
        """Every question, with its picture known to be there.

        Raises:
            ValueError: a file is missing, laid out otherwise or of another version, an id comes twice, or a picture is named
                outside the folder; the message says where the files come from.
        """
        found = list(self.read())
        for path in {q.image for q in found if isinstance(q.image, Path)}:
            if not path.is_relative_to(self.folder) or ".." in path.relative_to(self.folder).parts:
                raise ValueError(
                    f"a question of {self.folder} names the picture {path}, which lies elsewhere and would stand in the pages of "
                    f"answers: take the unchanged files of {self.source}"
                )
        found = require_pictures(found, self.source)
        if not self.any_version and self.versions and self.version(found) is None:
            counts = _counts(found)
            known = "; ".join(f"{name}: {_told(known)}" for name, known in self.versions.items())
            keys = {key: counts[key] for each in self.versions.values() for key in each}
            raise ValueError(
                f"{self.folder} holds another version of {self.source}: it has {_told(keys)}, published is {known}. "
                "Fetch that one, or add any_version=true: the score will say that it is of no published version"
            )
        return found

    def score(self, predictions: Mapping[str, str], questions: Sequence[Question] | None = None) -> Score:
        """The protocol's score of the answers by question id.

        Args:
            questions: those to score: all, where they were read already, or a part; None reads them.

        Raises:
            ValueError: an answer is missing.
        """
        questions = self.questions() if questions is None else questions
        answered(questions, predictions)
        score = self.marked(questions, predictions)
        return replace(score, protocol=self.protocol, official=self.version(questions))

    def version(self, questions: Sequence[Question]) -> str | None:
        """The published version that has as many questions, in all or in each group; None if there is none."""
        counts = _counts(questions)
        return next((name for name, known in self.versions.items() if known.items() <= counts.items()), None)

    @abstractmethod
    def read(self) -> Iterable[Question]:
        """The questions as the files have them; ids and pictures are checked by `questions`."""

    @abstractmethod
    def marked(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
        """The score, when every question has its answer."""


def _counts(questions: Sequence[Question]) -> Counter[str]:
    return Counter(q.group for q in questions) | Counter({"questions": len(questions)})


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def digest(picture: Picture | None) -> str:
    """SHA-256 of a picture file's bytes: two files of one content are one picture. Empty without a picture."""
    if picture is None:
        return ""
    return sha256(picture if isinstance(picture, bytes) else picture.read_bytes()).hexdigest()


def require(path: Path, source: str) -> Path:
    """The path, if it is there.

    Raises:
        ValueError: it is not. Names the path, where it comes from and what to do.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing. It comes from {source}: fetch it there, or name another folder")
    return path


def require_pictures(questions: Sequence[Question], source: str) -> list[Question]:
    """The questions, if the files of all their pictures are there (not opened) and no id comes twice.

    Raises:
        ValueError: pictures are missing (their number and the first), ids repeat, or there is no question at all.
    """
    if not questions:
        raise ValueError(f"no question was found; the files should be those of {source}")
    twice = [id for id, count in Counter(q.id for q in questions).items() if count > 1]
    if twice:
        raise ValueError(
            f"question id {twice[0]!r} comes more than once, as do {len(twice) - 1} others; ids must be unique: "
            f"take the unchanged files of {source}"
        )
    files = {q.image for q in questions if isinstance(q.image, Path)}
    gone = sorted(path for path in files if not path.is_file())
    if gone:
        raise ValueError(
            f"{len(gone)} of {len(files)} pictures are missing, the first is {gone[0]}. "
            f"They come from {source}: fetch them there, or name another folder"
        )
    return list(questions)


def read_text(path: Path, source: str) -> str:
    """A text file.

    Raises:
        ValueError: missing, or no text in UTF-8.
    """
    try:
        return require(path, source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}. It should be the file of {source}") from error


def read_json(path: Path, source: str) -> Any:
    """A JSON file.

    Raises:
        ValueError: missing, not JSON (names the line), or a key comes twice in an object: only its last entry would be
            left, and a question be lost without a word.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"{path}: {twice!r} comes more than once; take the unchanged file of {source}")
        return found

    text = read_text(path, source)
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. It should be the file of {source}") from error


def other_layout(path: Path, expected: str, source: str, error: Exception | str) -> ValueError:
    """What to raise when a file reads well but holds something else."""
    found = f"no {error}" if isinstance(error, KeyError) else error
    return ValueError(f"{path} is laid out otherwise ({found}): {expected} is expected, as in the file of {source}")


def answered(questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
    """Raises ValueError unless every question has an answer: half a benchmark is not scored silently."""
    gone = [q.id for q in questions if q.id not in predictions]
    if gone:
        raise ValueError(
            f"{len(gone)} of {len(questions)} questions have no answer, the first is {gone[0]!r}: "
            "evaluate again, answers already stored are kept"
        )


def mean_score(
    marks: Mapping[str, float], pictures: Sequence[Hashable], items: int, detail: Mapping[str, float]
) -> Score:
    """A score that is the mean of marks from 0 to 1, in percent.

    Args:
        marks: by question (or whatever is marked as one).
        pictures: the picture of each mark, in the same order.
        items: questions behind the marks.
    """
    value = 100 * sum(marks.values()) / len(marks)
    sums = Sums.of([(mark, 1) for mark in marks.values()], pictures, percent)
    return Score(
        value=value,
        unit_value=value,
        items=items,
        per_question=dict(marks),
        detail=dict(detail),
        interval=sums.interval(),
        sums=sums,
    )
