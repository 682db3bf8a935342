"""A cell on 1 to 512 GPUs, on paper: memory, bytes sent, seconds a step, hours and efficiency, by four formulas.

    memory   = weights + gradients + optimizer (`held`) + micro-batch * (activations + logits)
    compute  = batch / devices * FLOPs a sample / (peak * mfu)
    comm     = bytes sent / bus + rounds * (hops inside nodes * 3.4 us + hops between nodes * 9.6 us)   (`traffic`, `Cluster.seconds`)
    step     = compute + update + comm - min(what may hide of comm, overlap * the computing beside it)

The global batch is the recipe's on any number of devices. Of W parameters L learn, R are run, the backward passes through B of these, and O of
those B lie in no layer (embeddings, head, projector); n devices, each with a micro-batches a step. Bytes, by what `trainer` may be:

    engine   weights          gradients   optimizer   sent by a device in a step
    ddp      4 W + 2 B        4 L         8 L         2 (n-1)/n * 4 L
    zero2    2 W              2 L / n     12 L / n    (n-1)/n * (a * 2 L + 2 L)
    fsdp     4 W / n + 2 O    4 L / n     8 L / n     (n-1)/n * a * (2 (R + B - O) + 4 L)
    zero3    2 W / n          2 L / n     12 L / n    (n-1)/n * a * (2 (R + B) + 2 L)

ddp runs under autocast: float32 weights, of which the backward needs bfloat16 copies, and float32 gradients, which lie in the buckets that are
summed (`gradient_as_bucket_view`). fsdp is torch's `fully_shard` of every layer and block: float32 pieces, gathered in bfloat16, gradients summed
in float32; what lies in no layer stays gathered for the whole step. zero2 and zero3 are DeepSpeed's, in bfloat16. Frozen weights have no
gradients, but are gathered like all others: for the backward, too, if it passes through them; never if idle.

Left out: trees, which spare a small all-reduce hops; buffers of DeepSpeed and two gathered layers; activations of tower and projector; the
allocator's waste; reading data; stragglers. `mfu` is one device's own, an assumption, and taken to be the same for all micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mvlm.plan import GPUS, Plan, StagePlan, new_table, states

if TYPE_CHECKING:
    from rich.table import Table

DEVICES = tuple(2**k for k in range(10))

ENGINES = ("ddp", "zero2", "fsdp", "zero3")

LINKS: dict[str, tuple[float, float, float]] = {
    "a100": (300, 25, 2039),
    "h100": (450, 50, 3350),
    "h200": (450, 50, 4800),
}
"""GB/s of NVLink in one direction, of a device's own share of the network in one direction, and of its memory: NVIDIA's data sheets of the
SXM boards (NVLink 600 and 900 GB/s both ways) and of DGX A100, H100 and H200 (a 200 or 400 Gb/s adapter a GPU)."""

NVLINK_HOP, NETWORK_HOP = 3.4e-6, 9.6e-6
"""Seconds a hop of a ring takes before any byte counts, as NCCL's own model has it (src/graph/tuning.cc, protocol Simple)."""

DDP_BUCKET, ZERO_BUCKET = 25 * 2**20, 2 * 50_000_000
"""Bytes that are summed at once: torch's `bucket_cap_mb`; DeepSpeed's `reduce_bucket_size`, 50 million numbers of two bytes."""

