"""Several datasets as one, with a number of samples taken of each."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np
import torch
from torch.utils.data import Dataset

from mvlm.data.dataset import LlavaDataset, Sample
from mvlm.data.image import PictureError
from mvlm.data.index import Kept


class Mixture(Dataset[Sample]):
    """The samples of several datasets, one after the other.

    Which samples are taken depends on the seed and the source's name only, and n of them are the first n of any
    larger number. So a smaller run sees a part of what a larger one sees, and adding a source changes nothing in the
    others.

    Args:
        datasets: the sources, each of its own name.
        samples: source -> how many to take; sources not named are taken whole, 0 leaves one out.
        seed: of the choice.
        repeat: where more are asked for than there are, take all of them again. Without it that is an error: a source
            seen twice is another experiment, which nobody should run by mistake.

    Raises:
        ValueError: unknown or equal names, more samples than there are, or a source of which nothing is left.
    """

    def __init__(
        self,
        datasets: Sequence[LlavaDataset],
        samples: Mapping[str, int] | None = None,
        seed: int = 0,
        repeat: bool = False,
    ) -> None:
        self.datasets, samples = list(datasets), dict(samples or {})
        names = [dataset.source for dataset in self.datasets]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"two datasets are called {twice[0]!r}; counts and choice go by name, so give each its own"
            )
        if unknown := sorted(set(samples) - set(names)):
            raise ValueError(f"no source {', '.join(unknown)} in this mixture; there are {', '.join(names)}")
        for one in self.datasets:
            if not len(one):
                left_out = f", {len(one.skipped)} bad and {len(one.excluded)} excluded" if len(one.index) else ""
                raise ValueError(f"{one.annotations} holds no sample: {len(one.index)} records{left_out}")
        self.chosen = [
            _choose(dataset, samples.get(dataset.source, len(dataset)), seed, repeat) for dataset in self.datasets
        ]
        """For each dataset the places of the samples taken, in the order of the file."""
        self.ends = np.cumsum([0, *map(len, self.chosen)]).tolist()
        """Where each dataset's samples begin among all those taken, and their number."""
        self._kept = Kept(self.ends[-1], np.array([], np.int64))
        self.skipped = [one for dataset in self.datasets for one in dataset.skipped]
        """Samples that are left out: bad records, and those whose picture was tried before training and could not be read."""
        self.total = self.ends[-1] + len(self.skipped)
        """Samples that were asked for, the bad records among them."""
        if not len(self):
            raise ValueError(f"the mixture of {', '.join(names) or 'no source'} has no sample")

    def without(self, numbers: np.ndarray) -> Mixture:
        """The same mixture without some of the samples taken.

        Args:
            numbers: of samples among all those taken, ascending.
        """
        rest = copy(self)
        rest._kept = Kept(self.ends[-1], np.union1d(self._kept.dropped, numbers))
        return rest

    def unreadable(self, picture: str, error: PictureError) -> int:
        """Puts the samples that show a picture which cannot be read among the `skipped`; they stay in their places.

        Returns:
            How many there are.

        Raises:
            PictureError: of a dataset with `on_bad_sample=stop`; the message names the record.
        """
        before = len(self.skipped)
        for dataset, chosen in zip(self.datasets, self.chosen, strict=True):
            places = np.intersect1d(dataset.showing([picture]), np.asarray(chosen, np.int64))
            self.skipped += [dataset.unreadable(int(place), error) for place in places]
        return len(self.skipped) - before

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place of the mixture."""
        dataset, place = self.find(index)
        return dataset[place]

    def find(self, index: int) -> tuple[LlavaDataset, int]:
        """The dataset that a sample comes from, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = self._kept[index]
        which = bisect_right(self.ends, number) - 1
        return self.datasets[which], int(self.chosen[which][number - self.ends[which]])

    @property
    def lengths(self) -> np.ndarray:
        """int32 (N,): words of each dialogue, negative without a picture."""
        pairs = zip(self.datasets, self.chosen, strict=True)
        return np.delete(np.concatenate([dataset.lengths[chosen] for dataset, chosen in pairs]), self._kept.dropped)

    @property
    def counts(self) -> dict[str, int]:
        """Samples taken of each source."""
        before = self.ends - np.searchsorted(self._kept.dropped, self.ends)
        return {dataset.source: int(count) for dataset, count in zip(self.datasets, np.diff(before), strict=True)}

    @property
    def available(self) -> dict[str, int]:
        """Samples there are of each source."""
        return {dataset.source: len(dataset) for dataset in self.datasets}

    @property
    def pictures_used(self) -> list[str]:
        """Paths of the distinct pictures of the samples taken, in order of first use."""
        kept, paths = np.asarray(self._kept), []
        for dataset, chosen, begin, end in zip(self.datasets, self.chosen, self.ends, self.ends[1:], strict=False):
            some = kept[slice(*np.searchsorted(kept, (begin, end)))] - begin
            paths += dataset.pictures_of(np.asarray(chosen, np.int64)[some])
        return list(dict.fromkeys(paths))


def _choose(dataset: LlavaDataset, wanted: int, seed: int, repeat: bool) -> range | np.ndarray:
    """Places of the samples taken, in the order of the file."""
    there = len(dataset)
    if wanted < 0:
        raise ValueError(f"{wanted} samples of {dataset.source!r} cannot be taken")
    if wanted > there and not repeat:
        raise ValueError(
            f"{wanted} samples of {dataset.source!r} are asked for, but there are {there}: ask for at most that many, "
            f"or set repeat=True to see some of them {-(-wanted // there)} times"
        )
    if wanted == there:
        return range(there)
    rounds, rest = divmod(wanted, there)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {dataset.source}".encode()))
    chosen = torch.randperm(there, generator=generator)[:rest].sort().values.numpy()
    return np.concatenate([np.tile(np.arange(there), rounds), chosen])
