"""The columns of the paper's Table 5 in llama.cpp: a picture, a prompt, 256 tokens of answer, with what makes up the time.

    python bench.py target=device                                       1.7b with 144 and with 576 tokens a picture, random weights
    python bench.py target=device models=[3b:ldpv2,3b:ldpv1] quant=q4_0 rounds=5
    python bench.py target=device models=[runs/pocket-ldpv2-v2-unfreeze_llm-s0/gguf/q4_k] threads=2
    python bench.py target=device llama_cpp=llama.cpp/build/bin gpu_layers=99        another build, such as one with CUDA

A model is a folder with a GGUF pair (export.py's, or any `mmproj*.gguf` beside one other .gguf), or `<model>:<projector>`, two
choices of conf/: built with random weights, written by the code that exports trained ones, and kept in the cache folder. The
time is that of trained weights, since no step of the work looks at a value; the tokenizer is made up (bytes, then rows that
no text meets), the answer is noise and nobody reads it. Every round measures each model once, in a fresh process, after a
warm-up request, in turn. The shown figures are those of one round, the one with the median total, so that they add up.

    image tokens     the server's count of the prompt, less the text's; compared with what the file must give
    encode           measured: from the line of the server's log that begins the picture to the line that begins its tokens'
                     prefill, in the same request (tower and projector; unpacking and fitting the picture comes before)
    prefill          a difference: the server's prompt_ms less encode; the picture's tokens and TEXT tokens of filler
    decode           measured: the server's predicted_ms, over the 255 tokens after the first, which falls out of the prefill
    T_total          a sum: prompt_ms + predicted_ms. What the asking side saw beyond that is kept as wall_ms
    Eval_avg         256 / T_total
    files            bytes of both files
    busy             measured without a GPU: processor time that the server got, of the request's whole time by its threads. Below
                     0.95 something else ran: such a round is kept and told, and shown only if there is no other
    peak memory      measured: the largest resident size of the server's process, mapped files and interpreter included, a GPU's
                     memory not

The paper's figures are of a Jetson AGX Orin and stand in a table of their own, for the same shapes of tower, projector and
language model. It does not tell its prompt, nor what T_total begins with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from mvlm import build
from mvlm.cli import CONF, ROOT, groups, nearest
from mvlm.data import byte_tokenizer
from mvlm.data.cache import cache_folder
from mvlm.data.image import Pictures
from mvlm.data.tokenizer import load_tokenizer
from mvlm.export import engine, gate, language, tokenizer, vision
from mvlm.export.container import Opened
from mvlm.export.engine import Engine, Timed
from mvlm.export.pair import Pair
from mvlm.export.quantise import FILE_TYPES
from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import meta_model
from mvlm.run import processor

TOKENS, TEXT, CONTEXT = 256, 64, 2048
"""Of the answer, as in the paper; of the prompt beside the picture's; positions that are kept."""

IDLE = 0.95
"""Share of its threads' time that a server gets on a machine where nothing else runs."""

PAPER = {
    (1024, 2048, 24, "mlp"): "LLaVA-1.5 1.4B",
    (1024, 2048, 24, "ldp"): "MobileVLM 1.7B",
    (1024, 2048, 24, "ldpv2"): "MobileVLM V2 1.7B",
    (1024, 2560, 32, "ldp"): "MobileVLM 3B",
    (1024, 2560, 32, "ldpv2"): "MobileVLM V2 3B",
    (1024, 4096, 32, "mlp"): "LLaVA-1.5 7B",
    (1024, 4096, 32, "ldpv2"): "MobileVLM V2 7B",
}
"""Width of the tower, width and layers of the language model, llama.cpp's projector -> Table 5's row. LLaVA-1.5 3.3B is not among
them: MobileLLaMA has no 3.3B. ShareGPT4V-7B has the shapes of LLaVA-1.5 7B."""


# ------------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Rival:
    """A model's two files."""

    name: str
    language: Path
    mmproj: Path
    missing: dict[Path, tuple[Callable[[Path], None], int]] = field(default_factory=dict)
    """Of the files: what writes those that are not there yet, and the bytes of disk that this may take meanwhile."""
    random: bool = False
    """Whether the weights are."""


