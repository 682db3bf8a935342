"""ScienceQA, the test questions that have a picture (2,017 of 4,241): SQA-I in the paper's tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from mvlm.benchmark.base import (
    LETTER,
    Benchmark,
    Protocol,
    Question,
    Score,
    digest,
    mean_score,
    other_layout,
    read_json,
)

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


def harness_prompt(problem: Mapping[str, Any]) -> str:
    """A problem as the harness asks it: context only if there is one, a line for each choice."""
    lines = [f"Context: {problem['hint']}"] if problem["hint"] else []
    lines += [problem["question"]]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)]
    return "\n".join(lines) + LETTER


def parsed(answer: str, protocol: Protocol = "paper") -> str:
    """The letter an answer names, or FAILED; it may be one not offered.

    Paper: a bare letter; or a letter, a period and a space at the start; or one `The answer is X` with any character
    behind it. So `A.`, `(A)`, `a` and a sentence that ends in `The answer is A` fail. Harness: stripped; a bare letter
    of either case; or a capital and a period at the start, whatever follows.
    """
    if protocol == "harness":
        answer = answer.strip()
        letter = answer.upper() if len(answer) == 1 else answer[0] if answer[1:2] == "." else FAILED
        return letter if letter in set(LETTERS) else FAILED
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if answer[:1] and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    named = re.findall(r"The answer is ([A-Z]).", answer)
    return named[0] if len(named) == 1 else FAILED


def chosen(letter: str, choices: int) -> int:
    """Which of so many choices a letter stands for, or -1."""
    return LETTERS.index(letter) if letter in LETTERS[:choices] else -1


class SQA(Benchmark):
    """Accuracy on the letters. Harness: task `scienceqa_img`, the same questions in another prompt.

    The harness shows pictures as the model's adapter likes; its setting for LLaVA's, which cuts them, is no default.

    Args:
        folder: holds problems.json, pid_splits.json and images/test/<problem>/image.png.
        order: see `prompt`; the harness has but one.
    """

    name = "sqa"
    source = "ScienceQA (scienceqa.github.io: problems.json, pid_splits.json and the images of the test split)"
    limits: ClassVar = {"paper": 1024, "harness": 16}
    versions: ClassVar = {"test, with a picture": {"questions": 2_017}}
    cropped = True

    def __init__(
        self, folder: str | Path, protocol: Protocol = "paper", any_version: bool = True, order: Order = "CQM"
    ) -> None:
        super().__init__(folder, protocol, any_version)
        if order not in ("CQM", "QCM"):
            raise ValueError(f"order is CQM or QCM, not {order!r}")
        if protocol == "harness" and order != "CQM":
            raise ValueError(f"order={order} is for protocol=paper: the harness asks in an order of its own")
        self.order = order

    def read(self) -> Iterator[Question]:
        path, splits = self.folder / "problems.json", self.folder / "pid_splits.json"
        problems, test = read_json(path, self.source), read_json(splits, self.source)
        try:
            for key in test["test"]:
                problem = problems[key]
                if problem["image"]:
                    yield Question(
                        id=key,
                        text=harness_prompt(problem) if self.protocol == "harness" else prompt(problem, self.order),
                        image=self.folder / "images" / "test" / key / problem["image"],
                        truth=(problem["answer"], len(problem["choices"])),
                        group=problem.get("subject", ""),
                    )
        except (KeyError, TypeError, AttributeError) as error:
            expected = "{id: {question, hint, choices, answer, image}}, and {test: [id]} beside it,"
            raise other_layout(path, expected, self.source, error) from error

    def marked(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
        letters = {q.id: parsed(predictions[q.id], self.protocol) for q in questions}
        marks = {q.id: float(chosen(letters[q.id], q.truth[1]) == q.truth[0]) for q in questions}
        detail: dict[str, float] = {"count without a letter": list(letters.values()).count(FAILED)}
        for subject in sorted({q.group for q in questions if q.group}):
            some = [marks[q.id] for q in questions if q.group == subject]
            detail[subject] = 100 * sum(some) / len(some)
        pictures = [digest(q.image) for q in questions]  # each problem has a file of its own, be it another's picture
        return mean_score(marks, pictures, len(questions), detail)
