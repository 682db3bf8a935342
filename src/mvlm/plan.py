"""What a cell of a table costs: parameters, tokens, FLOPs, memory and hours. Nothing is downloaded, no weight is made.

python -m mvlm.plan model=1.7b projector=ldpv2 data=v2 strategy=unfreeze_llm devices=8 gpu=h100 mfu=0.35
python -m mvlm.plan model=1.7b gpu=h100 scale=true             # on 1 to 512 devices (mvlm.scale)
python -m mvlm.plan gpu=h100 scale=all json=scale.json         # every model and strategy so
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm.cli import groups, instance, script

# torch, timm and transformers take seconds to import and `--help` needs none of them: imported where they are used.
if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console
    from rich.table import Table

    from mvlm.model.mobilevlm import MobileVLM
    from mvlm.scale import Cluster

GPUS: dict[str, tuple[float, float]] = {"a100": (312, 80), "h100": (989, 80), "h200": (989, 141)}
"""Dense bfloat16 TFLOP/s and GB of memory, from NVIDIA's data sheets (SXM boards)."""

PAPER_CELL = "1.7b-ldpv2-v2-unfreeze_llm"
PAPER = {"pretrain": (5_000, 5.0), "finetune": (19_000, 9.0)}
"""Steps and hours of that cell on 8 A100 (paper, Table 3 and section 4.1)."""


@dataclass(frozen=True)
class Work:
    """FLOPs of a sample's matrix products and convolutions, two for a multiply-add.

    Attention counts whole, though half of it is masked; what checkpointing computes again does not count, as usual
    for MFU.
    """

    vision: int
    projector: int
    language: int
    backward: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.language + self.backward


@dataclass(frozen=True)
class Activations:
    """What a sample's forward keeps for its backward, in bytes. An estimate; see `activations`."""

    kept: int
    checkpointed: int
    logits: int
    cast: int
    """What autocast keeps beside `kept`."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a cell."""

    samples: int
    steps: int
    batch: int
    micro_batch: int
    parameters: int
    """In all, the stage's adapters among them."""
    learning: dict[str, int]
    """Parameters that learn, by part."""
    work: Work
    activations: Activations

    @property
    def flops(self) -> int:
        """Of the whole stage."""
        return self.samples * self.work.total


@dataclass(frozen=True)
class Plan:
    """A cell."""

    parameters: dict[str, int]
    """By part."""
    image_tokens: int
    positions: int
    """Of a sample: the picture's tokens and the text."""
    blocks: dict[str, int]
    """Layers, or blocks, of each part that is run, in the order of the forward."""
    outside: dict[str, int]
    """Parameters of those parts that lie in no layer: embeddings, head, projector."""
    stages: dict[str, StagePlan]


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def meta_model(module: Any, lora: Mapping[str, Any] | None = None) -> MobileVLM:
    """A model with shapes and no values: `module` is its config (`model.module`), `lora` the stage's adapters."""
    import torch

    with torch.device("meta"):
        model = instance(module)
        if lora:
            from mvlm.strategy.lora import attach

            attach(model.language, **lora)
    return model


def count_parts(model: MobileVLM, learning: bool = False) -> dict[str, int]:
    """Parameters of each part; only those that learn, if so asked."""
    from mvlm.strategy.parameters import by_part

    parts = by_part(model).items()
    counts = {part: sum(p.numel() for p in some if p.requires_grad or not learning) for part, some in parts}
    return {part: count for part, count in counts.items() if count}


def work(model: MobileVLM, text: int) -> Work:
    """Count the FLOPs of one sample, a picture and `text` words, by running a meta model forward and backward.

    What has its gradients off is counted as torch would run it: a frozen tower has no backward at all, a frozen
    language model still passes gradients through to the projector. Logits are made at every word, and the last layer
    is computed at the picture's positions, too, as the reference does (`LastLayer` spares that).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counts: list[int] = []

    def count(function, *arguments):
        with FlopCounterMode(display=False, custom_mapping=corrected()) as counter:
            result = function(*arguments)
        counts.append(counter.get_total_flops())
        return result

    with torch.device("meta"):
        features = count(model.encode, torch.empty(1, 3, model.image_size, model.image_size))
        tokens = count(model.project, features)
        words = model.language.get_input_embeddings()(torch.zeros(1, text, dtype=torch.long))
        positions = tokens.shape[1] + text
        # A mask that is given keeps transformers from looking at values, which meta tensors lack.
        mask = torch.empty(1, 1, positions, positions, dtype=torch.bool)

        def read(tokens):
            hidden = model.language.model(
                inputs_embeds=torch.cat([tokens, words], dim=1), attention_mask=mask, use_cache=False
            ).last_hidden_state
            return model.language.lm_head(hidden[:, -text:])

        logits = count(read, tokens)
        count(logits.sum().backward)
    return Work(*counts)


def corrected() -> dict[Any, Any]:
    """What torch's FLOP counter must be told."""
    import torch

    return {torch.ops.aten.convolution_backward: _convolution_backward}


