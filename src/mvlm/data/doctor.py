"""One pass over a corpus before anything is trained on it: what is there, what is broken, what would teach nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN
from mvlm.data.dataset import MISSING, LlavaDataset, shown
from mvlm.data.image import PictureError, Pictures
from mvlm.data.prompt import IMAGE_TAG

BLANKED_LIMIT = 0.001
"""Share of samples without any label above which a training stops."""

WRONG = ("missing", "malformed", "corrupt", "blanked", "truncated", "unseen")
"""What is counted of a source: its `SourceReport` tells what each means."""


@dataclass(frozen=True)
class Finding:
    """One record that something is wrong with."""

    record: int
    """Its place in the file, from 0."""
    id: str
    kind: str
    """`missing` picture, `format`, `corrupt` picture, `blanked` (no label), `unseen` (the picture's place was cut
    off)."""
    reason: str


@dataclass
class SourceReport:
    """What was found in one source. Samples are the records that can be trained on as far as their text goes."""

    source: str
    annotations: str
    sha256: str
    """Of the annotation file: the record numbers below belong to it."""
    samples: int = 0
    text_only: int = 0
    missing: int = 0
    malformed: int = 0
    corrupt: int = 0
    blanked: int = 0
    truncated: int = 0
    unseen: int = 0
    """Samples whose picture lost its place in the text to truncation."""
    pictures: int = 0
    """Distinct pictures."""
    label_tokens: int = 0
    tokens: dict[str, float] = field(default_factory=dict)
    """min, median, p95 and max of the ids of a sample, pictures included."""
    histogram: dict[str, int] = field(default_factory=dict)
    """Samples with at most so many ids, and more than the power of two before."""
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Report:
    """What was found in a corpus, a source at a time."""

    sources: list[SourceReport]

    def tables(self) -> tuple[Table, Table]:
        """The numbers that fit on a screen: what is there, and what is wrong."""
        title = "What is there; ids of a sample: median, 95 %, most"
        there = _table(title, "source", "samples", "text only", "pictures", "labels", "median", "95 %", "most")
        wrong = _table("What is wrong", "source", *WRONG)
        for source in self.sources:
            counts = (source.samples, source.text_only, source.pictures, source.label_tokens)
            lengths = (f"{source.tokens[name]:,.0f}" if source.tokens else "-" for name in ("median", "p95", "max"))
            there.add_row(source.source, *(f"{count:,}" for count in counts), *lengths)
            wrong.add_row(source.source, *(f"{getattr(source, kind):,}" for kind in WRONG))
        return there, wrong

    def exclusions(self) -> dict[str, Any]:
        """Records to leave out, as `read_exclusions` takes them: they or their pictures cannot be read, or they teach nothing."""
        bad, listed = ("missing", "format", "corrupt", "blanked"), {}
        for s in self.sources:  # one that two stages show in two ways is here twice
            entry = listed.setdefault(s.source, {"annotations": s.annotations, "sha256": s.sha256, "records": []})
            entry["records"] = sorted({*entry["records"], *(f.record for f in s.findings if f.kind in bad)})
        return listed

    def save(self, folder: str | Path) -> None:
        """Writes doctor.json, all that was found, and exclude.json, the records to leave out."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("doctor.json", asdict(self)), ("exclude.json", self.exclusions())):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def examine(datasets: Sequence[LlavaDataset], threads: int = 4) -> Report:
    """Decodes every distinct picture once (once for each way that it is fitted) and tokenises every dialogue.

    Args:
        datasets: opened with `on_bad_sample="skip"`, or the first bad record ends the examination before it begins.
        threads: pictures decoded at once.
    """
    looks = {(repr(d.pictures), path): d.pictures for d in datasets for path in d.pictures_used}
    seen, damaged = list(looks), {}
    with Progress(transient=True) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("decoding pictures", total=len(seen))
        for begin in range(0, len(seen), 1024):  # in blocks, as the pool would queue a million at once
            block = seen[begin : begin + 1024]
            reasons = pool.map(_damage, [path for _, path in block], [looks[key] for key in block])
            damaged |= {key: reason for key, reason in zip(block, reasons, strict=True) if reason}
            progress.advance(task, len(block))
        task = progress.add_task("reading dialogues", total=sum(map(len, datasets)))
        return Report([_examine(dataset, damaged, lambda: progress.advance(task)) for dataset in datasets])


