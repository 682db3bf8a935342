"""MME, perception: two questions a picture, one answered yes and one no, in ten categories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mvlm.benchmark.base import (
    SHORT,
    Question,
    Score,
    Sums,
    answered,
    interval,
    other_layout,
    require,
    require_pictures,
)

SOURCE = "MME (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation)"
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
ASKS = "Please answer yes or no."


def said(answer: str) -> str:
    """yes, no or other, by the first four characters: `nose` and `know` are no, `n` and `y` are other."""
    begins = answer.lower()[:4]
    return "yes" if "yes" in begins else "no" if "no" in begins else "other"


def points(sums: np.ndarray) -> np.ndarray:
    """(..., categories, 4) sums of (right, questions, both right, pictures) -> (..., categories), 0 to 200 each."""
    right, questions, both, pictures = np.moveaxis(sums, -1, 0)
    # A resample of the interval may draw no picture of a small category: it counts 0 there.
    return 100 * (right / np.maximum(questions, 1) + both / np.maximum(pictures, 1))


class MME:
    """Points from 0 to 2000: 100 * (accuracy + share of pictures with both answers right), summed over the categories.

    Args:
        folder: a folder a category, in it NAME.jpg (or .png) and NAME.txt, whose two lines are `question<tab>Yes|No`.
            Some official categories have them apart, in images/ and questions_answers_YN/.
    """

    name = "mme"
    max_new_tokens = 128
    crops = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def questions(self) -> list[Question]:
        found = [q for category in PERCEPTION for q in self._category(category)]
        return require_pictures(found, SOURCE)

    def _category(self, category: str) -> list[Question]:
        folder, found = require(self.folder / category, SOURCE), []
        apart = (folder / "questions_answers_YN").is_dir()
        texts = sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt"))
        images = folder / "images" if apart else folder
        if not texts:
            raise ValueError(f"{folder} holds no .txt with questions: it should be a category of {SOURCE}")
        for path in texts:
            lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            answers = [line[1].strip().lower() if len(line) == 2 else "?" for line in lines]
            if len(lines) != 2 or not set(answers) <= {"yes", "no"}:
                raise other_layout(path, "two lines `question<tab>Yes|No`", SOURCE, f"{len(lines)} lines: {answers}")
            named = [images / f"{path.stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
            image = next((file for file in named if file.is_file()), named[0])
            for number, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
                text = line[0].strip().removesuffix(ASKS).rstrip() + SHORT
                found.append(Question(f"{category}/{path.stem}/{number}", text, image, answer, category))
        return found

    def score(self, predictions: Mapping[str, str]) -> Score:
        questions = self.questions()
        answered(questions, predictions)
        answers = {q.id: said(predictions[q.id]) for q in questions}
        right = {q.id: float(answers[q.id] == q.truth) for q in questions}
        counts = np.zeros((len(questions) // 2, len(PERCEPTION), 4))
        pairs = list(zip(questions[::2], questions[1::2], strict=True))  # every picture brought exactly two
        for row, (one, two) in enumerate(pairs):
            both = right[one.id] + right[two.id]
            counts[row, PERCEPTION.index(one.group)] = both, 2, both == 2, 1
        detail = dict(zip(PERCEPTION, points(counts.sum(0)).tolist(), strict=True))
        total = sum(detail.values())
        made_of = (
            counts.reshape(len(counts), -1),
            [one.image for one, _ in pairs],
            lambda sums: points(sums.reshape(len(sums), len(PERCEPTION), 4)).sum(-1) / 20,
        )
        return Score(
            value=total / 20,
            unit_value=total,
            items=len(questions),
            per_question=right,
            detail=detail | {"count neither yes nor no": list(answers.values()).count("other")},
            interval=interval(*made_of),
            sums=Sums.of(*made_of),
        )
