"""A few samples that a stage never trains on, to watch what the model sees while it learns."""

from __future__ import annotations

from array import array
from copy import copy

from mvlm.data.dataset import Sample
from mvlm.data.mixture import Mixture


def hold_out(mixture: Mixture, count: int) -> tuple[Mixture, list[Sample]]:
    """Take `count` samples with different pictures out of a mixture, spread over its sources in turn.

    Whatever else shows one of those pictures is taken out as well, so the model has never seen them. Fewer are taken where the
    mixture has fewer than eight times as many samples: a tiny run keeps its data.

    Returns:
        The mixture without them, and the samples; fewer than two are no use (their pictures could not be swapped) and give none.
    """
    count = min(count, len(mixture) // 8)
    places = [
        [place for place in chosen if dataset.picture(place)]
        for dataset, chosen in zip(mixture.datasets, mixture._chosen, strict=True)
    ]
    taken: dict[str, tuple[int, int]] = {}
    depth = 0
    while len(taken) < count and depth < max(map(len, places), default=0):
        depth += 1
        for which, there in enumerate(places):
            if depth <= len(there) and len(taken) < count:
                taken.setdefault(mixture.datasets[which].picture(there[-depth]), (which, there[-depth]))
    if len(taken) < 2:
        return mixture, []
    rest = copy(mixture)
    rest._chosen = [
        array("q", [place for place in chosen if dataset.picture(place) not in taken])
        for dataset, chosen in zip(mixture.datasets, mixture._chosen, strict=True)
    ]
    ends, total = array("q"), 0
    for chosen in rest._chosen:
        ends.append(total := total + len(chosen))
    rest._ends = ends
    return rest, [mixture.datasets[which][place] for which, place in taken.values()]
