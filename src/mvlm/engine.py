"""Which engine trains a stage on several devices: named (`trainer=ddp`, `fsdp`, `zero2`, `zero3`), or picked by memory (`trainer=auto`).

plain   one device
ddp     every device holds everything
fsdp2   every device holds a piece of weights, gradients and optimizer (torch's `fully_shard`, by Lightning's ModelParallelStrategy)
zero2   DeepSpeed: a piece of the gradients and the optimizer
zero3   DeepSpeed: a piece of the weights, too
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mvlm import build
from mvlm.data.mixture import Mixture
from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import activations, count_parts, meta_model, physical_memory, states
from mvlm.strategy import lora
from mvlm.strategy.parameters import freeze_and_group
from mvlm.strategy.sharding import FSDP2, ZeRO

MARGIN = 0.9
"""Share of a device's memory that a plan may fill. The rest is for what it leaves out: activations of tower and projector, layers that are
being put together, buffers of communication, the allocator's waste."""

FORWARD = ("vision.lower", "vision.upper", "projector", "language")
"""A model's parts in the order that they are run."""

SHARDED = ("fsdp2", "zero3")
"""Engines under which no device has all the weights."""


@dataclass(frozen=True)
class Load:
    """What trains in a stage, and on how much at a time."""

    parameters: int
    learning: int
    micro_batch: int
    positions: int
    """Of the longest sample."""
    activations: int
    """Bytes of a micro-batch of the longest samples."""
    checkpointed: int
    """The same where layers are computed again in the backward."""
    cast: int = 0
    """Bytes that autocast over whole float32 weights keeps beside `activations`; in pieces the weights are bfloat16 themselves."""
    copies: int = 0
    """Bytes of the bfloat16 copies of weights that a backward under autocast passes through."""

    def states(self, devices: int, engine: str) -> int:
        """Bytes of weights, gradients and optimizer on a device: `mvlm.plan.states`, whose frozen weights have 2 bytes; ours have 4."""
        pieces = devices if engine == "fsdp2" else 1
        held = sum(states(self.parameters, self.learning, pieces, 3))
        return held + 2 * (self.parameters - self.learning) // pieces

    def needs(self, devices: int, engine: str, again: bool) -> int:
        """All that a device must hold, layers computed again in the backward or not."""
        whole = engine != "fsdp2"
        kept = self.checkpointed if again else self.activations + whole * self.cast
        return self.states(devices, engine) + kept + whole * self.copies


def name(strategy: Any) -> str:
    """The engine that a trainer's `strategy` means: a word of ours or of Lightning's, or DeepSpeed's settings.

    Raises:
        ValueError: no such engine.
    """
    if isinstance(strategy, Mapping):
        zero = ((strategy.get("config") or {}).get("zero_optimization") or {}).get("stage", strategy.get("stage"))
        if zero in (2, 3) and "DeepSpeed" in strategy.get("_target_", "DeepSpeed"):
            return f"zero{zero}"
    words = {"deepspeed_stage_2": "zero2", "deepspeed_stage_3": "zero3"}
    if strategy in ("auto", "ddp", "fsdp2", *words):
        return words.get(strategy, strategy)
    raise ValueError(
        f"trainer.strategy is auto, ddp or fsdp2, or as conf/trainer/zero2.yaml and zero3.yaml have it, not {strategy}"
    )


