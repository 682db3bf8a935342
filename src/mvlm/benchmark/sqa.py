"""ScienceQA, the test questions that have a picture (2,017 of 4,241): SQA-I in the paper's tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mvlm.benchmark.base import (
    LETTER,
    Question,
    Score,
    answered,
    mean_score,
    other_layout,
    read_json,
    require_pictures,
)

SOURCE = "ScienceQA (scienceqa.github.io: problems.json, pid_splits.json and the images of the test split)"
LETTERS = "ABCDE"
FAILED = "FAILED"

Order = Literal["CQM", "QCM"]


def prompt(problem: Mapping[str, Any], order: Order = "CQM") -> str:
    """A problem as the reference asks it.

    Args:
        order: context, question and multiple choices in ScienceQA's own letters. `CQM` is the layout of the question
            file that the reference's script names (llava_test_CQM-A.json); `QCM` is that of the training data (paper,
            Table 9), where the question has no word before it.
    """
    context, question = f"Context: {problem['hint'].strip() or 'N/A'}", problem["question"]
    options = "Options: " + " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)
    )
    lines = [context, f"Question: {question}", options] if order == "CQM" else [question, context, options]
    # The converter that made the reference's file halves double spaces, once.
    return "\n".join(lines).replace("  ", " ").strip() + LETTER


def parsed(answer: str) -> str:
    """The letter an answer names, or FAILED.

    A bare letter; or a letter, a period and a space at the start; or one `The answer is X` with any character behind
    it. So `A.`, `(A)`, `a` and a sentence that ends in `The answer is A` fail; the letter may be one not offered.
    """
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if answer[:1] and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    named = re.findall(r"The answer is ([A-Z]).", answer)
    return named[0] if len(named) == 1 else FAILED


def chosen(letter: str, choices: int) -> int:
    """Which of so many choices a letter stands for, or -1."""
    return LETTERS.index(letter) if letter in LETTERS[:choices] else -1


class SQA:
    """Accuracy on the letters.

    Args:
        folder: holds problems.json, pid_splits.json and images/test/<problem>/image.png.
        order: see `prompt`.
    """

    name = "sqa"
    max_new_tokens = 1024
    crops = True

    def __init__(self, folder: str | Path, order: Order = "CQM") -> None:
        if order not in ("CQM", "QCM"):
            raise ValueError(f"order is CQM or QCM, not {order!r}")
        self.folder, self.order = Path(folder), order

    def questions(self) -> list[Question]:
        path, splits = self.folder / "problems.json", self.folder / "pid_splits.json"
        problems, test = read_json(path, SOURCE), read_json(splits, SOURCE)
        try:
            found = [
                Question(
                    id=key,
                    text=prompt(problems[key], self.order),
                    image=self.folder / "images" / "test" / key / problems[key]["image"],
                    truth=(problems[key]["answer"], len(problems[key]["choices"])),
                    group=problems[key].get("subject", ""),
                )
                for key in test["test"]
                if problems[key]["image"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            expected = "{id: {question, hint, choices, answer, image}}, and {test: [id]} beside it,"
            raise other_layout(path, expected, SOURCE, error) from error
        return require_pictures(found, SOURCE)

    def score(self, predictions: Mapping[str, str]) -> Score:
        questions = self.questions()
        answered(questions, predictions)
        letters = {q.id: parsed(predictions[q.id]) for q in questions}
        marks = {q.id: float(chosen(letters[q.id], q.truth[1]) == q.truth[0]) for q in questions}
        detail: dict[str, float] = {"count without a letter": list(letters.values()).count(FAILED)}
        for subject in sorted({q.group for q in questions if q.group}):
            some = [marks[q.id] for q in questions if q.group == subject]
            detail[subject] = 100 * sum(some) / len(some)
        return mean_score(marks, [q.image for q in questions], len(questions), detail)