UPDATE = 28
"""Bytes that AdamW reads and writes for a learning parameter: weight, gradient and two moments, three of them back."""


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind. GB are 1e9 bytes."""

    name: str
    peak: float
    """Dense bfloat16 TFLOP/s."""
    memory: float | None
    """GB; None: any amount fits."""
    nvlink: float
    network: float
    """GB/s of a device in one direction, inside a node and out of it."""
    hbm: float
    """GB/s of its memory."""
    mfu: float
    """Share of the peak that one device reaches."""
    node: int
    """Devices of a node."""
    fill: float
    """Share of the memory that a plan may fill; the rest is for what it leaves out."""
    reached: float
    """Share of a link's rate that collectives reach."""
    overlap: float
    """Share of the computing that can hide communication beside it."""

    @classmethod
    def named(cls, gpu: str, peak: float | None, mfu: float, given: Mapping[str, Any], linked: bool) -> Cluster:
        """The gpu of that name, or one of another `peak`.

        Args:
            given: node, fill, reached, overlap; and nvlink, network, hbm, which are the gpu's own where None.
            linked: whether links are needed at all.

        Raises:
            ValueError: an unknown gpu; a link that is needed and not known.
        """
        if peak is None and gpu not in GPUS:
            raise ValueError(f"gpu={gpu}: known are {', '.join(GPUS)}; for another device give peak=<its TFLOP/s>")
        links = dict(zip(("nvlink", "network", "hbm"), LINKS[gpu] if peak is None else (None,) * 3, strict=True))
        links = {key: rate if given[key] is None else given[key] for key, rate in links.items()}
        if linked and (missing := [f"cluster.{key}=<GB/s>" for key, rate in links.items() if rate is None]):
            raise ValueError(f"peak={peak:g} is of a device whose links are not known: also give {', '.join(missing)}")
        name, (peak, memory) = (gpu, GPUS[gpu]) if peak is None else ("device", (peak, None))
        return cls(
            name, peak, memory, **links, mfu=mfu, **{k: given[k] for k in ("node", "fill", "reached", "overlap")}
        )

    def bus(self, devices: int) -> float:
        """Bytes a second that each device sends in a ring. NCCL lays a ring through each of a node's adapters, and each takes its part of
        the bytes: so a node's whole network carries what one NVLink carries, and the narrower of both sets the pace."""
        narrow = self.nvlink if devices <= self.node else min(self.nvlink, self.node * self.network)
        return self.reached * narrow * 1e9

    def seconds(self, sent: float, rings: float, devices: int) -> float:
        """Time to send so many bytes in so many rounds of a ring (an all-reduce makes two, the others one)."""
        if devices == 1:
            return 0.0
        nodes = math.ceil(devices / self.node)
        return sent / self.bus(devices) + rings * ((devices - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP)


@dataclass(frozen=True)
class Parts:
    """What an engine moves of a stage, in parameters."""

    total: int
    learning: int
    run: int
    back: int
    """Of those that are run: passed by the backward."""
    outside: int
    """Of those: in no layer."""
    rounds: int
    """Of a ring, in which fsdp and zero3 gather and sum: a layer at a time, and once what lies outside."""

    @classmethod
    def of(cls, made: Plan, stage: StagePlan) -> Parts:
        """From a plan. The backward passes through the first part that learns, in the order of the forward, and all after it."""
        sizes = {part: made.parameters.get(part, 0) for part in made.blocks}
        sizes["language"] += stage.parameters - sum(made.parameters.values())  # adapters
        first = min(list(sizes).index(part) for part in stage.learning)
        back = list(sizes)[first:]
        blocks = [*made.blocks.values(), *(made.blocks[part] for part in [*back, *stage.learning])]
        return cls(
            total=stage.parameters,
            learning=sum(stage.learning.values()),
            run=sum(sizes.values()),
            back=sum(sizes[part] for part in back),
            outside=sum(made.outside[part] for part in back),
            rounds=2 + sum(blocks),
        )


@dataclass(frozen=True)
class Traffic:
    """Of a device in a step: bytes sent, which it receives, too, and rounds of a ring. `beside` may run beside the computing."""

    beside: float
    alone: float
    rings_beside: int
    rings_alone: int

    @property
    def sent(self) -> float:
        return self.beside + self.alone


def held(engine: str, parts: Parts, devices: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer on a device; see the table above."""
    if engine == "ddp":
        return 4 * parts.total + 2 * parts.back, 4 * parts.learning, 8 * parts.learning
    if engine == "fsdp":
        weights, gradients, optimizer = (
            math.ceil(b / devices) for b in (4 * parts.total, 4 * parts.learning, 8 * parts.learning)
        )
        return weights + 2 * parts.outside, gradients, optimizer
    return states(parts.total, parts.learning, devices, zero=int(engine[-1]))


def traffic(engine: str, parts: Parts, devices: int, accumulation: int) -> Traffic:
    """What a device sends in an optimizer step of `accumulation` micro-batches; see the table above.

    ddp sums gradients with the last micro-batch. zero2 hands them to their owners with each (a reduce-scatter) and gathers the new
    weights when the step is done. fsdp and zero3 gather the weights for each forward and each backward, and hand gradients over with each.
    """
    share, half = (devices - 1) / devices, 2 * parts.learning
    if engine == "ddp":
        return Traffic(2 * share * 2 * half, 0, 2 * math.ceil(2 * half / DDP_BUCKET), 0)
    if engine == "zero2":
        buckets = math.ceil(half / ZERO_BUCKET)
        return Traffic(share * accumulation * half, share * half, accumulation * buckets, buckets)
    gathered = 2 * (parts.run + parts.back - (parts.outside if engine == "fsdp" else 0))
    handed = 2 * half if engine == "fsdp" else half
    return Traffic(share * accumulation * (gathered + handed), 0, accumulation * parts.rounds, 0)


@dataclass(frozen=True)
class Row:
    """A stage on so many devices. Bytes are a device's, seconds a step's."""

    devices: int
    engine: str
    micro_batch: int
    accumulation: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of a micro-batch of the assumed text, logits included."""
    longest: int
    """All of these together when every dialogue of the micro-batch is as long as may be."""
    sent: int
    compute: float
    comm: float
    hidden: float
    step: float
    samples_per_second: float
    tokens_per_second: float
    hours: float
    gpu_hours: float
    efficiency: float
    """Samples a second against so many single devices, each as fast as `mfu` says."""
    fits: bool

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer


def impossible(name: str, batch: int, devices: int) -> str | None:
    """Why a global batch cannot be split over so many devices, and what to do; None if it can."""
    if devices > batch:
        return (
            f"{devices} devices: a batch of {batch} has no sample for {devices - batch} of them. Take at most {batch}, or "
            f"recipe.{name}.batch={devices}, another recipe than Table 3's, whose learning rates are for {batch}"
        )
    if batch % devices:
        near = [n for n in range(1, batch + 1) if batch % n == 0]
        below, above = max(n for n in near if n < devices), min(n for n in near if n > devices)
        return (
            f"{devices} devices: a batch of {batch} leaves {batch % devices} samples over. Take {below} or {above}, or "
            f"recipe.{name}.batch={batch // devices * devices}"
        )
    return None


def row(
    made: Plan,
    stage: StagePlan,
    cluster: Cluster,
    devices: int,
    engine: str,
    micro_batch: int,
    longest: int,
    checkpointing: bool,
) -> Row:
    """One engine and micro-batch on so many devices.

    Args:
        longest: tokens of text of the longest dialogue.
        checkpointing: keep each layer's input alone; what is computed again is, as usual, no part of mfu.
    """
    parts, accumulation = Parts.of(made, stage), stage.batch // (devices * micro_batch)
    a, cast = stage.activations, 0 if engine != "ddp" else stage.activations.cast
    kept = a.checkpointed if checkpointing else a.kept + cast
    text = made.positions - made.image_tokens
    stretched = kept * (made.image_tokens + longest) / made.positions + a.logits * longest / text
    sizes, moved = held(engine, parts, devices), traffic(engine, parts, devices, accumulation)

    compute = stage.batch / devices * stage.work.total / (cluster.peak * 1e12 * cluster.mfu)
    backward = compute * stage.work.backward / stage.work.total
    beside = {"ddp": backward / accumulation, "zero2": backward}.get(engine, compute)
    may_hide = cluster.seconds(moved.beside, moved.rings_beside, devices)
    hidden = min(may_hide, cluster.overlap * beside)
    comm = may_hide + cluster.seconds(moved.alone, moved.rings_alone, devices)
    # One device's update is in its mfu. Of several, each does all of it under ddp for fewer samples; else its part.
    whole = UPDATE * parts.learning / (cluster.hbm * 1e9)
    update = whole * (1 - 1 / devices) if engine == "ddp" else 0.0
    step = compute + update + comm - hidden

    rate, most = stage.batch / step, sum(sizes) + micro_batch * stretched
    return Row(
        devices, engine, micro_batch, accumulation, *sizes,
        activations=micro_batch * (kept + a.logits),
        longest=round(most),
        sent=round(moved.sent),
        compute=compute,
        comm=comm,
        hidden=hidden,
        step=step,
        samples_per_second=rate,
        tokens_per_second=rate * made.positions,
        hours=stage.samples / rate / 3600,
        gpu_hours=stage.samples / rate / 3600 * devices,
        efficiency=stage.batch * stage.work.total / (cluster.peak * 1e12 * cluster.mfu) / step / devices,
        fits=cluster.memory is None or most <= cluster.fill * cluster.memory * 1e9,
    )  # fmt: skip


def best(made: Plan, stage: StagePlan, cluster: Cluster, devices: int, longest: int, checkpointing: bool) -> Row:
    """The engine and micro-batch, up to the recipe's, to train with: of all that fit and are within 5 % of the quickest, the largest micro-batch,
    for mfu will hold for it best, and with that the engine that sends least, as how much of that hides is an assumption.

    If none fits, zero3 one sample at a time, which needs the least.
    """
    each = stage.batch // devices
    tried = [
        row(made, stage, cluster, devices, engine, micro_batch, longest, checkpointing)
        for micro_batch in range(min(stage.micro_batch, each), 0, -1)
        if each % micro_batch == 0
        for engine in ENGINES
    ]
    fit = [one for one in tried if one.fits]
    quick = [one for one in fit if one.step <= 1.05 * min(other.step for other in fit)]
    return min(quick, key=lambda one: (-one.micro_batch, one.sent)) if fit else tried[-1]


@dataclass(frozen=True)
class Scaled:
    """A stage over numbers of devices."""

    rows: dict[int, Row]
    impossible: dict[int, str]
    """Devices that the batch cannot be split over, and what to do."""


def scaled(
    made: Plan, cluster: Cluster, longest: int, checkpointing: bool, devices: Sequence[int] = DEVICES
) -> dict[str, Scaled]:
    """Every stage of a cell that was planned for one device, by name."""
    stages = {}
    for name, stage in made.stages.items():
        wrong = {n: told for n in devices if (told := impossible(name, stage.batch, n))}
        rows = {n: best(made, stage, cluster, n, longest, checkpointing) for n in devices if n not in wrong}
        stages[name] = Scaled(rows, wrong)
    return stages


def plain(stages: dict[str, Scaled]) -> dict[str, Any]:
    """For JSON: a stage's rows and what is impossible."""
    return {
        name: {"rows": [asdict(one) for one in stage.rows.values()], "impossible": stage.impossible}
        for name, stage in stages.items()
    }


# ------------------------------------------------------------------------------------------------------- what is shown


def memory_table(name: str, stage: Scaled, cluster: Cluster, positions: int, longest: int) -> Table:
    """A row a number of devices."""
    limit = f", of {cluster.memory:g}" if cluster.memory else ""
    title = f"{name}: GB a device{limit}, at {positions} positions a sample; `longest`: {longest:,} of text"
    columns = ("devices", "engine", "batch", "weights", "grads", "optimizer", "activations", "sum", "longest")
    table = new_table(title, *columns)
    for n in sorted({*stage.rows, *stage.impossible}):
        if (one := stage.rows.get(n)) is None:
            table.add_row(f"{n}", "[red]impossible[/]")
            continue
        sizes = (one.weights, one.gradients, one.optimizer, one.activations, one.states + one.activations, one.longest)
        cells = [f"{size / 1e9:,.1f}" for size in sizes]
        if not one.fits:
            cells[-1] = f"[red]{cells[-1]}[/]"
        split = f"{one.micro_batch}" + (f" x {one.accumulation}" if one.accumulation > 1 else "")
        table.add_row(f"{n}", one.engine, split, *cells)
    return table


def time_table(name: str, stage: Scaled) -> Table:
    """A row a number of devices; those that do not fit are left out."""
    title = f"{name}: a step, in seconds"
    columns = (
        "devices",
        "engine",
        "GB sent",
        "compute",
        "comm",
        "hidden",
        "step",
        "samples/s",
        "tokens/s",
        "efficiency",
    )
    table = new_table(title, *columns)
    for n, one in stage.rows.items():
        if one.fits:
            seconds = (f"{t:.{3 if t < 1 else 2}f}" for t in (one.compute, one.comm, one.hidden, one.step))
            rates = (f"{one.samples_per_second:,.0f}", f"{one.tokens_per_second:,.0f}", f"{one.efficiency:.0%}")
            table.add_row(f"{n}", one.engine, f"{one.sent / 1e9:.1f}", *seconds, *rates)
    return table


def hours_table(stages: dict[str, Scaled]) -> Table:
    """Each stage's hours and the sum, where all stages can be run."""
    table = new_table("Hours", "devices", *stages, "together", "GPU-hours", "efficiency")
    for n in sorted({n for stage in stages.values() for n in (*stage.rows, *stage.impossible)}):
        rows = [stage.rows.get(n) for stage in stages.values()]
        cells = [f"{one.hours:,.3g}" if one and one.fits else "-" for one in rows]
        table.add_row(f"{n}", *cells, *(together(rows) or ("-", "-", "-")))
    return table


def every_table(cells: dict[tuple[str, str], dict[str, Scaled]]) -> Table:
    """Hours of all stages together: a row a model and strategy, a column a number of devices on which any can be trained."""
    rows = {
        (*cell, n): told[0]
        for cell, stages in cells.items()
        for n in DEVICES
        if (told := together([stage.rows.get(n) for stage in stages.values()]))
    }
    columns = [n for n in DEVICES if any(n == number for *_, number in rows)]
    table = new_table(
        "Hours of all stages, by number of devices; - where it cannot be split or does not fit",
        "model",
        "strategy",
        *map(str, columns),
    )
    for cell in cells:
        table.add_row(*cell, *(rows.get((*cell, n), "-") for n in columns))
    return table


def together(rows: Sequence[Row | None]) -> tuple[str, str, str] | None:
    """Hours, GPU-hours and efficiency of all stages, where all can be run."""
    if not all(one and one.fits for one in rows):
        return None
    hours, gpu_hours = sum(one.hours for one in rows), sum(one.gpu_hours for one in rows)
    alone = sum(one.gpu_hours * one.efficiency for one in rows)  # what single devices would take
    return f"{hours:,.3g}", f"{gpu_hours:,.3g}", f"{alone / gpu_hours:.0%}"


def notes(stages: dict[str, Scaled], cluster: Cluster, checkpointing: bool) -> list[str]:
    """What the tables do not say themselves: what is impossible or does not fit, with the cure, and what was assumed."""
    wrong = []
    for name, stage in stages.items():
        told = dict(sorted(stage.impossible.items()))
        too_many = [n for n in told if n > max(stage.rows, default=0)][:-1]  # the largest says it for all
        wrong += [f"{name}, {reason}." for n, reason in told.items() if n not in too_many]
        if big := [one for one in stage.rows.values() if not one.fits]:
            wrong.append(
                f"{name}, {' and '.join(str(one.devices) for one in big)} devices: even {big[0].engine} with a micro-batch of 1 needs "
                f"{big[0].longest / 1e9:,.1f} GB for the longest dialogue, and {cluster.fill:.0%} of {cluster.memory:g} may be filled. Take more "
                f"devices{'' if checkpointing else ', checkpointing=true'}, a shorter `longest`, or a gpu with more memory."
            )
    return [
        *wrong,
        f"Nothing of this was measured on GPUs. Assumed: {cluster.name} reaches {cluster.mfu:.0%} of {cluster.peak:g} "
        f"TFLOP/s on any micro-batch (mfu={cluster.mfu:g}); links of {cluster.nvlink:g} GB/s inside a node of "
        f"{cluster.node} and {cluster.network:g} GB/s a device between nodes, {cluster.reached:.0%} of which is reached; "
        f"communication hides behind at most {cluster.overlap:.0%} of the computing beside it.",
        "`batch` is the micro-batch x how many of them a device adds up; it and the engine are chosen so that the longest "
        "dialogues fit and a step is quick. Formulas: mvlm/scale.py.",
    ]
