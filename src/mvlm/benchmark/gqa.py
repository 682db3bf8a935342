"""GQA: compositional questions on real scenes, testdev-balanced (12,578 questions on 398 pictures)."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from mvlm.benchmark.base import SHORT, Benchmark, Protocol, Question, Score, mean_score, other_layout, read_json

_NO_SIGNS = str.maketrans("", "", string.punctuation)


def agrees(answer: str, truth: str, protocol: Protocol = "paper") -> bool:
    """Whether an answer is the one looked for.

    Paper: final periods off, lower case; spaces and any other sign stay and count as wrong. Harness: stripped, then
    both without case and punctuation, so `t-shirt` is `tshirt`, but `yes !` is not `yes`.
    """
    if protocol == "harness":
        return answer.strip().lower().translate(_NO_SIGNS) == truth.lower().translate(_NO_SIGNS)
    return converted(answer) == truth


def converted(answer: str) -> str:
    """An answer as LLaVA's conversion hands it to the GQA tool: final periods off, lower case."""
    return answer.rstrip(".").lower()


class GQA(Benchmark):
    """Accuracy by equality with the one answer. Harness: task `gqa`, whose prompt is the same.

    Args:
        folder: holds testdev_balanced_questions.json and images/<imageId>.jpg.
    """

    name = "gqa"
    source = "GQA (cs.stanford.edu/people/dorarad/gqa: the balanced questions, and the images)"
    limits: ClassVar = {"paper": 128, "harness": 16}
    versions: ClassVar = {"testdev-balanced": {"questions": 12_578}}

    def read(self) -> Iterator[Question]:
        path = self.folder / "testdev_balanced_questions.json"
        records = read_json(path, self.source)
        try:
            for key, record in records.items():
                yield Question(
                    id=key,
                    text=record["question"] + SHORT,
                    image=self.folder / "images" / f"{record['imageId']}.jpg",
                    truth=record["answer"],
                    group=_kind(record),
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise other_layout(path, "{id: {question, answer, imageId, types}}", self.source, error) from error

    def marked(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
        marks = {q.id: float(agrees(predictions[q.id], q.truth, self.protocol)) for q in questions}
        kinds = {kind: [marks[q.id] for q in questions if q.group == kind] for kind in ("binary", "open")}
        detail = {kind: 100 * sum(some) / len(some) for kind, some in kinds.items() if some}
        return mean_score(marks, [q.image for q in questions], len(questions), detail)


def _kind(record: dict) -> str:
    """The official tool's two kinds: `query` questions are open, all others have two possible answers."""
    structural = record.get("types", {}).get("structural", "")
    return {"": "", "query": "open"}.get(structural, "binary")
