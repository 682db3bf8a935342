"""The folder that goes to the device: both files, manifest, card and script. Made aside, and named when all is whole and
proven."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mvlm.chat import Chat
from mvlm.data.tokenizer import SentencePieceTokenizer
from mvlm.export import class_token, language, scores, tokenizer, vision
from mvlm.export.card import HEAD, card, jetson, parity_row, score_rows
from mvlm.export.engine import Engine
from mvlm.export.gate import Gate, Parity, context
from mvlm.export.quantise import FILE_TYPES
from mvlm.model.files import read_config
from mvlm.model.names import projector_type
from mvlm.run import Run, file_hash, manifest, write_json
from mvlm.score import TITLES

QUANTS = ("f16", *FILE_TYPES)


class Unproven(ValueError):
    """The gate did not pass."""


@dataclass(frozen=True)
class Source:
    """What is exported."""

    name: str
    folder: Path
    chat: Chat
    """The model with its tokenizer, its template and its way to look at pictures."""
    tokenizer: Path
    """The tokenizer's folder."""
    run: Run | None
    """None for a released checkpoint."""

    @classmethod
    def open(cls, folder: str | Path) -> Source:
        """A run folder (its last stage; adapters were merged when that was saved), or a released MobileVLM.

        Raises:
            ValueError: it is neither.
        """
        folder = Path(folder)
        if (folder.parent / "config.yaml").exists():  # a stage's folder inside a run folder
            folder = folder.parent
        chat, name = Chat.open(folder), folder.resolve().name
        if not (folder / "config.yaml").exists():
            return cls(name, folder, chat, folder, None)
        run = Run.find(folder)
        words = run.config.model.tokenizer
        return cls(name, folder, chat, Path(instantiate(words) if isinstance(words, DictConfig) else words), run)

    @property
    def weights(self) -> Path:
        """The folder of the weights."""
        return self.run.last_stage() if self.run else self.folder

    def notes(self, quant: str) -> list[str]:
        """What somebody who runs the files must know."""
        model, look, words, told = self.chat.model, self.chat.pictures, self.chat.words, []
        if look.mode != "letterbox":
            told.append(
                f"Trained on pictures of mode {look.mode}, and llama.cpp fits them otherwise (it resizes first, then pads with "
                f"a grey of its own). Give it pictures fitted already, {look.size}x{look.size} px, as the gate did."
            )
        if vision.activation(model.vision.tower.blocks[0].mlp.act) == "gelu":
            told.append(
                "llama.cpp's GELU is the tanh one, by a table in float16: most of what image embeddings are off."
            )
        if isinstance(words, SentencePieceTokenizer) and not words.legacy:
            told.append(
                "The tokenizer is not `legacy`, and llama.cpp tokenises as if it were: from the second question of a "
                "conversation on, one more space stands after `</s>`."
            )
        if quant == "q4_k" and model.language.config.hidden_size % 256:
            told.append(
                f"Rows of {model.language.config.hidden_size} are no multiple of 256, so most matrices have 5 bits instead: "
                "q4_0 is smaller for this model."
            )
        return told


def export(cfg: DictConfig) -> Path:
    """What conf/export.yaml says. Returns the folder.

    Raises:
        ValueError: llama.cpp can't compute this model, there is no llama.cpp, or the gate did not pass. Then nothing has a
            final name; what did not pass is kept in a folder whose name ends in `.failed`.
    """
    if cfg.quant not in QUANTS:
        raise ValueError(f"quant={cfg.quant}: there is no such type (there are: {', '.join(QUANTS)})")
    if cfg.gate or cfg.quant != "f16":
        _ = Engine.of(cfg).name  # an error now, if there is none
    if cfg.scores and not cfg.gate:
        raise ValueError("scores=true with gate=false: scores of unproven files would pass for the model's")
    torch.set_num_threads(cfg.threads)
    source = Source.open(cfg.run)
    if cfg.scores and source.run is None:
        raise ValueError(
            f"scores=true is for run folders, which know their benchmarks; {cfg.run} is a released checkpoint"
        )
    language.check(source.chat.model.language)
    vision.check(source.chat.model, source.chat.pictures)
    out = Path(cfg.out or source.folder / "gguf" / cfg.quant)
    aside, failed, old = (out.with_name(out.name + end) for end in (".part", ".failed", ".old"))
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    aside.mkdir(parents=True)
    try:
        _fill(aside, source, cfg)
    except Unproven as error:
        shutil.rmtree(failed, ignore_errors=True)
        aside.replace(failed)
        raise ValueError(f"{error}\nWhat did not pass is kept in {failed}") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for folder in (failed, old):
        shutil.rmtree(folder, ignore_errors=True)
    if out.exists():
        out.replace(old)
    aside.replace(out)
    shutil.rmtree(old, ignore_errors=True)
    Console().print(f"written: {out}", soft_wrap=True)
    return out


