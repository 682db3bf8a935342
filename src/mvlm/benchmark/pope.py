"""POPE: is an object in the picture that is often, or often beside others, but here perhaps not (COCO val2014)."""

from __future__ import annotations

import json
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

SOURCE = "POPE (github.com/AoiDragon/POPE, output/coco; the pictures are COCO's val2014)"
SPLITS = ("random", "popular", "adversarial")


def said(answer: str) -> str:
    """`no` if a word before the first period is No, no or not, else `yes`: an empty answer, `NO` and `no!` are yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def f1(true_yes: np.ndarray, false_yes: np.ndarray, false_no: np.ndarray) -> np.ndarray:
    """Of `yes`, in percent. 0 where the official script would divide by zero."""
    return 200 * true_yes / np.maximum(2 * true_yes + false_yes + false_no, 1)


class POPE:
    """Mean F1 of the three splits.

    Args:
        folder: holds coco_pope_random.json, ..._popular.json, ..._adversarial.json (a JSON object a line) and val2014/.
    """

    name = "pope"
    max_new_tokens = 128
    crops = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def questions(self) -> list[Question]:
        found = []
        for split in SPLITS:
            path = require(self.folder / f"coco_pope_{split}.json", SOURCE)
            for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), 1):
                try:
                    record = json.loads(line)
                    found.append(
                        Question(
                            id=f"{split}/{record['question_id']}",  # the files number their lines alike
                            text=record["text"] + SHORT,
                            image=self.folder / "val2014" / record["image"],
                            truth={"yes": "yes", "no": "no"}[record["label"]],
                            group=split,
                        )
                    )
                except (KeyError, TypeError, ValueError) as error:
                    expected = "{question_id, image, text, label: yes | no} in every line"
                    raise other_layout(path, expected, SOURCE, f"line {number}: {error!r}") from error
        return require_pictures(found, SOURCE)

    def score(self, predictions: Mapping[str, str]) -> Score:
        questions = self.questions()
        answered(questions, predictions)
        counts = np.zeros((len(questions), len(SPLITS), 4))  # true yes, false yes, true no, false no
        for row, q in enumerate(questions):
            answer = said(predictions[q.id])
            counts[row, SPLITS.index(q.group), 2 * (answer == "no") + (answer != q.truth)] = 1
        flat = counts.reshape(len(questions), -1)
        value = float(mean_f1(flat.sum(0)))
        made_of = (flat, [q.image for q in questions], mean_f1)
        return Score(
            value=value,
            unit_value=value,
            items=len(questions),
            per_question={q.id: float(said(predictions[q.id]) == q.truth) for q in questions},
            detail=_detail(counts.sum(0)),
            interval=interval(*made_of),
            sums=Sums.of(*made_of),
        )


def mean_f1(sums: np.ndarray) -> np.ndarray:
    """(..., 3 splits * 4 counts) -> (...), in percent."""
    yes, false_yes, _, false_no = np.moveaxis(sums.reshape(*sums.shape[:-1], len(SPLITS), 4), -1, 0)
    return f1(yes, false_yes, false_no).mean(-1)


def _detail(sums: np.ndarray) -> dict[str, float]:
    """(3, 4) counts -> figures by split."""
    figures = {}
    for split, (yes, false_yes, no, false_no) in zip(SPLITS, sums, strict=True):
        total = max(yes + false_yes + no + false_no, 1)
        figures |= {
            f"{split} f1": f1(yes, false_yes, false_no),
            f"{split} accuracy": 100 * (yes + no) / total,
            f"{split} precision": 100 * yes / max(yes + false_yes, 1),
            f"{split} recall": 100 * yes / max(yes + false_no, 1),
            f"{split} yes ratio": 100 * (yes + false_yes) / total,
        }
    return {name: float(figure) for name, figure in figures.items()}
