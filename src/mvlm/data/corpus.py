"""What the name of a source means: which file, which pictures, how many samples, where they come from and what of
them is dead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm.data.shards import is_url

KEYS = ("file", "images", "samples", "origin", "status")


@dataclass(frozen=True)
class Source:
    """An annotation file in LLaVA's format, and the folder (or the shards of it, or their URL) that its `image` paths start from."""

    name: str
    annotations: Path
    images: Path | str | None
    """None: a file whose records have no pictures."""
    samples: int | None = None
    """As published, or as the generated world was asked for; the file has the last word. None: not known."""


class Corpus:
    """The files behind the names that `data` lists. Two of them: generated (`conf/corpus/pocket.yaml`) and real
    (`full.yaml`).

    Args:
        root: the folder that everything lies in.
        sources: name -> any of `file` (below root; default `train/<name>.json`), `images` (below root, or a URL of
            shards; default `pictures`; null where no record has one), `samples`, `origin` (where to get it) and `status` (what is dead or
            unknown about it). Names may share a file; see `source`.
        benchmarks: the folder of the benchmark files, below root.
        samples: name -> samples, for sources of which nothing else needs saying.

    Raises:
        ValueError: an entry has a key that means nothing.
    """

    def __init__(
        self,
        root: str | Path,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        benchmarks: str = "benchmarks",
        samples: Mapping[str, int] | None = None,
    ) -> None:
        self.root = Path(root)
        self.benchmarks = self.root / benchmarks
        self.entries: dict[str, dict[str, Any]] = {name: {"samples": count} for name, count in (samples or {}).items()}
        for name, entry in (sources or {}).items():
            if odd := set(entry) - set(KEYS):
                raise ValueError(
                    f"source {name!r} of the corpus has {', '.join(sorted(odd))}; an entry may have {', '.join(KEYS)}"
                )
            self.entries[name] = self.entries.get(name, {}) | dict(entry)

    def source(self, name: str, beside: Sequence[str] = ()) -> Source:
        """The files of one name.

        Some names share one file that does not say which of its records is whose (the nine of Table 2, in the
        released mixture). Asked for together they are one source, named after the file; fewer of them cannot be had.

        Args:
            beside: the other names that are asked for.

        Raises:
            ValueError: there is no such name; its file or its pictures are missing (the message says where they come
                from and what is dead); or it shares its file with names that are not asked for.
        """
        if name not in self.entries:
            near = difflib.get_close_matches(name, self.entries, n=1, cutoff=0.5)
            raise ValueError(
                f"the corpus has no source {name!r}{f'; did you mean {near[0]!r}?' if near else ''} "
                f"(it has {', '.join(self.entries)}; a file of your own ends in .json or .jsonl)"
            )
        entry = self.entries[name]
        sharing = [other for other in self.entries if self._file(other) == self._file(name)]
        annotations, images = self.root / self._file(name), entry.get("images", "pictures")
        images = images if images is None or is_url(images) else self.root / images
        for path, what in ((annotations, "the annotation file"), (images, "the folder of pictures")):
            if path is not None and not is_url(path) and not path.exists():
                raise ValueError(
                    f"{what} of source {name!r} is missing: {path}. {self._told(name, sharing)}Put it there, or set "
                    "corpus.root to the folder that everything lies in, or give what you have as data=custom"
                )
        if apart := [other for other in sharing if other not in (name, *beside)]:
            raise ValueError(
                f"{annotations} holds {', '.join(sharing)} without saying which record is whose, so {name!r} needs "
                f"{', '.join(apart)} beside it; or split the file yourself and give the parts as data=custom"
            )
        counts = [self.entries[other].get("samples") for other in sharing]
        return Source(
            name if len(sharing) == 1 else annotations.stem,
            annotations,
            images,
            None if None in counts else sum(counts),
        )

    def _file(self, name: str) -> str:
        return self.entries[name].get("file", f"train/{name}.json")

    def _told(self, name: str, sharing: Sequence[str]) -> str:
        """Where a source comes from, and what is dead of it and of what lies in the same file."""
        origin, troubles = self.entries[name].get("origin"), {n: self.entries[n].get("status") for n in sharing}
        told = "; ".join(f"{n}: {trouble}" for n, trouble in troubles.items() if trouble)
        return (f"It comes from {origin}. " if origin else "") + (f"Known trouble: {told}. " if told else "")


def sources_of(corpus: Corpus, names: Sequence[str], images: str | Path | None = None) -> list[Source]:
    """The files of several names, in order; names that share a file are one source.

    Args:
        corpus: where names are looked up.
        names: of the corpus, or paths of the user's own LLaVA-format files, which end in `.json` or `.jsonl`.
        images: the folder that the `image` paths of the user's own files start from; None where they have none.

    Raises:
        ValueError: as `Corpus.source`; or a name stands twice, or a file or the folder of the user's is missing.
    """
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(
            f"{', '.join(twice)} stands twice among the sources; to train longer, give the stage more epochs"
        )
    found = [_own(name, images) if is_own(name) else corpus.source(name, beside=names) for name in names]
    return list({source.annotations: source for source in found}.values())


def is_own(name: str) -> bool:
    """Whether a source's name is the path of the user's own file."""
    return name.endswith((".json", ".jsonl"))


def _own(name: str, images: str | Path | None) -> Source:
    file = Path(name)
    if not file.is_file():
        raise ValueError(
            f"{file.absolute()} is missing: names in data.pretrain and data.finetune that end in .json or .jsonl are own files"
        )
    if images is not None and not is_url(images) and not Path(images).is_dir():
        raise ValueError(f"data.images={images} is no folder: the `image` paths of {name} start from there")
    return Source(name, file, images if images is None or is_url(images) else Path(images))