def check_blanked(report: Report, limit: float = BLANKED_LIMIT) -> None:
    """Stops where too many samples of a source have no label.

    Raises:
        ValueError: naming each such source with its share and its first such records.
    """
    bad = [s for s in report.sources if s.blanked > limit * s.samples]
    if not bad:
        return
    told = []
    for source in bad:
        records = [str(f.record) for f in source.findings if f.kind == "blanked"][:3]
        share = f"{source.blanked} of {source.samples} ({source.blanked / source.samples:.2%}"
        told.append(f"{source.source} {share}; records {', '.join(records)}, ...)")
    raise ValueError(
        f"samples that teach nothing, for they have no label, above the limit of {limit:.2%}: {'; '.join(told)}. Their "
        "answers are empty or lie beyond max_length: raise it, or train without them (exclude=<report>/exclude.json)"
    )


def read_exclusions(path: str | Path, source: str, sha256: str) -> list[int]:
    """Record numbers to leave out of a source whose annotation file has this hash, for `LlavaDataset(exclude=...)`.

    Raises:
        ValueError: there is no such list; the source was not examined when it was made; or another annotation file was, so that the numbers
            mean other records.
    """
    cure = "examine the corpus (again): python doctor.py, with the same model=, data= and corpus="
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8"))
        entry = listed.get(source)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"exclude={path} is no list of the doctor's ({error}): {cure}") from error
    if entry is None:
        raise ValueError(f"exclude={path} knows {', '.join(listed) or 'no source'}, and not {source}: {cure}")
    if sha256 != entry["sha256"]:
        raise ValueError(
            f"{entry['annotations']} has changed since {path} was made (sha256 {entry['sha256'][:12]} then, {sha256[:12]} now): "
            f"its record numbers do not hold any more; {cure}"
        )
    return entry["records"]


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _examine(
    dataset: LlavaDataset, damaged: dict[tuple[str, str | None], str], advance: Callable[[], None]
) -> SourceReport:
    """One source, its damaged pictures known by how they are fitted and their path."""
    report = SourceReport(dataset.source, str(dataset.annotations), dataset.sha256, samples=len(dataset))
    report.findings = [
        Finding(s.record, s.id, "missing" if s.kind == MISSING else "format", s.reason) for s in dataset.skipped
    ]
    report.missing = sum(s.kind == MISSING for s in dataset.skipped)
    report.malformed = len(dataset.skipped) - report.missing
    report.pictures = len(dataset.pictures_used)
    tokens, look = [], repr(dataset.pictures)
    for index in range(len(dataset)):
        record, path, number = dataset.record(index), dataset.picture(index), dataset.record_number(index)
        encoded = dataset.encode(record)
        tokens.append(len(encoded.input_ids))
        report.label_tokens += sum(label != IGNORE_INDEX for label in encoded.labels)
        report.text_only += path is None
        report.truncated += encoded.truncated
        found = {}
        if reason := damaged.get((look, path)):
            report.corrupt += 1
            found["corrupt"] = reason
        if encoded.blanked:
            report.blanked += 1
            found["blanked"] = "cut off before its first answer" if encoded.truncated else "no answer has a text"
        if path is not None and encoded.truncated and IMAGE_TOKEN not in encoded.input_ids:
            report.unseen += 1
            found["unseen"] = f"{IMAGE_TAG} stands beyond max_length {dataset.max_length}"
        name = shown(record.get("id", number), 80)
        report.findings += [Finding(number, name, kind, reason) for kind, reason in found.items()]
        advance()
    report.tokens = {
        "min": float(min(tokens)),
        "median": float(np.median(tokens)),
        "p95": float(np.percentile(tokens, 95)),
        "max": float(max(tokens)),
    }
    bins = Counter(1 << (length - 1).bit_length() for length in tokens)
    report.histogram = {str(bound): bins[bound] for bound in sorted(bins)}
    return report


def _damage(path: str, pictures: Pictures) -> str | None:
    """Why a picture cannot be read, or None."""
    try:
        pictures.open(path)
    except PictureError as error:
        return str(error)
    return None
