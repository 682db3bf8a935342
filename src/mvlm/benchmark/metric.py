"""A benchmark's score as a metric of torchmetrics: gathered over processes, and of a part of the questions while a model trains."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from mvlm.benchmark.answer import answers
from mvlm.benchmark.base import Benchmark, Picture, Question
from mvlm.benchmark.evaluate import average, own_loop
from mvlm.model.mobilevlm import MobileVLM


def part_of(questions: Sequence[Question], items: int, seed: int = 0) -> list[Question]:
    """About so many of the questions, in their own order, the same at every call.

    All that a picture is asked in a group comes along or stays out: MME scores such questions together, MMBench rotates them, and
    a picture costs more than a question. Every group has a part, for MME's score is a sum over its own. Hence a few more than
    `items` may come, never fewer.

    Args:
        items: more than there are gives all.
    """
    whole: dict[Hashable, list[Question]] = {}
    for q in questions:
        whole.setdefault((q.group, q.image if q.image is not None else q.id), []).append(q)
    draw = random.Random(seed)  # Python keeps random() the same in all its versions
    order = sorted(whole, key=lambda _: draw.random())
    one_a_group = {key[0]: key for key in reversed(order)}.values()
    chosen: set[str] = set()
    for place, key in enumerate(dict.fromkeys([*one_a_group, *order])):
        if place < len(one_a_group) or len(chosen) < items:
            chosen |= {q.id for q in whole[key]}
    return [q for q in questions if q.id in chosen]


def _gathered(state: Tensor, group: Any = None) -> list[Tensor]:
    """torchmetrics' own, but for a process that was told nothing: it would bring numbers of another type."""
    return gather_all_tensors(state.to(torch.uint8), group)


class BenchmarkMetric(Metric):
    """The pure score of a benchmark, as `Benchmark.score` says it.

    Args:
        benchmark: whose score.
        items: ask only so many of its questions, see `part_of`; None asks all.
        seed: of the part.
        settings: Metric's own.

    Attributes:
        questions: those that must be answered before `compute`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    said: list[Tensor]

    def __init__(self, benchmark: Benchmark, items: int | None = None, seed: int = 0, **settings: Any) -> None:
        super().__init__(**{"dist_sync_fn": _gathered} | settings)
        self.benchmark, self.questions = benchmark, benchmark.questions()
        if items is not None:
            self.questions = part_of(self.questions, items, seed)
        # Texts do not travel between processes, but their bytes do: a line of JSON an answer.
        self.add_state("said", default=[], dist_reduce_fx="cat")

    def update(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """Take answers, by question id. A question answered twice (where a sampler pads the last batch) counts once, as first told."""
        lines = "".join(json.dumps(line) + "\n" for line in zip(ids, texts, strict=True))
        self.said.append(torch.tensor(list(lines.encode()), dtype=torch.uint8, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """`value` (0 to 100), `unit_value` (as the paper prints it) and `items`, the questions scored, as scalars.

        Raises:
            ValueError: a question has no answer.
        """
        said: dict[str, str] = {}
        for state in [self.said] if isinstance(self.said, Tensor) else self.said:  # gathered, or this process' alone
            for line in bytes(state.tolist()).splitlines():
                key, text = json.loads(line)
                said.setdefault(key, text)
        score = self.benchmark.score(said, self.questions)
        values = {"value": score.value, "unit_value": score.unit_value, "items": score.items}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def validate(
    model: MobileVLM,
    metrics: Sequence[BenchmarkMetric],
    *,
    rank: int = 0,
    ranks: int = 1,
    features: MutableMapping[str, dict[Picture, Tensor]] | None = None,
    **loop: Any,
) -> dict[str, float]:
    """Scores of a model as it stands. Greedy answers draw nothing by lot, and no weight, gradient or mode is changed.

    Args:
        rank, ranks: this process, and how many answer together.
        features: by benchmark, kept from call to call where the tower is frozen.
        loop: arguments of `own_loop`.

    Returns:
        NAME and NAME_items (questions asked) by benchmark, and avg if the six of the paper are among them.
    """
    values: dict[str, float] = {}
    told: dict[str, float] = {}
    for metric in metrics:
        name = metric.benchmark.name
        own = own_loop(metric.benchmark, **loop) | {
            "features": {} if features is None else features.setdefault(name, {})
        }
        said = list(answers(model, metric.questions, rank=rank, ranks=ranks, **own))
        metric.reset()
        metric.update([one.question.id for one in said], [one.text for one in said])
        score = metric.compute()
        values[name] = float(score["value"])
        told |= {name: values[name], f"{name}_items": float(score["items"])}
    avg = average(values)
    return told if avg is None else told | {"avg": avg}