def _fill(folder: Path, source: Source, cfg: DictConfig) -> None:
    """Everything that belongs into the folder.

    Raises:
        Unproven: the gate did not pass; parity.json tells all of it.
    """
    chat, engine, found = source.chat, Engine.of(cfg), scores.opened(cfg, source.run) if cfg.scores else []
    f16, wanted, mmproj = (folder / f"{part}.gguf" for part in ("language-f16", f"language-{cfg.quant}", "mmproj-f16"))
    vocabulary = tokenizer.vocabulary(chat.words, source.tokenizer, chat.model.language.config.vocab_size)
    language.write(f16, chat.model.language, source.name, vocabulary | tokenizer.chat_template(chat.talk))
    vision.write(mmproj, chat.model, chat.pictures, source.name)
    vision.check_file(mmproj, f16)
    matrices = {} if cfg.quant == "f16" else engine.quantise(f16, wanted, cfg.quant)
    # Taken before the gate reads the quantised weights into the model.
    about = _about(source, cfg) | {"matrices": matrices}
    parities, measured = [], None
    if cfg.gate:
        with _progress() as progress:
            gate = Gate(chat.model, chat.words, chat.talk, chat.pictures, engine, progress)
            parities = [gate.check(f16, mmproj)]
            if parities[0].passed and wanted != f16:
                parities.append(gate.check(wanted, mmproj, cfg.quant))
        _show_parity(source, engine, parities)
        if faults := [f"{parity.quant}: {fault}" for parity in parities for fault in parity.faults]:
            write_json(folder / "parity.json", [parity.as_dict() for parity in parities])
            raise Unproven(f"{engine.name} does not compute what PyTorch does:\n  " + "\n  ".join(faults))
    if cfg.scores:
        with _progress() as progress:
            measured = scores.measure(cfg, source.run, chat, found, wanted, mmproj, progress)
        _show_scores(source, measured, cfg.quant)
    if wanted != f16:
        f16.unlink()
    mend = any(parity.class_token == "misordered" for parity in parities)
    end = ".unproven" if not parities else ".needs-mended-llama.cpp" if mend else ""
    wanted = wanted.rename(folder / f"{source.name}-{cfg.quant}{end}.gguf")
    mmproj = mmproj.rename(folder / f"mmproj-{source.name}-f16{end}.gguf")
    about |= {
        "files": {
            role: {"name": file.name, "bytes": file.stat().st_size, "sha256": file_hash(file)}
            for role, file in (("language", wanted), ("mmproj", mmproj))
        },
        "proven": bool(parities),
        "needs a mended llama.cpp": mend,
        "engine": engine.name if parities else None,
        "parity": [parity.as_dict() for parity in parities],
        "scores": measured,
    }
    write_json(folder / "manifest.json", about)
    (folder / "README.md").write_text(card(about, TITLES), encoding="utf-8")
    (folder / "jetson.sh").write_text(jetson(about), encoding="utf-8")
    (folder / "jetson.sh").chmod(0o755)


def _about(source: Source, cfg: DictConfig) -> dict[str, Any]:
    """The manifest's share that is known before the files are."""
    model, look, made = source.chat.model, source.chat.pictures, manifest()
    return {
        "name": source.name,
        "quant": cfg.quant,
        "tower": model.vision.arguments,
        "projector": {
            "type": projector_type(model.projector),
            "in llama.cpp": vision.projector_type(model.projector),
            "image tokens": model.image_tokens,
        },
        "context": context(model),
        "template": source.chat.talk.name,
        "pictures": {"mode": look.mode, "size": look.size, "mean": look.mean.tolist(), "std": look.std.tolist()},
        "notes": source.notes(cfg.quant),
        "from": {
            "stage": source.weights.name,
            "weights_sha256": {path.name: file_hash(path) for path in sorted(source.weights.glob("*.safetensors"))},
            "run": source.run.facts if source.run else None,
            "config": source.run.config_dict() if source.run else read_config(source.folder),
        },
        "made": made | {"versions": made["versions"] | {"gguf": version("gguf")}},
    }


# ----------------------------------------------------------------------------------------------------- what is shown


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """A function that opens a bar and gives back what moves it on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:

        def opened(title: str, count: int) -> Callable[[], None]:
            task = bars.add_task(title, total=count)
            return lambda: bars.advance(task)

        yield opened


def _show(title: str, head: tuple[str, ...], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _show_parity(source: Source, engine: Engine, parities: list[Parity]) -> None:
    rows = [parity_row(parity.as_dict()) for parity in parities]
    _show(f"{source.name}: {engine.name} beside PyTorch", HEAD, rows)
    for parity in parities:
        for tie in parity.ties:
            Console().print(f"{parity.quant}: {tie}: a near tie")
    if any(parity.class_token == "misordered" for parity in parities):
        told = (
            f"{engine.name} misplaces the class token and would see next to nothing with these files, which are right."
        )
        Console().print(f"[bold yellow]{told} {class_token.CURE}[/]")


def _show_scores(source: Source, measured: dict[str, Any], quant: str) -> None:
    title = f"{source.name}, protocol {measured['protocol']}: PyTorch's scores and llama.cpp's"
    _show(title, ("benchmark", "PyTorch", f"llama.cpp, {quant}", "questions"), score_rows(measured, TITLES))
