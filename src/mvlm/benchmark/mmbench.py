"""MMBench, English dev: multiple choice, where a question counts if it is right in all rotations of its options."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mvlm.benchmark.base import LETTER, Benchmark, Protocol, Question, Score, mean_score, other_layout, require

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

_SURROUNDED = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
"""How the harness' older matching knows a letter, in this order."""
_ANNOUNCED = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is",
    "the choice is", "choice is", "the correct choice is", "correct choice is",
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
"""What the harness' looser matching expects before a letter."""


def options(row: Mapping[str, str | None], protocol: Protocol = "paper") -> dict[str, str]:
    """The offered options by letter, in order. Paper: A to D, up to the first that is empty, `nan` or `none`. Harness:
    A to E, but for those that are empty or `nan`."""
    if protocol == "harness":
        return {letter: str(row[letter]) for letter in "ABCDE" if not _empty(row.get(letter))}
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


def harness_prompt(row: Mapping[str, str | None]) -> str:
    """Hint (if any), question and `There are several options:` in one line, one line an option, and after an empty
    line the sentence that asks for the letter."""
    parts = [] if _empty(row.get("hint")) else [str(row["hint"])]
    parts += [str(row["question"]), "There are several options:"]
    lines = [" ".join(parts)] + [f"{letter}. {text}" for letter, text in options(row, "harness").items()]
    return "\n".join(lines) + "\n" + LETTER


def rotated(row: Mapping[str, str | None], steps: int, protocol: Protocol = "paper") -> dict[str, str | None]:
    """A copy of a row as the official file has its rotations: each option moved up by so many letters, the first ones to
    the end, the answer with them, and the index raised by ROTATION a step."""
    offered = options(row, protocol)
    letters, texts = list(offered), list(offered.values())
    answer = letters[(letters.index(str(row["answer"])) - steps) % len(letters)]
    moved = dict(zip(letters, texts[steps:] + texts[:steps], strict=True))
    return {**row, **moved, "answer": answer, "index": str(int(str(row["index"])) + steps * ROTATION)}


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


def harness_extracted(answer: str, offered: Mapping[str, str]) -> tuple[str | None, bool]:
    """The letter an answer chooses, if any, by the rules of the harness' task `mmbench_en_dev_static`.

    Returns:
        The letter, and whether the first, older matching found it. Where it does not, task `mmbench_en_dev` asks a
        judge (a model behind an API, in the end a draw by lot); the static task looks again, less strictly.
    """
    letter = _matched(answer.strip(), offered)
    return (letter, True) if letter else (_loosely(answer, offered), False)


