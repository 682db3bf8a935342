"""A trained model answers the benchmarks; the scores go into its run folder, beside a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from mvlm import build
from mvlm.benchmark.base import Benchmark, Protocol
from mvlm.benchmark.evaluate import answers_file, evaluate
from mvlm.benchmark.ranks import ranks
from mvlm.data.corpus import Corpus
from mvlm.data.tokenizer import Tokenizer
from mvlm.model.mobilevlm import MobileVLM
from mvlm.page import CONTROLS, Shown, page
from mvlm.run import Run, write_json

TITLES = {"gqa": "GQA", "sqa": "SQA-I", "textvqa": "VQA-T", "pope": "POPE", "mme": "MME-P", "mmbench": "MMB-dev"}
"""Column heads of the paper's tables."""


def benchmarks(
    cfg: DictConfig, folder: Path, protocol: Protocol = "paper", any_version: bool = True
) -> list[Benchmark]:
    """The chosen benchmarks, reading their files from `folder`.

    Args:
        any_version: take other files than the published ones.

    Raises:
        ValueError: a benchmark does not know the protocol, or does not take another of its settings.
    """
    root = {"benchmark_root": str(folder), "protocol": protocol, "any_version": any_version}
    try:
        return list(instantiate(OmegaConf.create({"benchmark": cfg} | root).benchmark, _convert_="all").values())
    except InstantiationException as error:  # Hydra's own words around ours
        raise error.__cause__ or error from None


def is_generated(cfg: DictConfig, folder: str | Path | None) -> bool:
    """Whether a run's benchmark files are the pocket world's own."""
    return folder is None and "pocket" in str(cfg.corpus.root)


def opened(
    cfg: DictConfig,
    chosen: DictConfig,
    files: Corpus,
    *,
    folder: str | Path | None = None,
    protocol: Protocol = "paper",
    any_version: bool = False,
) -> list[Benchmark]:
    """The chosen benchmarks of a run, read once, so that what is wrong with them is told before any work.

    Args:
        folder: of the benchmark files; the corpus' own if None.
        any_version: take files of no published version. The generated ones are always taken.

    Raises:
        ValueError: a benchmark does not know the protocol; a file or a picture is missing, or a file is another one.
    """
    root = Path(folder) if folder else files.benchmarks
    found = benchmarks(chosen, root, protocol, any_version or is_generated(cfg, folder))
    for benchmark in found:
        benchmark.questions()
    return found


def run(
    run: Run,
    model: Callable[[], MobileVLM],
    files: Corpus,
    words: Tokenizer,
    chosen: DictConfig,
    controls: Sequence[str],
    *,
    folder: str | Path | None = None,
    protocol: Protocol = "paper",
    any_version: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    precision: str = "auto",
    device: str = "auto",
    again: bool = False,
    flips: bool = False,
) -> dict[str, Any]:
    """Answer, score, print, and write results.json and index.html (results-harness.json and index-harness.html).

    Of several processes each answers its part, and one writes.

    Args:
        model: builds the model; not called if every answer is stored already.
        folder, protocol, any_version: see `opened`.
        again, flips: see `evaluate`.
    """
    cfg = run.config
    found = opened(cfg, chosen, files, folder=folder, protocol=protocol, any_version=any_version)

    @cache
    def ready() -> MobileVLM:
        # In its type once; autocast would convert the weights again for every batch.
        return model().to(build.device(device), build.autocast_type(build.precision(precision)))

    results = evaluate(
        ready,
        found,
        run.folder / "answers",
        controls=list(controls),
        again=again,
        flips=flips,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        features={},
        **build.asking(run.config, words, ready),
    )
    results["model"] = run.folder.name
    results["corpus"] = str(folder or files.benchmarks)
    results["generated"] = is_generated(cfg, folder)
    if ranks()[0] > 0:
        return results
    write_json(run.folder / f"results{beside(results)}.json", results)
    (run.folder / f"index{beside(results)}.html").write_text(page_of(run, results, found), encoding="utf-8")
    show(results, run)
    return results


def beside(results: dict[str, Any]) -> str:
    """What the names of another protocol's files and figures end in, so that they stand beside the paper's."""
    return "" if results["protocol"] == "paper" else f"-{results['protocol']}"


