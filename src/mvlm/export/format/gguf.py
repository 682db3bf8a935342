"""Two GGUF files that llama.cpp runs, the language model and the `mmproj`, with manifest, card and a script for the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mvlm.data.tokenizer import SentencePieceTokenizer
from mvlm.export import class_token, language, scores, tokenizer, vision
from mvlm.export.card import HEAD, card, jetson, parity_row, score_rows
from mvlm.export.class_token import has_class_token
from mvlm.export.engine import Engine
from mvlm.export.gate import Gate, Parity, context
from mvlm.export.handover import Source, Unproven, described, show
from mvlm.export.quantise import FILE_TYPES
from mvlm.run import write_json
from mvlm.score import TITLES

QUANTS = ("f16", *FILE_TYPES)


def place(cfg: DictConfig) -> str:
    """`gguf/q4_k`.

    Raises:
        ValueError: no such quant, scores of unproven files, or there is no llama.cpp.
    """
    if cfg.quant not in QUANTS:
        raise ValueError(f"quant={cfg.quant}: there is no such type (there are: {', '.join(QUANTS)})")
    if cfg.gate or cfg.quant != "f16":
        _ = Engine.of(cfg).name  # an error now, if there is none
    if cfg.scores and not cfg.gate:
        raise ValueError("scores=true with gate=false: scores of unproven files would pass for the model's")
    return f"gguf/{cfg.quant}"


def check(source: Source, cfg: DictConfig) -> int:
    """16 bits a parameter, and at most 8.5 more for one of the language model that is quantised: both files are there then.

    Raises:
        ValueError: llama.cpp can't compute this model, or it has no benchmarks to be scored by.
    """
    if cfg.scores and source.run is None:
        raise ValueError(
            f"scores=true is for run folders, which know their benchmarks; {cfg.run} is a released checkpoint"
        )
    model = source.chat.model
    language.check(model.language)
    vision.check(model, source.chat.pictures)
    whole, words = (sum(value.numel() for value in part.parameters()) for part in (model, model.language))
    return 2 * whole + (0 if cfg.quant == "f16" else words * 17 // 16)


def write(folder: Path, source: Source, cfg: DictConfig) -> None:
    """Both files, proven, and what is told about them.

    Raises:
        Unproven: the gate did not pass; parity.json tells all of it.
    """
    chat, engine, found = source.chat, Engine.of(cfg), scores.opened(cfg, source.run) if cfg.scores else []
    f16, wanted, mmproj = (folder / f"{part}.gguf" for part in ("language-f16", f"language-{cfg.quant}", "mmproj-f16"))
    vocabulary = tokenizer.vocabulary(chat.words, source.tokenizer, chat.model.language.config.vocab_size)
    # Taken before the gate reads the quantised weights into the model.
    about = _about(source, cfg)
    of = {vision.WEIGHTS: hashlib.sha256("".join(about["from"]["weights_sha256"].values()).encode()).hexdigest()}
    language.write(f16, chat.model.language, source.name, vocabulary | tokenizer.chat_template(chat.talk) | of)
    vision.write(mmproj, chat.model, chat.pictures, source.name, of)
    vision.check_file(mmproj, f16)
    matrices = {} if cfg.quant == "f16" else engine.quantise(f16, wanted, cfg.quant)
    about["matrices"] = matrices
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
    if cfg.scores and _misordered(parities):
        Console().print("[bold yellow]Not scored: what sees next to nothing would be no score of these files.[/]")
    elif cfg.scores:
        with _progress() as progress:
            measured = scores.measure(cfg, source.run, chat, found, wanted, mmproj, progress)
        _show_scores(source, measured, cfg.quant)
    if wanted != f16:
        f16.unlink()
    mend = has_class_token(chat.model.vision)  # however the engine at hand orders it: most builds do it wrongly
    end = ".needs-mended-llama.cpp" * mend + ".unproven" * (not parities)
    wanted = wanted.rename(folder / f"{source.name}-{cfg.quant}{end}.gguf")
    mmproj = mmproj.rename(folder / f"mmproj-{source.name}-f16{end}.gguf")
    about |= {
        "files": {"language": described(wanted), "mmproj": described(mmproj)},
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


def notes(source: Source, quant: str) -> list[str]:
    """What somebody who runs the files must know."""
    model, look, words, told = source.chat.model, source.chat.pictures, source.chat.words, []
    if look.mode != "letterbox":
        told.append(
            f"Trained on pictures of mode {look.mode}, and llama.cpp fits them otherwise (it resizes first, then pads with "
            f"a grey of its own). Give it pictures fitted already, {look.size}x{look.size} px, as the gate did."
        )
    if vision.activation(model.vision.tower.blocks[0].mlp.act) == "gelu":
        told.append("llama.cpp's GELU is the tanh one, by a table in float16: most of what image embeddings are off.")
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


def _about(source: Source, cfg: DictConfig) -> dict[str, Any]:
    """The manifest's share that is known before the files are."""
    model, about = source.chat.model, source.about()
    about["projector"]["in llama.cpp"] = vision.projector_type(model.projector)
    about["made"]["versions"]["gguf"] = version("gguf")
    return about | {"quant": cfg.quant, "context": context(model), "notes": notes(source, cfg.quant)}


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


def _show_parity(source: Source, engine: Engine, parities: list[Parity]) -> None:
    rows = [parity_row(parity.as_dict()) for parity in parities]
    show(f"{source.name}: {engine.name} beside PyTorch", HEAD, rows)
    for parity in parities:
        for tie in parity.ties:
            Console().print(f"{parity.quant}: {tie}: a near tie")
    if _misordered(parities):
        told = (
            f"{engine.name} misplaces the class token and would see next to nothing with these files, which are right."
        )
        Console().print(f"[bold yellow]{told} {class_token.CURE}[/]")


def _misordered(parities: list[Parity]) -> bool:
    """Whether the engine at hand was seen to misplace the class token."""
    return any(parity.class_token == "misordered" for parity in parities)


def _show_scores(source: Source, measured: dict[str, Any], quant: str) -> None:
    title = f"{source.name}, protocol {measured['protocol']}: PyTorch's scores and llama.cpp's"
    show(title, ("benchmark", "PyTorch", f"llama.cpp, {quant}", "questions"), score_rows(measured, TITLES))
