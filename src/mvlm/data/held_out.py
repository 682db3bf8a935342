"""A few samples that a stage never trains on, to watch what the model sees while it learns."""

from __future__ import annotations

import numpy as np

from mvlm.data.dataset import Sample
from mvlm.data.mixture import Mixture


def hold_out(mixture: Mixture, count: int) -> tuple[Mixture, list[Sample]]:
    """Take `count` samples with different pictures out of a mixture, spread over its sources in turn.

    Whatever else shows one of those pictures is taken out as well: this stage trains on none of them. A sample whose picture cannot
    be read, or has no place in the text, is passed over. Of the samples that have a picture, fewer are taken where there are fewer than
    eight times as many, or where more than a quarter of them would go: a tiny run, or one of few pictures with many questions each,
    keeps its data.

    Returns:
        The mixture without them, and the samples; fewer than two are no use (their pictures could not be swapped) and give none.
    """
    pictured = int((mixture.lengths > 0).sum())
    count = min(count, pictured // 8)
    places = [np.flatnonzero(dataset.lengths > 0) for dataset in mixture.datasets]
    taken: dict[str, Sample] = {}
    depth = 0
    while len(taken) < count and depth < max(map(len, places), default=0):
        depth += 1
        for which, there in enumerate(places):
            if depth <= len(there) and len(taken) < count:
                dataset, place = mixture.datasets[which], int(there[-depth])
                if (picture := dataset.picture(place)) not in taken and (sample := dataset[place]).picture:
                    taken[picture] = sample
    while len(taken) >= 2:
        shown = np.concatenate(
            [begin + dataset.showing(taken) for dataset, begin in zip(mixture.datasets, mixture.ends, strict=False)]
        )
        rest = mixture.without(shown)
        if len(mixture) - len(rest) <= pictured // 4:
            return rest, list(taken.values())
        taken.popitem()
    return mixture, []
