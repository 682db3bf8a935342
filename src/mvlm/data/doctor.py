"""One pass over a corpus before anything is trained on it: what is there, what is broken, what would teach nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from mvlm.batch import IGNORE_INDEX
from mvlm.data.dataset import MISSING, LlavaDataset, shown
from mvlm.data.image import PictureError, Pictures
from mvlm.data.prompt import IMAGE_TAG

USELESS_LIMIT = 0.001
"""Share of samples that are of no use above which a training stops: without any label, or with a picture that they do not show."""

USELESS = {
    "blanked": "teach nothing, for they have no label: their answers are empty or lie beyond recipe.max_length",
    "unseen": "have a picture that is not shown, for no <image> says where it stands, or it stands beyond recipe.max_length: put the tag "
    "into the first question, or take `image` out of what is meant as text",
}
"""What such samples are told to be, and the cure."""

WRONG = ("missing", "malformed", "corrupt", "blanked", "truncated", "unseen")
"""What is counted of a source: its `SourceReport` tells what each means."""


@dataclass(frozen=True)
class Finding:
    """One record that something is wrong with."""

    record: int
    """Its place in the file, from 0."""
    id: str
    kind: str
    """`missing` picture, `format`, `corrupt` picture, `blanked` (no label), `unseen` (no place for the
    picture)."""
    reason: str


@dataclass
class SourceReport:
    """What was found in one source of a stage. Samples are the records that can be trained on as far as their text goes."""

    stage: str
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
    """Samples whose picture has no place in the text: it has none, or it was cut off."""
    pictures: int = 0
    """Distinct pictures."""
    label_tokens: int = 0
    tokens: dict[str, float] = field(default_factory=dict)
    """min, median, p95 and max of the ids of a sample, pictures included."""
    histogram: dict[str, int] = field(default_factory=dict)
    """Samples with at most so many ids, and more than the power of two before."""
    findings: list[Finding] = field(default_factory=list)
    excluded: list[int] = field(default_factory=list)
    """Records that an earlier list left out; they were not looked at, and stay on the list."""


@dataclass
class Report:
    """What was found in a corpus, a source of a stage at a time."""

    sources: list[SourceReport]

    def tables(self) -> tuple[Table, Table]:
        """The numbers that fit on a screen: what is there, and what is wrong."""
        title = "What is there; ids of a sample: median, 95 %, most"
        there = _table(title, "source", "samples", "text only", "pictures", "labels", "median", "95 %", "most")
        wrong = _table("What is wrong", "source", *WRONG)
        stage = None
        for source in self.sources:
            if source.stage != stage:
                stage = source.stage
                there.add_row(f"[bold]{stage}")
                wrong.add_row(f"[bold]{stage}")
            counts = (source.samples, source.text_only, source.pictures, source.label_tokens)
            lengths = (f"{source.tokens[name]:,.0f}" if source.tokens else "-" for name in ("median", "p95", "max"))
            there.add_row(source.source, *(f"{count:,}" for count in counts), *lengths)
            wrong.add_row(source.source, *(f"{getattr(source, kind):,}" for kind in WRONG))
        return there, wrong

    def exclusions(self) -> dict[str, Any]:
        """Records to leave out by stage and source, as `read_exclusions` takes them: they or their pictures cannot be read, they teach
        nothing, or they speak of a picture that they do not show. What a stage cannot use another may."""
        listed: dict[str, Any] = {}
        for s in self.sources:
            records = sorted({*s.excluded, *(f.record for f in s.findings)})
            entry = {"annotations": s.annotations, "sha256": s.sha256, "records": records}
            listed.setdefault(s.stage, {})[s.source] = entry
        return listed

    def save(self, folder: str | Path) -> None:
        """Writes doctor.json, all that was found, and exclude.json, the records to leave out."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("doctor.json", asdict(self)), ("exclude.json", self.exclusions())):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def examine(stages: Mapping[str, Sequence[LlavaDataset]], threads: int = 4) -> Report:
    """Decodes every distinct picture once (once for each way that it is fitted) and tokenises every dialogue.

    Args:
        stages: the sources of each, opened with `on_bad_sample="skip"`, or the first bad record ends the examination before it begins.
        threads: pictures decoded at once.
    """
    named = [(stage, dataset, repr(dataset.pictures)) for stage, datasets in stages.items() for dataset in datasets]
    looks = {(look, path): d.pictures for _, d, look in named for path in d.pictures_used}
    seen, damaged = list(looks), {}
    with Progress(transient=True) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("decoding pictures", total=len(seen))
        for begin in range(0, len(seen), 1024):  # in blocks, as the pool would queue a million at once
            block = seen[begin : begin + 1024]
            reasons = pool.map(_damage, [path for _, path in block], [looks[key] for key in block])
            damaged |= {key: reason for key, reason in zip(block, reasons, strict=True) if reason}
            progress.advance(task, len(block))
        task = progress.add_task("reading dialogues", total=sum(len(dataset) for _, dataset, _ in named))
        return Report([_examine(*each, damaged, lambda: progress.advance(task)) for each in named])