def rows(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The table's cells as text: each benchmark's score and half-width of its interval by view, then Avg."""
    table = {}
    for name, views in results["benchmarks"].items():
        table[TITLES.get(name, name)] = {
            view: f"{s['value']:.1f}"
            + (f" ± {(s['interval'][1] - s['interval'][0]) / 2:.1f}" if view == "none" else "")
            for view, s in views.items()
        }
    if results["avg"]["none"] is not None:
        table["Avg"] = {view: f"{value:.1f}" for view, value in results["avg"].items()}
    return table


def show(results: dict[str, Any], run: Run) -> None:
    """The scores as a table in the terminal."""
    table = Table(title=about(run, results), title_justify="left")
    views = list(results["avg"])
    table.add_column("benchmark")
    for view in views:
        table.add_column(CONTROLS[view], justify="right")
    table.add_column("questions", justify="right")
    items = {TITLES.get(n, n): asked(v["none"], results["generated"]) for n, v in results["benchmarks"].items()}
    for name, cells in rows(results).items():
        table.add_row(name, *(cells[view] for view in views), items.get(name, ""))
    Console().print(table)
    gaps = [results["avg"]["none"] - results["avg"][c] for c in views[1:] if results["avg"]["none"] is not None]
    if gaps and min(gaps) < 5:
        Console().print("[yellow]The true picture gains it less than 5 points: this model has not learned to see.[/]")
    if flips := results.get("flips"):
        flipped, items = (sum(told[key] for told in flips.values()) for key in ("flipped", "items"))
        Console().print(f"answered one at a time, {flipped} of {items} answers come out otherwise")
    Console().print(f"look at {run.folder / f'index{beside(results)}.html'}")


def asked(score: dict[str, Any], generated: bool) -> str:
    """How many questions, and whether they are a published set: 12578 (testdev-balanced), 40 (no published version)."""
    origin = score["official"] or "no published version"
    return str(score["items"]) if generated else f"{score['items']} ({origin})"


def log(results: dict[str, Any], wandb: WandbLogger | None) -> None:
    """The scores as a W&B summary: `scores/gqa/none`, ..., `scores/avg/blind`; of the harness `scores-harness/...`."""
    if wandb is None:
        return
    key = f"scores{beside(results)}"
    for name, views in results["benchmarks"].items():
        wandb.experiment.summary.update({f"{key}/{name}/{view}": score["value"] for view, score in views.items()})
    wandb.experiment.summary.update({f"{key}/avg/{view}": value for view, value in results["avg"].items()})


def about(run: Run, results: dict[str, Any]) -> str:
    """What produced the figures: they are never to be read without it."""
    corpus = "generated pocket benchmarks" if results["generated"] else "benchmark files of " + results["corpus"]
    other = [TITLES.get(name, name) for name, views in results["benchmarks"].items() if not views["none"]["official"]]
    if other and not results["generated"]:
        corpus += f" ({', '.join(other)} of no published version)"
    return f"{run.folder.name}, protocol {results['protocol']}, {corpus}, 95% intervals over pictures"


def page_of(run: Run, results: dict[str, Any], found: Sequence[Benchmark], pictures: int = 24) -> str:
    """The run's page: scores, curve, and the first pictures with their questions."""
    history = {
        stage: json.loads((run.folder / stage / "stage.json").read_text())["history"]
        for stage in build.STAGES
        if run.finished(stage)
    }
    shown: list[Shown] = []
    share = max(1, pictures // len(found))
    for benchmark in found:
        marks = results["benchmarks"][benchmark.name]["none"]["per_question"]
        answers = {}
        for line in answers_file(run.folder / "answers", benchmark).read_text(encoding="utf-8").strip("\n").split("\n"):
            entry = json.loads(line)
            answers[entry["id"]] = entry["text"]
        seen: dict[Any, int] = {}
        for q in benchmark.questions():
            if q.image is None or q.id not in marks or (q.image not in seen and len(seen) >= share):
                continue
            seen[q.image] = seen.get(q.image, 0) + 1
            if seen[q.image] <= 3:
                truth = q.truth if isinstance(q.truth, str) else json.dumps(q.truth, default=str)
                shown.append(
                    Shown(
                        TITLES.get(benchmark.name, benchmark.name),
                        q.text.split("\nAnswer ")[0],
                        truth,
                        answers[q.id],
                        marks[q.id],
                        q.image,
                    )
                )
    note = (
        about(run, results)
        + ". The controls ask the same questions with no picture and with another question's picture: "
        "what a model gains over them is what it sees."
    )
    return page(f"{run.folder.name}", note, rows(results), history, shown)