def _matched(answer: str, offered: Mapping[str, str]) -> str | None:
    """One letter as a word of its own, then with signs around it; else the one option contained in the answer."""
    words = answer.split()
    for form in _SURROUNDED:
        found = [letter for letter in "ABCDE" if form.format(letter) in words]
        article = form == "{}" and found == ["A"] and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    contained = [letter for letter in "ABCD" if letter in offered and offered[letter].lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def _loosely(answer: str, offered: Mapping[str, str]) -> str | None:
    """The last letter in the most trusted form that occurs: first and last place, announced by words, with signs, then
    anywhere, be it within a word."""
    text = answer.strip()
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    padded, bare = f" {text} ", text.strip()
    letters = [letter for letter in "ABCD" if letter in offered]
    announced = [
        (place, letter)
        for phrase in _ANNOUNCED
        if (start := padded.lower().find(phrase)) >= 0
        for letter in letters
        if (place := padded.find(letter, start + len(phrase))) >= 0
    ]
    places = [
        [(0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()],
        [(0, x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()],
        announced,
        *([(padded.rfind(form.format(x)), x) for x in letters] for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}")),
    ]
    return next((letter for some in places for place, letter in sorted(some, reverse=True) if place >= 0), None)


def circles(marks: Mapping[str, float]) -> dict[str, float]:
    """Marks of single rows -> 1 for a question all of whose rotations are right, else 0."""
    whole: dict[str, float] = {}
    for key, mark in marks.items():
        circle = str(int(key) % ROTATION)
        whole[circle] = min(whole.get(circle, 1.0), mark)
    return whole


class MMBench(Benchmark):
    """Circular accuracy; `vanilla` beside it is that of the questions in their first order alone.

    Harness: task `mmbench_en_dev_static`. How many rows the judge of `mmbench_en_dev` would decide is in the score.

    Args:
        folder: holds mmbench_dev_en_20231003.tsv (the reference's) or mmbench_dev_20230712.tsv with the pictures in it
            (base64, or the index of an earlier row). If both are there, the reference's is read.
        circular: make the rotations of a file that has none. Without them the circular accuracy is the vanilla one.
    """

    name = "mmbench"
    source = "MMBench (github.com/open-compass/MMBench: the English dev file of 2023-10-03 or 2023-07-12)"
    limits: ClassVar = {"paper": 1024, "harness": 1024}
    versions: ClassVar = {"2023-10-03": {"questions": 4_329}, "2023-07-12": {"questions": 4_377}}
    files = ("mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv")

    def __init__(
        self, folder: str | Path, protocol: Protocol = "paper", any_version: bool = True, circular: bool = False
    ) -> None:
        super().__init__(folder, protocol, any_version)
        self.circular = circular

    def read(self) -> Iterator[Question]:
        there = [self.folder / name for name in self.files if (self.folder / name).exists()]
        path = there[0] if there else require(self.folder / self.files[-1], self.source)
        csv.field_size_limit(2**31 - 1)  # a picture is far longer than the module's usual 128 kB
        pictures: dict[str, bytes] = {}
        rows: list[dict[str, str | None]] = []
        with path.open(encoding="utf-8", newline="") as file:
            try:
                for row in csv.DictReader(file, delimiter="\t"):
                    # Rotations repeat their picture: a content already met is the same object, decoded once.
                    content = row["image"]
                    pictures[row["index"]] = pictures[content] = pictures.get(content) or _decoded(content)
                    yield self._question(row, pictures[content])
                    rows.append(row)
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                expected = "index, question, hint, A, B, C, D, answer, category, image in every row"
                raise other_layout(path, expected, self.source, f"row {len(rows) + 1}: {error!r}") from error
        indices = {int(str(row["index"])) for row in rows}
        alone = [index for index in sorted(indices) if index % ROTATION not in indices]
        if alone:
            found = f"{alone[0]} rotates {alone[0] % ROTATION}, which is not there"
            raise other_layout(path, "a first order of every rotated question", self.source, found)
        if self.circular and max(indices, default=0) < ROTATION:
            for row in rows:
                for steps in range(1, len(options(row, self.protocol))):
                    yield self._question(rotated(row, steps, self.protocol), pictures[str(row["image"])])

    def _question(self, row: Mapping[str, str | None], image: bytes) -> Question:
        offered = options(row, self.protocol)
        if not offered or row["answer"] not in offered:
            raise ValueError(f"answer {row['answer']!r} is not among the options {sorted(offered)}")
        return Question(
            id=str(int(str(row["index"]))),
            text=harness_prompt(row) if self.protocol == "harness" else prompt(row),
            image=image,
            truth=(row["answer"], offered),
            group=str(row["category"]),
        )

    def marked(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
        letters: dict[str, str | None] = {}
        detail: dict[str, float] = {}
        if self.protocol == "harness":
            found = {q.id: harness_extracted(predictions[q.id], q.truth[1]) for q in questions}
            letters = {key: letter for key, (letter, _) in found.items()}
            detail["count for a judge"] = sum(not sure for _, sure in found.values())
        else:
            letters = {q.id: extracted(predictions[q.id], q.truth[1]) for q in questions}
            detail["count refused"] = list(letters.values()).count(REFUSED)
        single = {q.id: float(letters[q.id] == q.truth[0]) for q in questions}
        whole = circles(single)
        first = {str(int(q.id) % ROTATION): q.id for q in reversed(questions)}
        images = {q.id: q.image for q in questions}
        vanilla = [single[key] for circle, key in first.items() if circle == key]
        detail |= {
            "vanilla": 100 * sum(vanilla) / max(len(vanilla), 1),
            "single": 100 * sum(single.values()) / len(single),
            "count of rows": len(single),
            "count of rotated rows": sum(int(key) >= ROTATION for key in single),
            "count without a letter": list(letters.values()).count(None),
        }
        return mean_score(whole, [images[first[circle]] for circle in whole], len(whole), detail)


def _empty(value: str | None) -> bool:
    """Empty to pandas, with which tables are read: so these words are empty cells, too."""
    return value is None or value in ("", "nan", "NaN", "N/A", "n/a", "NA", "NULL", "null")


def _none(value: str | None) -> bool:
    """Empty to the reference."""
    return _empty(value) or str(value).lower() in ("nan", "none")


def _decoded(content: str) -> bytes:
    try:
        image = base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image is not base64: {error}") from error
    if len(image) < 8:
        raise ValueError(f"image {content!r} is neither a picture nor the index of a row before")
    return image
