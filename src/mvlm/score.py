"""A trained model answers the benchmarks; the scores go into its run folder, beside a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from mvlm import build
from mvlm.benchmark.base import Benchmark
from mvlm.benchmark.evaluate import evaluate
from mvlm.benchmark.ranks import ranks
from mvlm.data.corpus import Corpus
from mvlm.data.tokenizer import Tokenizer
from mvlm.model.mobilevlm import MobileVLM
from mvlm.page import CONTROLS, Shown, page
from mvlm.run import Run, write_json

TITLES = {"gqa": "GQA", "sqa": "SQA-I", "textvqa": "VQA-T", "pope": "POPE", "mme": "MME-P", "mmbench": "MMB-dev"}
"""Column heads of the paper's tables."""


def benchmarks(cfg: DictConfig, folder: Path) -> list[Benchmark]:
    """The chosen benchmarks, reading their files from `folder`."""
    whole = OmegaConf.create({"benchmark": cfg, "benchmark_root": str(folder)})
    return list(instantiate(whole.benchmark, _convert_="all").values())


def run(
    run: Run,
    model: Callable[[], MobileVLM],
    files: Corpus,
    words: Tokenizer,
    chosen: DictConfig,
    controls: Sequence[str],
    *,
    folder: str | Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    precision: str = "auto",
    device: str = "auto",
    again: bool = False,
    flips: bool = False,
) -> dict[str, Any]:
    """Answer, score, print, and write results.json and index.html. Of several processes each answers its part, and one writes.

    Args:
        model: builds the model; not called if every answer is stored already.
        folder: of the benchmark files; the corpus' own if None.
        again, flips: see `evaluate`.
    """
    folder = Path(folder or files.benchmarks)
    found = benchmarks(chosen, folder)

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
    results["corpus"] = str(folder)
    if ranks()[0] > 0:
        return results
    write_json(run.folder / "results.json", results)
    (run.folder / "index.html").write_text(page_of(run, results, found), encoding="utf-8")
    show(results, run)
    return results


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
    items = {TITLES.get(n, n): str(v["none"]["items"]) for n, v in results["benchmarks"].items()}
    for name, cells in rows(results).items():
        table.add_row(name, *(cells[view] for view in views), items.get(name, ""))
    Console().print(table)
    gaps = [results["avg"]["none"] - results["avg"][c] for c in views[1:] if results["avg"]["none"] is not None]
    if gaps and min(gaps) < 5:
        Console().print("[yellow]The true picture gains it less than 5 points: this model has not learned to see.[/]")
    if flips := results.get("flips"):
        flipped, items = (sum(told[key] for told in flips.values()) for key in ("flipped", "items"))
        Console().print(f"answered one at a time, {flipped} of {items} answers come out otherwise")
    Console().print(f"look at {run.folder / 'index.html'}")


def log(results: dict[str, Any], wandb: WandbLogger | None) -> None:
    """The scores as a W&B summary: `scores/gqa/none`, ..., `scores/avg/blind`."""
    if wandb is None:
        return
    for name, views in results["benchmarks"].items():
        wandb.experiment.summary.update({f"scores/{name}/{view}": score["value"] for view, score in views.items()})
    wandb.experiment.summary.update({f"scores/avg/{view}": value for view, value in results["avg"].items()})


def about(run: Run, results: dict[str, Any]) -> str:
    """What produced the figures: they are never to be read without it."""
    cfg = run.config
    corpus = (
        "generated pocket benchmarks" if "pocket" in str(cfg.corpus.root) else "benchmark files of " + results["corpus"]
    )
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
        for line in (
            (run.folder / "answers" / f"{benchmark.name}.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
        ):
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