def _convolution_backward(
    grad: Sequence[int], pixels: Sequence[int], weight: Sequence[int], *rest: Any, **ignored: Any
) -> int:
    """FLOPs of a convolution's backward, from shapes: one product for the input, if wanted, and one for the weight.

    Torch's own count forgets groups, and so makes a depthwise convolution of the projector 2,048 times too dear.
    """
    wanted = rest[-1]  # for input, weight, bias
    return 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight) * sum(wanted[:2])


def activations(language: Any, positions: int, words: int, trained: bool) -> Activations:
    """Roughly what one sample keeps for the backward of a LLaMA in bfloat16 with fused attention.

    A layer of width D with keys of width K and an MLP of width F keeps, a position: its two norms' inputs in float32
    (8 D bytes); queries, keys, values and the attention's output (4 D + 4 K); the MLP's gate, activated gate and up
    (6 F); where its weights learn, also the normalised inputs before and after their scale (8 D) and the MLP's
    product (2 F). With checkpointing only each layer's input (2 D) and one whole layer are there at a time. Logits:
    12 bytes a word of the vocabulary at the worst moment (bfloat16 and float32, values and gradients). Autocast over
    float32 weights that learn keeps each norm's output in float32 and a copy for each of the five products that read
    it (10 D more). Left out: tower, projector, the allocator's waste, buffers of communication.
    """
    width, mlp, layers = language.hidden_size, language.intermediate_size, language.num_hidden_layers
    keys = width // language.num_attention_heads * language.num_key_value_heads
    layer = positions * (12 * width + 4 * keys + 6 * mlp + (8 * width + 2 * mlp if trained else 0))
    checkpointed, cast = layers * positions * 2 * width + layer, 10 * width * layers * positions * trained
    return Activations(layers * layer, checkpointed, words * language.vocab_size * 12, cast)