def check_useful(report: Report, limit: float = USELESS_LIMIT) -> None:
    """Stops where too many samples of a source are of no use.

    Raises:
        ValueError: naming each such source with its share and its first such records.
    """
    for kind, what in USELESS.items():
        told = []
        for source in report.sources:
            if (count := getattr(source, kind)) > limit * source.samples:
                records = [str(f.record) for f in source.findings if f.kind == kind][:3]
                share = f"{count} of {source.samples} ({count / source.samples:.2%}"
                told.append(f"{source.stage}, {source.source}: {share}; records {', '.join(records)}, ...)")
        if told:
            raise ValueError(
                f"samples above the limit of {limit:.2%} {what}. {'; '.join(told)}. To train without them: exclude=<report>/exclude.json"
            )


def read_exclusions(path: str | Path, stage: str, source: str, sha256: str) -> list[int]:
    """Record numbers that a stage leaves out of a source whose annotation file has this hash, for `LlavaDataset(exclude=...)`.

    Raises:
        ValueError: there is no such list; the stage's source was not examined when it was made; or another annotation file was, so that the
            numbers mean other records.
    """
    cure = "examine the corpus (again): python doctor.py, with the same model=, data= and corpus="
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8"))
        entry = listed.get(stage, {}).get(source)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"exclude={path} is no list of the doctor's ({error}): {cure}") from error
    if entry is None:
        known = ", ".join(f"{name}/{one}" for name, sources in listed.items() for one in sources)
        raise ValueError(f"exclude={path} knows {known or 'no source'}, and not {stage}/{source}: {cure}")
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
    stage: str,
    dataset: LlavaDataset,
    look: str,
    damaged: dict[tuple[str, str | None], str],
    advance: Callable[[], None],
) -> SourceReport:
    """One source, its damaged pictures known by how they are fitted and their path."""
    report = SourceReport(stage, dataset.source, str(dataset.annotations), dataset.sha256, samples=len(dataset))
    report.excluded = dataset.excluded
    report.findings = [
        Finding(s.record, s.id, "missing" if s.kind == MISSING else "format", s.reason) for s in dataset.skipped
    ]
    report.missing = sum(s.kind == MISSING for s in dataset.skipped)
    report.malformed = len(dataset.skipped) - report.missing
    report.pictures = len(dataset.pictures_used)
    tokens = []
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
        if encoded.unseen:
            report.unseen += 1
            tagged = any(IMAGE_TAG in turn["value"] for turn in record["conversations"])
            found["unseen"] = (
                f"{IMAGE_TAG} stands beyond max_length {dataset.max_length}"
                if tagged
                else f"no turn has an {IMAGE_TAG}"
            )
        name = shown(record.get("id", number), 80)
        report.findings += [Finding(number, name, kind, reason) for kind, reason in found.items()]
        advance()
    if not tokens:
        return report
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