def find(name: str, quant: str, threads: int) -> Rival:
    """The files of a model; see the top of the file for what it may be.

    Raises:
        ValueError: it is neither, or llama.cpp can't compute it.
    """
    if Path(name).is_dir():
        found = Pair.find(name)
        return Rival(name, found.language, found.mmproj)
    model, _, projector = name.partition(":")
    known = groups()
    for word, group in ((model, "model"), (projector, "projector")):
        if word not in known[group]:
            what = f"there is no {group} {word!r}{nearest(word, known[group])}" if ":" in name else "no model:projector"
            raise ValueError(
                f"models=[{name}]: no such folder, and {what} (models: {', '.join(known['model'])}; "
                f"projectors: {', '.join(known['projector'])})"
            )
    return random_pair(name, model, projector, quant, threads)


def random_pair(name: str, model: str, projector: str, quant: str, threads: int) -> Rival:
    """A model of conf/ with random weights: where its files are, and what writes those that are not."""
    inside = GlobalHydra.instance().is_initialized()  # a script runs within Hydra, a notebook does not
    with nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("bench", [f"model={model}", f"projector={projector}", "target=device"])
    shape, look = meta_model(cfg.model.module), build.pictures(cfg, "finetune")
    language.check(shape.language)
    vision.check(shape, look)

    def path(kind: str, *of: Any) -> Path:
        plain = [OmegaConf.to_container(one, resolve=True) for one in of]
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:6]
        return cache_folder() / "device" / f"{kind}-{digest}.gguf"

    files = {
        path(f"language-{model}-{quant}", cfg.model.module.language): partial(
            write_language, shape, model, quant, threads
        ),
        path(f"mmproj-{model}-{projector}", cfg.model.module, cfg.model.pictures): partial(
            write_mmproj, shape, look, name
        ),
    }
    halves = [2 * sum(p.numel() for p in part.parameters()) for part in (shape.language, shape)]
    # A float16 file goes before the quantised one, which is at most q8_0's 8.5 bits of 16 beside it.
    sizes = [halves[0] if quant == "f16" else halves[0] * 8 // 5, halves[1] - halves[0]]
    missing = {path: (files[path], size) for path, size in zip(files, sizes, strict=True) if not path.exists()}
    return Rival(name, *files, missing, random=True)


def write_language(model: MobileVLM, name: str, quant: str, threads: int, path: Path) -> None:
    """A language model with random weights."""
    folder = byte_tokenizer.build(cache_folder())
    words = tokenizer.vocabulary(load_tokenizer(folder), folder, model.language.config.vocab_size)
    whole, aside = (path.with_name(path.name + end) for end in (".f16", ".part"))
    try:
        language.write(whole, randomised(model).language, name, words)
        if quant == "f16":
            whole.replace(path)
        else:
            Engine(threads=threads).quantise(whole, aside, quant)
            aside.replace(path)
    finally:
        whole.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)


