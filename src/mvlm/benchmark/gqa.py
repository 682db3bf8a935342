"""GQA: compositional questions on real scenes, testdev-balanced (12,578 questions on 398 pictures)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mvlm.benchmark.base import (
    SHORT,
    Question,
    Score,
    answered,
    mean_score,
    other_layout,
    read_json,
    require_pictures,
)

SOURCE = "GQA (cs.stanford.edu/people/dorarad/gqa: the balanced questions, and the images)"


def converted(answer: str) -> str:
    """An answer as it is compared: final periods off, lower case. Spaces and any other sign stay and count as wrong."""
    return answer.rstrip(".").lower()


class GQA:
    """Accuracy by equality with the one answer.

    Args:
        folder: holds testdev_balanced_questions.json and images/<imageId>.jpg.
    """

    name = "gqa"
    max_new_tokens = 128
    crops = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def questions(self) -> list[Question]:
        path = self.folder / "testdev_balanced_questions.json"
        records = read_json(path, SOURCE)
        try:
            found = [
                Question(
                    id=key,
                    text=record["question"] + SHORT,
                    image=self.folder / "images" / f"{record['imageId']}.jpg",
                    truth=record["answer"],
                    group=_kind(record),
                )
                for key, record in records.items()
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise other_layout(path, "{id: {question, answer, imageId, types}}", SOURCE, error) from error
        return require_pictures(found, SOURCE)

    def score(self, predictions: Mapping[str, str]) -> Score:
        questions = self.questions()
        answered(questions, predictions)
        marks = {q.id: float(converted(predictions[q.id]) == q.truth) for q in questions}
        kinds = {kind: [marks[q.id] for q in questions if q.group == kind] for kind in ("binary", "open")}
        detail = {kind: 100 * sum(some) / len(some) for kind, some in kinds.items() if some}
        return mean_score(marks, [q.image for q in questions], len(questions), detail)


def _kind(record: dict) -> str:
    """The official tool's two kinds: `query` questions are open, all others have two possible answers."""
    structural = record.get("types", {}).get("structural", "")
    return {"": "", "query": "open"}.get(structural, "binary")
