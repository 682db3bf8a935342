"""Which engine trains a stage on several devices: named (`trainer=ddp`, `fsdp`, `zero2`, `zero3`), or picked by memory (`trainer=auto`).

plain   one device
ddp     every device holds everything
fsdp2   every device holds a piece of weights, gradients and optimizer (torch's `fully_shard`, by Lightning's ModelParallelStrategy)
zero2   DeepSpeed: a piece of the gradients and the optimizer
zero3   DeepSpeed: a piece of the weights, too
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mvlm import build
from mvlm.data.mixture import Mixture
from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import activations, states
from mvlm.strategy import lora
from mvlm.strategy.parameters import freeze_and_group

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel

MARGIN = 0.9
"""Share of a device's memory that a plan may fill. The rest is for what it leaves out: activations of tower and projector, layers that are
being put together, buffers of communication, the allocator's waste."""

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

    def states(self, devices: int, engine: str) -> int:
        """Bytes of weights, gradients and optimizer on a device: `mvlm.plan.states`, whose frozen weights have 2 bytes; ours have 4."""
        pieces = devices if engine == "fsdp2" else 1
        held = sum(states(self.parameters, self.learning, pieces, 3))
        return held + 2 * (self.parameters - self.learning) // pieces


def name(strategy: Any) -> str:
    """The engine that a trainer's `strategy` means: a word of ours or of Lightning's, or a DeepSpeedStrategy with its settings.

    Raises:
        ValueError: no such engine.
    """
    if isinstance(strategy, Mapping):
        zero = ((strategy.get("config") or {}).get("zero_optimization") or {}).get("stage", strategy.get("stage"))
        if zero in (2, 3) and "DeepSpeed" in str(strategy.get("_target_")):
            return f"zero{zero}"
    words = {"deepspeed_stage_2": "zero2", "deepspeed_stage_3": "zero3"}
    if strategy in ("auto", "ddp", "fsdp2", *words):
        return words.get(strategy, strategy)
    raise ValueError(
        f"trainer.strategy is auto, ddp or fsdp2, or as conf/trainer/zero2.yaml and zero3.yaml have it, not {strategy}"
    )


def chosen(cfg: DictConfig, stage: str, mixture: Mixture, world: int) -> tuple[str, str]:
    """The engine that trains a stage on `world` devices, and why, in a line.

    Raises:
        ValueError: it cannot be used here, or with `trainer=auto` the stage does not fit into the devices.
    """
    engine = name(OmegaConf.to_container(cfg.trainer, resolve=True)["strategy"])
    if engine.startswith("zero"):
        check_deepspeed()
    if engine != "auto":
        return engine, f"{stage}: {engine} on {world} devices, as trainer.strategy says"
    if world == 1 and not on_gpu(cfg.trainer.accelerator):  # its memory may swap, and nobody else wants it
        return "plain", f"{stage}: plain, on one processor"
    memory = device_memory(cfg.trainer.accelerator, world // cfg.trainer.num_nodes)
    return pick(stage, load(cfg, stage, mixture), world, memory)


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


def on_gpu(accelerator: str) -> bool:
    """Whether Lightning's accelerator is this machine's GPUs."""
    return torch.cuda.is_available() and accelerator != "cpu"


def device_memory(accelerator: str, here: int) -> int:
    """Bytes that each of `here` devices of this machine has: of the smallest GPU, or its share of the machine's."""
    if on_gpu(accelerator):
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here


def without_values(cfg: DictConfig, stage: str) -> tuple[MobileVLM, LoraModel | None]:
    """The model as a stage trains it, on torch's meta device, and its adapters if it has some."""
    with torch.device("meta"):
        model = build.model(cfg)
        settings = cfg.strategy[stage].get("lora")
        return model, lora.attach(model.language, **settings) if settings else None


def in_one_piece(cfg: DictConfig, stage: str, weights: Mapping[str, Tensor]) -> MobileVLM:
    """The model after a stage of an engine that cut it up, adapters merged; it takes over what `mvlm.strategy.sharding.whole` gave."""
    model, adapters = without_values(cfg, stage)
    model.load_state_dict(weights, assign=True)
    if adapters is not None:
        model.language = adapters.merge_and_unload()
    return model


def load(cfg: DictConfig, stage: str, mixture: Mixture) -> Load:
    """What a stage trains, from a model without values, and its longest micro-batch: of the dialogues with the most words, in tokens."""
    model, _ = without_values(cfg, stage)
    groups = freeze_and_group(model, OmegaConf.to_container(cfg.strategy[stage].rates, resolve=True))
    learning = sum(p.numel() for group in groups for p in group["params"])
    size = cfg.recipe[stage].micro_batch
    words = mixture.lengths
    longest = np.argsort(np.abs(words) + np.where(words > 0, model.image_tokens, 0))[-size:]
    encoded = [dataset.encode(dataset.record(place)) for dataset, place in map(mixture.find, longest.tolist())]
    positions = max(len(one.input_ids) for one in encoded)
    labelled = max(sum(label >= 0 for label in one.labels) for one in encoded)
    trained = any(group["name"] == "language" for group in groups)
    kept = activations(model.language.config, positions, labelled, trained)
    half = build.autocast_type(build.precision(cfg.trainer.precision)) is not None
    each = (kept.kept + kept.logits) * (1 if half else 2)  # the plan is for bfloat16
    return Load(sum(p.numel() for p in model.parameters()), learning, size, positions, size * each)


def pick(stage: str, load: Load, devices: int, memory: int) -> tuple[str, str]:
    """The simplest engine whose device holds all that it needs, and why.

    Args:
        memory: bytes of a device, of which the share MARGIN counts.

    Raises:
        ValueError: none does.
    """
    needs: dict[str, int] = {}
    for engine in ("plain",) if devices == 1 else ("ddp", "fsdp2"):
        needs[engine] = load.states(devices, engine) + load.activations
        if needs[engine] <= MARGIN * memory:
            told = f"{stage}: {engine}, {gigabytes(needs[engine])} of the {gigabytes(memory)} that a device has"
            return engine, told + (f", where ddp needs {gigabytes(needs['ddp'])}" if engine == "fsdp2" else "")
    told = "; ".join(
        f"{engine} needs {gigabytes(size)} a device, {gigabytes(size - load.activations)} for weights, gradients and optimizer"
        for engine, size in needs.items()
    )
    raise ValueError(
        f"{stage} does not fit into {devices} x {gigabytes(memory)}, of which {MARGIN:.0%} are counted: {told}, and "
        f"{gigabytes(load.activations)} for the activations of {load.micro_batch} samples of up to {load.positions} positions. Take a "
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
        return ModelParallelStrategy(devices, 1, save_distributed_checkpoint=False)
    return instantiate(said, _convert_="all") if isinstance(said, Mapping) else said