def chosen(cfg: DictConfig, stage: str, mixture: Mixture, world: int) -> tuple[str, str, bool]:
    """The engine that trains a stage on `world` devices; why, in a line; and whether the language model's layers keep nothing but their
    input and are computed again in the backward (`checkpointing`: true, false, or auto, only when memory asks).

    Raises:
        ValueError: it cannot be used here, or with `trainer=auto` the stage does not fit into the devices.
    """
    engine = name(OmegaConf.to_container(cfg.trainer, resolve=True)["strategy"])
    if engine.startswith("zero"):
        check_deepspeed()
    if cfg.checkpointing not in (True, False, "auto"):
        raise ValueError(f"checkpointing is true, false or auto, not {cfg.checkpointing!r}")
    told = f"{stage}: {engine} on {world} devices, as trainer.strategy says"
    again = (False, True) if cfg.checkpointing == "auto" else (cfg.checkpointing,)
    gpu = build.on_gpu(cfg.trainer.accelerator)
    if engine == "auto" and world == 1 and not gpu:  # its memory may swap, and nobody else wants it
        return "plain", f"{stage}: plain, on one processor", again[0]
    if engine != "auto" and not gpu:
        return engine, told, again[0]
    memory, needs = device_memory(cfg.trainer.accelerator, world // cfg.trainer.num_nodes), load(cfg, stage, mixture)
    if engine != "auto":
        fits = needs.needs(world, "fsdp2" if engine in SHARDED else "ddp", False) <= MARGIN * memory
        return engine, told, again[0] if fits else again[-1]
    return pick(stage, needs, world, memory, again)


def check_deepspeed() -> None:
    """Raises ValueError where DeepSpeed cannot run."""
    if find_spec("deepspeed") is None:
        raise ValueError(
            "trainer=zero2 and zero3 need DeepSpeed: pip install -e '.[scale]'; trainer=fsdp shards without it"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "DeepSpeed in Lightning runs on NVIDIA GPUs alone, and there is none; trainer=fsdp shards on any device"
        )


def device_memory(accelerator: str, here: int) -> int:
    """Bytes that each of `here` devices of this machine has: of the smallest GPU, or its share of the machine's."""
    if build.on_gpu(accelerator):
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return physical_memory() // here


def in_one_piece(cfg: DictConfig, stage: str, weights: Mapping[str, Tensor]) -> MobileVLM:
    """The model after a stage of an engine that cut it up, adapters merged; it takes over what `mvlm.strategy.sharding.whole` gave."""
    model, settings = meta_model(cfg.model.module), cfg.strategy[stage].get("lora")
    with torch.device("meta"):
        adapters = lora.attach(model.language, **settings) if settings else None
    model.load_state_dict(weights, assign=True)
    if adapters is not None:
        model.language = adapters.merge_and_unload()
    return model


def load(cfg: DictConfig, stage: str, mixture: Mixture) -> Load:
    """What a stage trains, from a model without values, and its longest micro-batch: of the dialogues with the most words, in tokens."""
    model = meta_model(cfg.model.module, cfg.strategy[stage].get("lora"))
    groups = freeze_and_group(model, OmegaConf.to_container(cfg.strategy[stage].rates, resolve=True))
    learning = sum(p.numel() for group in groups for p in group["params"])
    size = cfg.recipe[stage].micro_batch
    words = mixture.lengths
    longest = np.argsort(np.abs(words) + np.where(words > 0, model.image_tokens, 0))[-size:]
    encoded = [dataset.encode(dataset.record(place)) for dataset, place in map(mixture.find, longest.tolist())]
    positions = max(len(one.input_ids) for one in encoded)
    labelled = max(sum(label >= 0 for label in one.labels) for one in encoded)
    learned, sizes = {group["name"] for group in groups}, count_parts(model)
    trained = "language" in learned
    kept = activations(model.language.config, positions, labelled, trained)
    half = build.autocast_type(build.precision(cfg.trainer.precision, cfg.trainer.accelerator)) is not None
    whole, again = (
        size * (one + kept.logits) * (1 if half else 2) for one in (kept.kept, kept.checkpointed)
    )  # the plan is for bfloat16
    # The backward passes through the first part that learns, in the order of the forward, and all after it.
    first = next((k for k, part in enumerate(FORWARD) if part in learned), len(FORWARD))
    copies = 2 * sum(sizes.get(part, 0) for part in FORWARD[first:]) if half else 0
    total = sum(p.numel() for p in model.parameters())
    return Load(total, learning, size, positions, whole, again, size * kept.cast if half else 0, copies)


def pick(
    stage: str, load: Load, devices: int, memory: int, checkpointing: Sequence[bool] = (False, True)
) -> tuple[str, str, bool]:
    """The simplest engine whose device holds all that it needs; why; and whether layers are computed again for it, which comes before
    weights in pieces.

    Args:
        memory: bytes of a device, of which the share MARGIN counts.
        checkpointing: what may be tried, in this order.

    Raises:
        ValueError: none does.
    """
    needs: dict[str, int] = {}
    for engine in ("plain",) if devices == 1 else ("ddp", "fsdp2"):
        for again in checkpointing:
            needs[engine] = load.needs(devices, engine, again)
            kept = needs[engine] - load.states(devices, engine)
            if needs[engine] <= MARGIN * memory:
                told = f"{stage}: {engine}, {gigabytes(needs[engine])} of the {gigabytes(memory)} that a device has"
                told += f", where ddp needs {gigabytes(needs['ddp'])}" if engine == "fsdp2" else ""
                told += (
                    f"; layers are computed again in the backward, else {gigabytes(load.needs(devices, engine, False) - needs[engine])} more"
                    if again
                    else ""
                )
                return engine, told, again
    told = "; ".join(
        f"{engine} needs {gigabytes(size)} a device, {gigabytes(size - kept)} for weights, gradients and optimizer"
        for engine, size in needs.items()
    )
    raise ValueError(
        f"{stage} does not fit into {devices} x {gigabytes(memory)}, of which {MARGIN:.0%} are counted: {told}, and "
        f"{gigabytes(kept)} for the activations of {load.micro_batch} samples of up to {load.positions} positions. Take a "
        f"smaller recipe.{stage}.micro_batch, more devices, or train less (strategy=lora, strategy=freeze_llm): what is frozen has neither "
        f"gradients nor optimizer. These are estimates; trainer={'ddp' if devices == 1 else 'fsdp'} tries all the same"
    )


def gigabytes(size: float) -> str:
    """1.7 GB"""
    return f"{size / 1e9:,.3g} GB"


def strategy(engine: str, said: Any, devices: int) -> Strategy | str:
    """What Lightning's trainer is given for an engine.

    Args:
        said: the trainer's `strategy` as the configuration has it.
    """
    if engine == "plain":
        return "auto"
    if engine == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)  # else each device holds all gradients twice
    if engine == "fsdp2":
        return FSDP2(devices, 1, save_distributed_checkpoint=False)
    settings = said if isinstance(said, Mapping) else {"stage": int(engine.removeprefix("zero"))}
    return ZeRO(**{key: value for key, value in settings.items() if key != "_target_"})
