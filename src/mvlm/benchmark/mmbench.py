"""MMBench, English dev: multiple choice, where a question counts if it is right in all rotations of its options."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Mapping
from pathlib import Path

from mvlm.benchmark.base import (
    LETTER,
    Question,
    Score,
    answered,
    mean_score,
    other_layout,
    require,
    require_pictures,
)

SOURCE = "MMBench (github.com/open-compass/MMBench: the English dev file of 2023-07-12)"
ROTATION = 1_000_000
"""A rotated copy of question i has the index i + ROTATION, i + 2 * ROTATION, ..."""
REFUSED = "Z"

_SIGNS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""Sentences of hosted models that the official matching counts as a refusal."""


def options(row: Mapping[str, str | None]) -> dict[str, str]:
    """The offered options by letter: in order, up to the first that is empty, `nan` or `none`."""
    offered = {}
    for letter in "ABCD":
        if _none(row.get(letter)):
            break
        offered[letter] = str(row[letter])
    return offered


def prompt(row: Mapping[str, str | None]) -> str:
    """Hint (if any), question, one line an option, and the sentence that asks for the letter."""
    lines = [] if _none(row.get("hint")) else [str(row["hint"])]
    lines += [str(row["question"])] + [f"{letter}. {text}" for letter, text in options(row).items()]
    return "\n".join(lines) + LETTER


def extracted(answer: str, offered: Mapping[str, str]) -> str | None:
    """The letter an answer chooses, REFUSED, or None (VLMEvalKit's exact matching, no judge).

    First as a word: signs are blanks, exactly one offered letter may occur, and its first place must be among the last
    four words. Else as a text: exactly one option may be contained in the answer, which may not be longer than twice
    all options together.
    """
    if any(sentence in answer for sentence in _REFUSALS):
        return REFUSED
    words = answer.translate(_SIGNS).split()
    letters = [letter for letter in offered if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
        return letters[0]
    if not letters and REFUSED in words:
        return REFUSED
    texts = {letter: text.lower() for letter, text in offered.items()}
    if len(answer) > 2 * sum(map(len, texts.values())):
        return None
    contained = [letter for letter, text in texts.items() if text in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def circles(marks: Mapping[str, float]) -> dict[str, float]:
    """Marks of single rows -> 1 for a question all of whose rotations are right, else 0."""
    whole: dict[str, float] = {}
    for key, mark in marks.items():
        circle = str(int(key) % ROTATION)
        whole[circle] = min(whole.get(circle, 1.0), mark)
    return whole


class MMBench:
    """Circular accuracy.

    Args:
        folder: holds mmbench_dev_20230712.tsv with the pictures in it (base64, or the index of an earlier row).
    """

    name = "mmbench"
    max_new_tokens = 1024
    crops = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def questions(self) -> list[Question]:
        path = require(self.folder / "mmbench_dev_20230712.tsv", SOURCE)
        csv.field_size_limit(2**31 - 1)  # a picture is far longer than the module's usual 128 kB
        pictures: dict[str, bytes] = {}
        found = []
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                try:
                    # Rotations repeat their picture: a content already met is the same object, decoded once.
                    content = row["image"]
                    pictures[row["index"]] = pictures[content] = pictures.get(content) or _decoded(content)
                    offered = options(row)
                    if not offered or row["answer"] not in offered:
                        raise ValueError(f"answer {row['answer']!r} is not among the options {sorted(offered)}")
                    found.append(
                        Question(
                            id=str(int(row["index"])),
                            text=prompt(row),
                            image=pictures[content],
                            truth=(row["answer"], offered),
                            group=row["category"],
                        )
                    )
                except (KeyError, TypeError, ValueError) as error:
                    expected = "index, question, hint, A, B, C, D, answer, category, image in every row"
                    where = f"row {len(found) + 1}: {error!r}"
                    raise other_layout(path, expected, SOURCE, where) from error
        return require_pictures(found, SOURCE)

    def score(self, predictions: Mapping[str, str]) -> Score:
        questions = self.questions()
        answered(questions, predictions)
        letters = {q.id: extracted(predictions[q.id], q.truth[1]) for q in questions}
        single = {q.id: float(letters[q.id] == q.truth[0]) for q in questions}
        whole = circles(single)
        first = {str(int(q.id) % ROTATION): q.image for q in reversed(questions)}
        detail = {
            "single": 100 * sum(single.values()) / len(single),
            "count of rows": len(single),
            "count without a letter": list(letters.values()).count(None),
            "count refused": list(letters.values()).count(REFUSED),
        }
        return mean_score(whole, [first[circle] for circle in whole], len(whole), detail)


def _none(value: str | None) -> bool:
    """Empty to the reference, which reads the table with pandas: so these words are empty cells, too."""
    return value is None or value.lower() in ("", "nan", "none") or value in ("N/A", "n/a", "NA", "NULL", "null")


def _decoded(content: str) -> bytes:
    try:
        image = base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image is not base64: {error}") from error
    if len(image) < 8:
        raise ValueError(f"image {content!r} is neither a picture nor the index of a row before")
    return image
