"""Several datasets as one."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from copy import copy

import numpy as np
from torch.utils.data import Dataset

from mvlm.data.dataset import LlavaDataset, Sample
from mvlm.data.image import PictureError
from mvlm.data.index import Kept


class Mixture(Dataset[Sample]):
    """The samples of several datasets, one after the other.

    Args:
        datasets: the sources, each of its own name.

    Raises:
        ValueError: equal names, no source, or one of which nothing is left.
    """

    def __init__(self, datasets: Sequence[LlavaDataset]) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise ValueError("a mixture of no source has no sample")
        names = Counter(dataset.source for dataset in self.datasets)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two datasets are called {twice[0]!r}; counts go by name, so give each its own")
        for one in self.datasets:
            if not len(one):
                left_out = f", {len(one.skipped)} bad and {len(one.excluded)} excluded" if len(one.index) else ""
                raise ValueError(f"{one.annotations} holds no sample: {len(one.index)} records{left_out}")
        self.ends = np.cumsum([0, *map(len, self.datasets)]).tolist()
        """Where each dataset's samples begin among all, and their number."""
        self._kept = Kept(self.ends[-1], np.array([], np.int64))
        self.skipped = [one for dataset in self.datasets for one in dataset.skipped]
        """Samples that are left out: bad records, and those whose picture was tried before training and could not be read."""
        self.total = self.ends[-1] + len(self.skipped)
        """Samples that were asked for, the bad records among them."""

    def without(self, numbers: np.ndarray) -> Mixture:
        """The same mixture without some of its samples.

        Args:
            numbers: of samples among all, ascending.
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
        for dataset in self.datasets:
            self.skipped += [dataset.unreadable(int(place), error) for place in dataset.showing([picture])]
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
        return self.datasets[which], int(number - self.ends[which])

    @property
    def lengths(self) -> np.ndarray:
        """int32 (N,): words of each dialogue, negative without a picture."""
        return np.delete(np.concatenate([dataset.lengths for dataset in self.datasets]), self._kept.dropped)

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each source."""
        before = self.ends - np.searchsorted(self._kept.dropped, self.ends)
        return {dataset.source: int(count) for dataset, count in zip(self.datasets, np.diff(before), strict=True)}

    @property
    def pictures_used(self) -> list[str]:
        """Paths of the distinct pictures, in order of first use."""
        kept, paths = np.asarray(self._kept), []
        for dataset, begin, end in zip(self.datasets, self.ends, self.ends[1:], strict=False):
            paths += dataset.pictures_of(kept[slice(*np.searchsorted(kept, (begin, end)))] - begin)
        return list(dict.fromkeys(paths))
