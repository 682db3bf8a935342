"""Several datasets as one, with a number of samples taken of each."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch.utils.data import Dataset

from mvlm.data.dataset import LlavaDataset, Sample


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
        ValueError: unknown or equal names, more samples than there are, or none at all.
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
        self._chosen = [
            _choose(dataset, samples.get(dataset.source, len(dataset)), seed, repeat) for dataset in self.datasets
        ]
        self._ends = array("q", torch.tensor([len(c) for c in self._chosen]).cumsum(0).tolist())
        if not self._ends or self._ends[-1] == 0:
            raise ValueError(f"the mixture of {', '.join(names) or 'no source'} has no sample")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """The sample at a place of the mixture."""
        dataset, place = self.find(index)
        return dataset[place]

    def find(self, index: int) -> tuple[LlavaDataset, int]:
        """The dataset that a sample comes from, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = bisect_right(self._ends, index)
        return self.datasets[which], self._chosen[which][index - (self._ends[which - 1] if which else 0)]

    @property
    def lengths(self) -> list[int]:
        """Words of each dialogue, negative without a picture."""
        lengths = []
        for dataset, chosen in zip(self.datasets, self._chosen, strict=True):
            all_of_it = dataset.lengths
            lengths += [all_of_it[k] for k in chosen]
        return lengths

    @property
    def counts(self) -> dict[str, int]:
        """Samples taken of each source."""
        return {dataset.source: len(chosen) for dataset, chosen in zip(self.datasets, self._chosen, strict=True)}

    @property
    def available(self) -> dict[str, int]:
        """Samples there are of each source."""
        return {dataset.source: len(dataset) for dataset in self.datasets}

    @property
    def pictures_used(self) -> list[str]:
        """Paths of the distinct pictures of the samples taken, in order of first use."""
        pairs = zip(self.datasets, self._chosen, strict=True)
        paths = (dataset.picture(k) for dataset, chosen in pairs for k in chosen)
        return [path for path in dict.fromkeys(paths) if path is not None]


def _choose(dataset: LlavaDataset, wanted: int, seed: int, repeat: bool) -> array:
    """Places of the samples taken, in the order of the file."""
    there = len(dataset)
    if wanted < 0:
        raise ValueError(f"{wanted} samples of {dataset.source!r} cannot be taken")
    if wanted > there and not repeat:
        raise ValueError(
            f"{wanted} samples of {dataset.source!r} are asked for, but there are {there}: ask for at most that many, "
            f"or set repeat=True to see some of them {-(-wanted // there)} times"
        )
    rounds, rest = divmod(wanted, there)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {dataset.source}".encode()))
    chosen = torch.randperm(there, generator=generator)[:rest].sort().values.tolist()
    return array("q", [*range(there)] * rounds + chosen)
