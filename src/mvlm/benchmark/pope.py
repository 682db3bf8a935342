"""POPE: is an object in the picture that is often, or often beside others, but here perhaps not (COCO val2014)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from mvlm.benchmark.base import SHORT, Benchmark, Protocol, Question, Score, Sums, other_layout, read_text

SPLITS = ("random", "popular", "adversarial")
LABELS = ("yes", "no")
SAID = ("yes", "no", "other")


def said(answer: str, protocol: Protocol = "paper") -> str:
    """What an answer says.

    Paper: `no` if a word before the first period is No, no or not, else `yes`: an empty answer, `NO` and `no!` are yes.
    Harness: `yes` or `no` if that is the whole answer but for case and spaces around it, else `other`, as `No.` is.
    """
    if protocol == "harness":
        word = answer.lower().strip()
        return word if word in LABELS else "other"
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def f1(counts: np.ndarray) -> np.ndarray:
    """Of `yes`, in percent. 0 where the official script would divide by zero.

    Args:
        counts: (..., labels, said). What says neither is in no sum, as in the harness: it costs no recall.
    """
    true_yes, false_no, false_yes = counts[..., 0, 0], counts[..., 0, 1], counts[..., 1, 0]
    return 200 * true_yes / np.maximum(2 * true_yes + false_yes + false_no, 1)


class POPE(Benchmark):
    """Paper: mean F1 of the three splits. Harness: task `pope`, F1 of all questions pooled.

    Args:
        folder: holds coco_pope_random.json, ..._popular.json, ..._adversarial.json (a JSON object a line) and val2014/.
    """

    name = "pope"
    source = "POPE (github.com/AoiDragon/POPE, output/coco; the pictures are COCO's val2014)"
    limits: ClassVar = {"paper": 128, "harness": 128}
    # The reference's question file was made of the older one; the harness' data are the newer.
    versions: ClassVar = {
        "2,910 random": {"random": 2_910, "popular": 3_000, "adversarial": 3_000},
        "3,000 random": {"random": 3_000, "popular": 3_000, "adversarial": 3_000},
    }

    def read(self) -> Iterator[Question]:
        for split in SPLITS:
            path = self.folder / f"coco_pope_{split}.json"
            for number, line in enumerate(read_text(path, self.source).strip().split("\n"), 1):
                try:
                    record = json.loads(line)
                    yield Question(
                        id=f"{split}/{record['question_id']}",  # the files number their lines alike
                        text=record["text"].strip() + SHORT,
                        image=self.folder / "val2014" / record["image"],
                        truth={"yes": "yes", "no": "no"}[record["label"]],
                        group=split,
                    )
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    expected = "{question_id, image, text, label: yes | no} in every line"
                    raise other_layout(path, expected, self.source, f"line {number}: {error!r}") from error

    def marked(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
        counts = np.zeros((len(questions), len(SPLITS), len(LABELS), len(SAID)))
        words = {q.id: said(predictions[q.id], self.protocol) for q in questions}
        for row, q in enumerate(questions):
            counts[row, SPLITS.index(q.group), LABELS.index(q.truth), SAID.index(words[q.id])] = 1
        figure = pooled_f1 if self.protocol == "harness" else mean_f1
        value = float(figure(counts.sum(0)))
        detail = {"count neither yes nor no": float(counts[..., 2].sum())} | figures("all", counts.sum((0, 1)))
        for place, split in enumerate(SPLITS):
            detail |= figures(split, counts[:, place].sum(0))
        flat = counts.reshape(len(questions), -1)
        pictures = [q.image for q in questions]
        sums = Sums.of(flat, pictures, lambda totals: figure(totals.reshape(-1, *counts.shape[1:])))
        return Score(
            value=value,
            unit_value=value,
            items=len(questions),
            per_question={q.id: float(words[q.id] == q.truth) for q in questions},
            detail=detail,
            interval=sums.interval(),
            sums=sums,
        )


def mean_f1(counts: np.ndarray) -> np.ndarray:
    """(..., splits, labels, said) -> (...), in percent."""
    return f1(counts).mean(-1)


def pooled_f1(counts: np.ndarray) -> np.ndarray:
    """(..., splits, labels, said) -> (...), in percent."""
    return f1(counts.sum(-3))


def figures(name: str, counts: np.ndarray) -> dict[str, float]:
    """(labels, said) -> percentages by name. `label yes ratio` is what the harness calls its yes ratio."""
    (yes, false_no, _), (false_yes, no, _) = counts
    total = max(counts.sum(), 1)
    told = {
        "f1": f1(counts),
        "accuracy": 100 * (yes + no) / total,
        "precision": 100 * yes / max(yes + false_yes, 1),
        "recall": 100 * yes / max(yes + false_no, 1),
        "yes ratio": 100 * (yes + false_yes) / total,
        "label yes ratio": 100 * counts[0].sum() / total,
    }
    return {f"{name} {key}": float(value) for key, value in told.items()}