def states(total: int, learning: int, devices: int, zero: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer that a device holds of `total` parameters, of which `learning` learn.

    bfloat16 weights (2 bytes a parameter) and gradients (2 a learning one); float32 master weights and Adam's two
    moments (12 a learning one). ZeRO-1 splits the optimizer's over the devices, ZeRO-2 the gradients too, ZeRO-3 the
    weights too. Plain mixed precision keeps float32 weights and gradients instead of a master copy: the same 16 bytes
    a learning parameter, and 4 a frozen one.
    """

    def share(size: int, split_from: int) -> int:
        return math.ceil(size / devices) if zero >= split_from else size

    return share(2 * total, 3), share(2 * learning, 2), share(12 * learning, 1)


def count_samples(names: list[str], corpus: Mapping[str, Any]) -> int:
    """Samples of a stage's sources by the corpus' config, without making or opening the corpus; own files are counted.

    Raises:
        ValueError: a source without a count.
    """
    from mvlm.data.corpus import is_own

    counts = dict(corpus.get("samples") or {})
    entries = (corpus.get("sources") or {}).items()
    counts |= {name: entry["samples"] for name, entry in entries if entry.get("samples") is not None}
    own = {name: _count(Path(name)) for name in names if is_own(name)}
    if unknown := [name for name in names if name not in counts | own]:
        raise ValueError(f"the corpus has no count for {', '.join(unknown)}; it has {', '.join(counts)}")
    return sum((counts | own)[name] for name in names)


def _count(annotations: Path) -> int:
    """Records of an annotation file, of which a few megabytes are in memory at a time."""
    from mvlm.data.index import read_records

    with annotations.open("rb") as file:
        return sum(1 for _ in read_records(file, annotations))


def plan(cfg: DictConfig, devices: int, text: int) -> Plan:
    """The whole cell of a config as `conf/plan.yaml` or `conf/train.yaml` composes it; a stage without data is left out.

    Args:
        text: tokens of text a sample.

    Raises:
        ValueError: no stage has data, or a source has no count.
    """
    from omegaconf import OmegaConf

    from mvlm.strategy.parameters import freeze_and_group

    plain, stages = meta_model(cfg.model.module), {}
    parameters, positions = count_parts(plain), plain.image_tokens + text
    corpus = OmegaConf.to_container(cfg.corpus, resolve=False)
    for name, stage in cfg.strategy.items():
        samples, recipe = count_samples(list(cfg.data[name]), corpus), cfg.recipe[name]
        if not samples:
            continue
        model = meta_model(cfg.model.module, OmegaConf.to_container(stage.lora)) if "lora" in stage else plain
        freeze_and_group(model, OmegaConf.to_container(stage.rates, resolve=True))
        learning = count_parts(model, learning=True)
        seen = samples * recipe.epochs
        stages[name] = StagePlan(
            samples=seen,
            steps=math.ceil(samples / recipe.batch) * recipe.epochs,
            batch=recipe.batch,
            micro_batch=min(recipe.micro_batch, max(1, recipe.batch // devices)),
            parameters=sum(count_parts(model).values()),
            learning=learning,
            work=work(model, text),
            activations=activations(model.language.config, positions, text, "language" in learning),
        )
    if not stages:
        raise ValueError("both stages are empty: data.pretrain and data.finetune name no source")
    tower, layers = plain.vision.tower.blocks, plain.language.model.layers
    lower, upper = len(tower) // 2, len(tower) - 1 - len(tower) // 2  # the last block is idle
    blocks = {"vision.lower": lower, "vision.upper": upper, "projector": 0, "language": len(layers)}
    inside = {"vision.lower": tower[:lower], "vision.upper": tower[lower:-1], "language": layers}
    outside = {
        part: parameters.get(part, 0) - sum(p.numel() for block in inside.get(part, ()) for p in block.parameters())
        for part in blocks
    }
    return Plan(parameters, plain.image_tokens, positions, blocks, outside, stages)


def hours(flops: int, devices: int, peak: float, mfu: float) -> float:
    """Time of that many FLOPs on devices of `peak` TFLOP/s each, of which the share `mfu` is reached."""
    return flops / (devices * peak * 1e12 * mfu) / 3600


def new_table(title: str, *columns: str) -> Table:
    """A table as this command prints them: names to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, min_width=79
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _unit(size: int) -> tuple[str, int]:
    return ("GiB", 2**30) if size >= 2**28 else ("MiB", 2**20)


def _parameters_table(made: Plan, cell: str) -> Table:
    table = new_table(f"Parameters of {cell}", "part", "in all", *(f"learn in {name}" for name in made.stages))
    for part, count in made.parameters.items():
        learning = (stage.learning.get(part, 0) for stage in made.stages.values())
        name = f"{part} (idle)" if part.endswith("unused") else part
        table.add_row(name, f"{count:,}", *(f"{n:,}" if n else "-" for n in learning))
    sums = [sum(made.parameters.values()), *(sum(stage.learning.values()) for stage in made.stages.values())]
    table.add_row("total", *(f"{n:,}" for n in sums), style="bold")
    return table


def _work_table(made: Plan) -> Table:
    text = made.positions - made.image_tokens
    title = f"GFLOPs a sample: {made.image_tokens} tokens of the picture + {text} of text (assumed)"
    table = new_table(title, "stage", "vision", "projector", "language", "backward", "total")
    for name, stage in made.stages.items():
        w = stage.work
        numbers = (w.vision, w.projector, w.language, w.backward, w.total)
        table.add_row(name, *(f"{n / 1e9:,.{1 if w.total > 1e11 else 3}f}" for n in numbers))
    return table


def _memory_table(made: Plan, devices: int, memory: float | None) -> Table:
    counts = sorted({1, 2, 4, 8, devices})
    unit, size = _unit(sum(states(sum(made.parameters.values()), 0, 1, 0)))
    title = f"{unit} of parameters a device, by number of devices; with {devices}, what they are"
    table = new_table(title, "stage", "ZeRO", *map(str, counts), "weights", "grads", "optimizer")
    for name, stage in made.stages.items():
        for zero in range(4):
            held = {n: states(stage.parameters, sum(stage.learning.values()), n, zero) for n in counts}
            sums = (sum(held[n]) for n in counts)
            cells = [f"[red]{b / size:,.2f}[/]" if memory and b > memory * 1e9 else f"{b / size:,.2f}" for b in sums]
            table.add_row(name if zero == 0 else "", str(zero), *cells, *(f"{b / size:,.2f}" for b in held[devices]))
    return table


def _activations_table(made: Plan) -> Table:
    unit, size = _unit(max(stage.micro_batch * stage.activations.kept for stage in made.stages.values()))
    title = f"{unit} of activations a device on top (estimate)"
    table = new_table(title, "stage", "micro-batch", "all kept", "checkpointed", "logits")
    for name, stage in made.stages.items():
        a, n = stage.activations, stage.micro_batch
        table.add_row(name, str(n), *(f"{n * b / size:,.2f}" for b in (a.kept, a.checkpointed, a.logits)))
    return table


def _time_table(made: Plan, cell: str, devices: int, gpu: str, peak: float, mfu: float) -> Table:
    published = PAPER if cell == PAPER_CELL else {}
    title = f"Time on {devices} x {gpu} at {mfu:.0%} of {peak:,g} TFLOP/s"
    title += "; the paper's own on 8 x a100" if published else ""
    paper = ("its steps", "hours", "of peak") if published else ()
    table = new_table(title, "stage", "samples", "steps", "FLOPs", "hours", *paper)
    for name, stage in made.stages.items():
        ours = hours(stage.flops, devices, peak, mfu)
        row = [f"{stage.samples:,}", f"{stage.steps:,}", f"{stage.flops:.2e}", f"{ours:,.3g}"]
        if published:
            steps, theirs = published[name]
            row += [f"{steps:,}", f"{theirs:g}", f"{hours(stage.flops, 8, GPUS['a100'][0], 1) / theirs:.1%}"]
        table.add_row(name, *row)
    total = sum(stage.flops for stage in made.stages.values())
    table.add_row("total", "", "", f"{total:.2e}", f"{hours(total, devices, peak, mfu):,.3g}", style="bold")
    return table


def main(cfg: DictConfig) -> None:
    """Print the plan of a cell, on some devices or over numbers of devices, or of every model and strategy."""
    from rich.console import Console

    from mvlm.scale import Cluster

    on = Cluster.named(cfg.gpu, cfg.peak, cfg.mfu, cfg.cluster, linked=bool(cfg.scale))
    if cfg.scale not in (None, False, True, "all"):
        raise ValueError(f"scale={cfg.scale}: true for this cell, all for every model and strategy, or null")
    console = Console(highlight=False)
    if cfg.scale:
        console.width = max(console.width, 100)  # a pipe's is 80
        _scale(cfg, on, console)
        return
    made = plan(cfg, cfg.devices, cfg.text)
    console.print(
        _parameters_table(made, cfg.cell),
        _work_table(made),
        _memory_table(made, cfg.devices, on.memory),
        _activations_table(made),
        _time_table(made, cfg.cell, cfg.devices, on.name, on.peak, cfg.mfu),
        "Every sample is taken to have a picture. FLOPs are of matrix products and convolutions, attention whole; "
        "loading and scoring are not counted.",
        "Memory: bfloat16 weights and gradients, float32 master weights and two moments of what learns"
        + (f"; red alone exceeds a device's {on.memory:g} GB." if on.memory else "."),
        sep="\n",
    )
    if cfg.json:
        _write(cfg.json, {cfg.cell: asdict(made)})


def _scale(cfg: DictConfig, on: Cluster, console: Console) -> None:
    """`scale=true` and `scale=all`: see `mvlm.scale`."""
    from rich.progress import track

    from mvlm import scale

    devices = sorted({*scale.DEVICES, cfg.devices})
    cells = {(cfg.cell,): cfg} if cfg.scale is True else every_cell()
    waiting = cells.items() if len(cells) == 1 else track(cells.items(), "planning", console=console, transient=True)
    found, longest = {}, {}
    for cell, one in waiting:
        longest[cell] = cfg.longest or one.recipe.max_length
        made = plan(one, 1, cfg.text)
        found[cell] = scale.scaled(made, on, longest[cell], cfg.checkpointing, devices)
    if cfg.scale is True:
        (stages,) = found.values()
        for name, stage in stages.items():
            console.print(
                scale.memory_table(name, stage, on, made.positions, longest[cell]),
                scale.time_table(name, stage),
                sep="\n",
            )
        console.print(scale.hours_table(stages), *scale.notes(stages, on, cfg.checkpointing), sep="\n")
    else:
        console.print(scale.every_table(found), *scale.notes({}, on, cfg.checkpointing), sep="\n")
    if cfg.json:
        told = {"assumed": asdict(on) | {"text": cfg.text, "checkpointing": cfg.checkpointing}}
        _write(
            cfg.json,
            told | {"-".join(cell): scale.plain(stages) | {"longest": longest[cell]} for cell, stages in found.items()},
        )


def every_cell() -> dict[tuple[str, str], DictConfig]:
    """This command's configuration with each model and strategy, by their names."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    said = [o for o in HydraConfig.get().overrides.task if o.split("=")[0] not in ("model", "strategy")]
    pairs = product(groups()["model"], groups()["strategy"])
    return {(m, s): compose("plan", [*said, f"model={m}", f"strategy={s}"]) for m, s in pairs}


def _write(path: str, told: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    script(main, "plan")