def write_mmproj(model: MobileVLM, look: Pictures, name: str, path: Path) -> None:
    """A tower and a projector with random weights."""
    aside = path.with_name(path.name + ".part")
    try:
        vision.write(aside, randomised(model), look, name)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def randomised(model: MobileVLM) -> MobileVLM:
    """Give a meta model values: every parameter is a view of one float16 tensor of the largest one's size, so that a model of
    any size takes no memory to speak of. A norm's weight is one."""
    largest = max(p.numel() for p in model.parameters())
    values = torch.randn(largest, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                one = name == "weight" and "norm" in type(module).__name__.lower()
                flat = torch.ones(parameter.numel()) if one else values[: parameter.numel()]
                module._parameters[name] = nn.Parameter(flat.view(parameter.shape), requires_grad=False)
    return model


# --------------------------------------------------------------------------------------------------- what files tell


@dataclass(frozen=True)
class Facts:
    """What a pair's files say of the work they make."""

    picture: int
    """Side of the tower's input in pixels."""
    image_tokens: int
    shapes: tuple[int, int, int, str]
    """A key of PAPER."""
    language: str
    """A hash over all that the speed of the language model depends on: its sizes, and each matrix' shape and type."""

    @classmethod
    def of(cls, pair: Rival) -> Facts:
        words, seen = Opened(pair.language), Opened(pair.mmproj)
        kind, side = seen.get("clip.projector_type"), seen.get("clip.vision.image_size")
        patches = (side // seen.get("clip.vision.patch_size")) ** 2
        width, layers = words.get("llama.embedding_length"), words.get("llama.block_count")
        sizes = [words.get(f"llama.{key}") for key in ("attention.head_count", "attention.head_count_kv", "vocab_size")]
        tensors = sorted((name, words.shape(name), words.kind(name)) for name in words.names())
        return cls(
            picture=side,
            image_tokens=patches if kind == "mlp" else patches // 4,
            shapes=(seen.get("clip.vision.embedding_length"), width, layers, kind),
            language=hashlib.sha256(json.dumps([sizes, tensors]).encode()).hexdigest(),
        )


def checked(pair: Rival) -> Facts:
    """What a pair's files say.

    Raises:
        ValueError: llama.cpp would not survive them, as where they are of two models; or they need more positions than are kept.
    """
    vision.check_file(pair.mmproj, pair.language)
    facts = Facts.of(pair)
    if (needed := facts.image_tokens + TEXT + TOKENS) > CONTEXT:
        raise ValueError(
            f"models=[{pair.name}]: {facts.image_tokens} image tokens, {TEXT} of text and {TOKENS} of answer are {needed} "
            f"positions, and {CONTEXT} are kept"
        )
    return facts


# ---------------------------------------------------------------------------------------------------------- the figures


def figures(took: Timed, tokens: int = TOKENS) -> dict[str, Any]:
    """A request in the table's terms."""
    total = (took.prompt_ms + took.predicted_ms) / 1e3
    told = {
        "encode_ms": took.encode_ms,
        "prefill_ms": took.prompt_ms - took.encode_ms,
        "predicted_ms": took.predicted_ms,
        "decode": 1e3 * (tokens - 1) / took.predicted_ms,
        "T_total": total,
        "Eval_avg": tokens / total,
        "wall_ms": took.wall_ms,
    }
    return {name: round(value, 6) for name, value in told.items()} | {"busy": took.busy and round(took.busy, 3)}


def disturbed(one: dict[str, Any]) -> bool:
    """Whether a round ran beside something else; nothing can be said of less than a second, in ticks of 10 ms."""
    return one["busy"] is not None and one["busy"] < IDLE and one["wall_ms"] > 1e3


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median total, of those that were not disturbed if any; of an even number the slower of the two."""
    counted = [one for one in rounds if not disturbed(one)] or rounds
    return sorted(counted, key=lambda one: one["T_total"])[len(counted) // 2]


def ratios(models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Models of one language model, each over the one with the most image tokens: the ratio of the shown rounds, and the least
    and the largest of the rounds, which were measured one after the other. None of a model whose every round was disturbed."""
    found = []
    quiet = {name: about for name, about in models.items() if not disturbed(about["shown"])}
    for same in dict.fromkeys(about["language"] for about in quiet.values()):
        group = [name for name, about in quiet.items() if about["language"] == same]
        base = max(group, key=lambda name: models[name]["image_tokens"])  # the first of several
        for name in group:
            if name != base:
                turns = zip(models[name]["rounds"], models[base]["rounds"], strict=True)
                pairs = [(models[name]["shown"], models[base]["shown"])]
                pairs += [(one, other) for one, other in turns if not disturbed(one) and not disturbed(other)]
                found.append({"model": name, "over": base, **{what: _span(what, pairs) for what in RATIOS}})
    return found


RATIOS: dict[str, Callable[[dict[str, float]], float]] = {
    "Eval_avg": lambda one: one["Eval_avg"],
    "encode": lambda one: one["encode_ms"],
    "prefill": lambda one: one["prefill_ms"],
    "encode + prefill": lambda one: one["encode_ms"] + one["prefill_ms"],
    "decode": lambda one: one["decode"],
}


def _span(what: str, pairs: Sequence[tuple[dict[str, float], dict[str, float]]]) -> list[float]:
    every = [RATIOS[what](one) / RATIOS[what](other) for one, other in pairs]
    return [round(value, 3) for value in (every[0], min(every), max(every))]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure `cfg.models`, `cfg.rounds` times in turn, and print the table, the ratios and the paper's rows.

    Returns:
        What was measured, in plain types; a model's `rounds` hold every figure of every round.

    Raises:
        ValueError: a model that can't be found, written or run. Nothing was measured then.
    """
    _check(cfg)
    llama = Engine.of(cfg)
    name = llama.name
    torch.set_num_threads(cfg.threads)
    pairs = [find(name, cfg.quant, cfg.threads) for name in _names(cfg)]
    facts = {pair.name: checked(pair) for pair in pairs if not pair.missing}  # before anything large is written
    _write(pairs)
    facts |= {pair.name: checked(pair) for pair in pairs if pair.missing}
    order = chain.from_iterable(pairs if number % 2 == 0 else reversed(pairs) for number in range(cfg.rounds))
    took: dict[str, list[Timed]] = {pair.name: [] for pair in pairs}
    for pair in track(list(order), f"rounds: {cfg.rounds}, models: {len(pairs)}"):
        took[pair.name].append(_request(llama, pair, facts[pair.name]))
    models = {pair.name: _told(pair, facts[pair.name], took[pair.name]) for pair in pairs}
    log = took[pairs[0].name][0].told
    build_of_wheel = f" ({engine.BUILD})" if name == f"{engine.PACKAGE} {engine.TESTED}" else ""
    version = f"{name}{build_of_wheel}, {log['build'] or 'of an untold build'}"
    gpu = f"{log['layers on a GPU']} layers on a GPU, tower on {log['tower']}" if cfg.gpu_layers else "no GPU"
    measured = {
        "what": f"{TOKENS} tokens about a picture and {TEXT} tokens of text; {version}; "
        f"{cfg.threads} thread{'s' if cfg.threads > 1 else ''} of {processor()}, {gpu}",
        "engine": version,
        "processor": processor(),
        "instructions": log["processor"],
        "threads": cfg.threads,
        "gpu": gpu,
        "disturbed": sum(disturbed(one) for about in models.values() for one in about["rounds"]),
        "tokens": TOKENS,
        "models": models,
        "ratios": ratios(models),
    }
    _show(measured)
    return measured


def _names(cfg: DictConfig) -> list[str]:
    return [cfg.models] if isinstance(cfg.models, str) else [str(name) for name in cfg.models or ()]


def _check(cfg: DictConfig) -> None:
    if cfg.quant not in ("f16", *FILE_TYPES):
        raise ValueError(f"quant={cfg.quant}: there is no such type (there are: f16, {', '.join(FILE_TYPES)})")
    names = _names(cfg)
    if not names or len(set(names)) < len(names) or cfg.rounds < 1 or cfg.threads < 1:
        raise ValueError(
            f"models={names}, rounds={cfg.rounds}, threads={cfg.threads}: at least one model, each once, one round, one thread"
        )


def _request(llama: Engine, pair: Rival, facts: Facts) -> Timed:
    """One measurement."""
    took = llama.timed(
        pair.language,
        pair.mmproj,
        gate.pictures(facts.picture)[0],  # as large as the tower's input: nothing is resized
        text=TEXT,
        tokens=TOKENS,
        context=CONTEXT,
    )
    if took.image_tokens != facts.image_tokens:
        raise ValueError(
            f"{pair.name}: llama.cpp made {took.image_tokens} tokens of the picture and the file must give "
            f"{facts.image_tokens}: it takes pictures apart otherwise than the paper, and nothing was measured"
        )
    return took


def _told(pair: Rival, facts: Facts, took: Sequence[Timed]) -> dict[str, Any]:
    """A model's share of what was measured."""
    rounds, peaks = [figures(one) for one in took], [one.peak_bytes for one in took]
    return {
        "random_weights": pair.random,
        "files": {path.name: path.stat().st_size for path in (pair.language, pair.mmproj)},
        "image_tokens": facts.image_tokens,
        "text_tokens": TEXT,
        "language": facts.language[:12],
        "paper": PAPER.get(facts.shapes),
        "peak_bytes": None if None in peaks else max(peaks),
        "shown": middle(rounds),
        "rounds": rounds,
    }


def _write(pairs: Sequence[Rival]) -> None:
    missing = {
        path: how for pair in pairs for path, how in pair.missing.items()
    }  # a language model that two share once
    if not missing:
        return
    folder = cache_folder() / "device"
    folder.mkdir(parents=True, exist_ok=True)
    needs, free = sum(size for _, size in missing.values()), shutil.disk_usage(folder).free
    if needs > free:
        raise ValueError(
            f"random weights need up to {needs / 1e9:.1f} GB of disk, {folder} has {free / 1e9:.1f}: free some, or set "
            "MVLM_CACHE to a folder on another disk"
        )
    for path, (write, _) in missing.items():
        Console().print(f"random weights: writing {path}", soft_wrap=True)
        write(path)


# ---------------------------------------------------------------------------------------------------- what is shown


SHOWN = {
    "encode, ms": "encode_ms",
    "prefill, ms": "prefill_ms",
    "decode, tokens/s": "decode",
    "T_total, s": "T_total",
    "Eval_avg, tokens/s": "Eval_avg",
    "busy": "busy",
}


def _show(measured: dict[str, Any]) -> None:
    console, models = Console(), measured["models"]
    console.print(measured["what"], soft_wrap=True)
    table = Table("")
    for name in models:
        table.add_column(name, overflow="fold")
    table.add_row("weights", *("random" if about["random_weights"] else "of the files" for about in models.values()))
    table.add_row("image tokens", *(str(about["image_tokens"]) for about in models.values()))
    for row, key in SHOWN.items():
        table.add_row(row, *(_cell(key, about) for about in models.values()))
    table.add_row("files, GB", *(f"{sum(about['files'].values()) / 1e9:.2f}" for about in models.values()))
    peaks = (about["peak_bytes"] for about in models.values())
    table.add_row("peak memory, GB", *("not told" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks))
    console.print(table)
    count = len(next(iter(models.values()))["rounds"])
    if count > 1:
        told = f"Of {count} rounds the one with the median T_total; in brackets the least and the largest of all."
        console.print(told, soft_wrap=True)
    if measured["disturbed"]:
        told = (
            f"{measured['disturbed']} of {count * len(models)} measurements ran beside something else (busy below {IDLE}) and "
            "count only where there is no other, and in no ratio: measure again on an idle machine."
        )
        console.print(f"[bold yellow]{told}[/]", soft_wrap=True)
    for one in measured["ratios"]:
        spans = [f"{what} x{mid:.2f} ({low:.2f} to {high:.2f})" for what in RATIOS for mid, low, high in [one[what]]]
        console.print(f"{one['model']} over {one['over']}, the same language model: {', '.join(spans)}", soft_wrap=True)
    _show_paper(console, measured)


def _cell(key: str, about: dict[str, Any]) -> str:
    value, rounds = about["shown"][key], [one[key] for one in about["rounds"]]
    if None in rounds:
        return "not told"
    digits = max(0, 4 - len(str(int(value)))) if key != "busy" else 2
    shown = f"{value:.{digits}f}"
    return f"{shown} ({min(rounds):.{digits}f} to {max(rounds):.{digits}f})" if len(rounds) > 1 else shown


def _show_paper(console: Console, measured: dict[str, Any]) -> None:
    """The paper's rows of the same shapes: another machine's figures, in a table of their own."""
    rows = {row.model: row for row in OmegaConf.load(ROOT / "results" / "published.yaml").table5}
    same = {name: about["paper"] for name, about in measured["models"].items() if about["paper"]}
    if not same:
        return
    table = Table(title="The paper's Jetson AGX Orin, 4 bits (Table 5): not measured here", title_justify="left")
    for column in ("the paper's model", "T_total, s", "Eval_avg, tokens/s", "the same shapes here"):
        table.add_column(column, justify="right" if "," in column else "left")
    for name, row in same.items():
        table.add_row(row, f"{rows[row].T_total:.2f}", f"{rows[row].Eval_avg:.2f}", name)
    console.print(table)
    for one in measured["ratios"]:
        ours, base = same.get(one["model"]), same.get(one["over"])
        if ours and base:
            ratio = rows[ours].Eval_avg / rows[base].Eval_avg
            console.print(f"The paper's Orin, {ours} over {base}: Eval_avg x{ratio:.2f}", soft_wrap=True)
