"""MME, perception: two questions a picture, one answered yes and one no, in ten categories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from mvlm.benchmark.base import (
    SHORT,
    Benchmark,
    Protocol,
    Question,
    Score,
    Sums,
    other_layout,
    read_text,
    require,
)

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
ASKS = "Please answer yes or no."


def prompt(question: str, protocol: Protocol = "paper") -> str:
    """The question with its closing sentence replaced; the harness looks for that after a space, and anywhere."""
    if protocol == "harness":
        return question.strip().replace(f" {ASKS}", "") + SHORT
    return question.strip().removesuffix(ASKS).rstrip() + SHORT


def said(answer: str, protocol: Protocol = "paper") -> str:
    """yes, no or other, by the first four characters: `nose` and `know` are no.

    Paper: nothing is stripped; `n` and `y` are other. Harness: stripped, periods off; a lone `n` or `y` is meant.
    """
    text = answer.lower()
    if protocol == "harness":
        text = text.strip().replace(".", "")
        text = {"y": "yes", "n": "no"}.get(text, text)
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def points(sums: np.ndarray) -> np.ndarray:
    """(..., categories, 4) sums of (right, questions, both right, pictures) -> (..., categories), 0 to 200 each."""
    right, questions, both, pictures = np.moveaxis(sums, -1, 0)
    return 100 * (right / np.maximum(questions, 1) + both / np.maximum(pictures, 1))


class MME(Benchmark):
    """Points from 0 to 2000: 100 * (accuracy + share of pictures with both answers right), summed over the categories.

    Harness: the perception score of task `mme`. It pairs questions by picture, as is done here for both.

    Args:
        folder: a folder a category, in it NAME.jpg (or .png) and NAME.txt, whose two lines are `question<tab>Yes|No`.
            Some official categories have them apart, in images/ and questions_answers_YN/.
    """

    name = "mme"
    source = "MME (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation)"
    limits: ClassVar = {"paper": 128, "harness": 16}
    versions: ClassVar = {
        "perception": {
            "existence": 60, "count": 60, "position": 60, "color": 60, "posters": 294, "celebrity": 340,
            "scene": 400, "landmark": 400, "artwork": 400, "OCR": 40,
        }
    }  # fmt: skip

    def read(self) -> Iterator[Question]:
        for category in PERCEPTION:
            yield from self._category(category)

    def _category(self, category: str) -> Iterator[Question]:
        folder = require(self.folder / category, self.source)
        apart = (folder / "questions_answers_YN").is_dir()
        texts = sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt"))
        images = folder / "images" if apart else folder
        if not texts:
            raise ValueError(f"{folder} holds no .txt with questions: it should be a category of {self.source}")
        for path in texts:
            lines = [line.split("\t") for line in read_text(path, self.source).splitlines() if line.strip()]
            answers = [line[1].strip().lower() if len(line) == 2 else "?" for line in lines]
            if len(lines) != 2 or not set(answers) <= {"yes", "no"}:
                found = f"{len(lines)} lines: {answers}"
                raise other_layout(path, "two lines `question<tab>Yes|No`", self.source, found)
            named = [images / f"{path.stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
            image = next((file for file in named if file.is_file()), named[0])
            for number, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
                text = prompt(line[0], self.protocol)
                yield Question(f"{category}/{path.stem}/{number}", text, image, answer, category)

    def marked(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
        answers = {q.id: said(predictions[q.id], self.protocol) for q in questions}
        right = {q.id: float(answers[q.id] == q.truth) for q in questions}
        counts = np.zeros((len(questions) // 2, len(PERCEPTION), 4))
        pairs = list(zip(questions[::2], questions[1::2], strict=True))  # every picture brought exactly two
        for row, (one, two) in enumerate(pairs):
            both = right[one.id] + right[two.id]
            counts[row, PERCEPTION.index(one.group)] = both, 2, both == 2, 1
        detail = dict(zip(PERCEPTION, points(counts.sum(0)).tolist(), strict=True))
        total = sum(detail.values())
        here = len({one.group for one, _ in pairs})

        def of_totals(totals: np.ndarray) -> np.ndarray:
            """Of each draw. A category of which it has no picture counts as the mean of those of which it has some."""
            by_category = totals.reshape(len(totals), len(PERCEPTION), 4)
            return points(by_category).sum(-1) / 20 * (here / (by_category[..., 3] > 0).sum(-1))

        sums = Sums.of(counts.reshape(len(counts), -1), [one.image for one, _ in pairs], of_totals)
        return Score(
            value=total / 20,
            unit_value=total,
            items=len(questions),
            per_question=right,
            detail=detail | {"count neither yes nor no": list(answers.values()).count("other")},
            interval=sums.interval(),
            sums=sums,
        )
