"""A training step: ours under Lightning beside transformers' own LLaVA class under its Trainer, on the same samples. Ways alternate, each
round in a process of its own, as a user has it: what one way does to its process (ours keeps freed memory) is not lent to the other.

Both have the same tower and language model with random weights, the tower frozen, the same dialogues, precision, fused AdamW and
batches. The peer has LLaVA-1.5's projector and hands all of a picture's patches to the language model, as that class does;
ours has the projector that is asked for, so `projector=pw2` compares implementations and `projector=ldpv2` the paper's point too.

With `keep_features=true` ours encodes each picture once, before its first step, as the recipes of small models do
(`recipe.cache_features`); the time that takes is a part of its time, and the tower counts as useful once a picture.

Useful arithmetic is counted, not assumed: the products that one dialogue needs without padding, with a frozen tower's last block
left out, attention below its diagonal, logits and the last layer's feed-forward half at labelled positions alone, whatever a way really
computes. Its rate stands beside the rate of plain matrix products, measured in each of those processes before its round.
"""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import numpy as np
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from mvlm import build, plan
from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN, Batch
from mvlm.data.collate import collate
from mvlm.data.datamodule import StepData, worker_count
from mvlm.data.dataset import Sample
from mvlm.data.image import Pictures
from mvlm.model.mobilevlm import MobileVLM
from mvlm.strategy.features import encode_pictures
from mvlm.strategy.parameters import freeze_and_group
from mvlm.strategy.stage import Stage

WARM = 6
"""Steps of a round that are not counted: the first ones get their memory from the system, later ones have it."""

TEXT = (4.0, 0.6)
"""Words of a dialogue: e to a normal variable of this mean and deviation, 55 in the middle, 4 to 1,024 allowed."""


class Dialogues(Dataset[Sample]):
    """Made-up dialogues, each about a JPEG file of 640 x 480, the last half of its words learned."""

    def __init__(self, folder: Path, count: int, image_tokens: int, words: int, look: Pictures, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.texts = [
            [draw.randrange(3, words) for _ in range(min(1024, max(4, round(draw.lognormvariate(*TEXT)))))]
            for _ in range(count)
        ]
        self.image_tokens, self.look = image_tokens, look
        self.pictures: list[Path] = []
        self.features: dict[str, Tensor] | None = None
        for number in range(min(count, 16)):
            noise = np.random.default_rng(number).integers(0, 255, (15, 20, 3), np.uint8)
            self.pictures.append(folder / f"{number}.jpg")
            Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(self.pictures[-1], quality=90)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> list[int]:
        """Words; all have a picture."""
        return [len(text) for text in self.texts]

    @property
    def positions(self) -> list[int]:
        """Of each in the language model: a first id, a picture, words."""
        return [1 + self.image_tokens + words for words in self.lengths]

    def __getitem__(self, index: int) -> Sample:
        text = self.texts[index]
        asked, path = len(text) - len(text) // 2, self.pictures[index % len(self.pictures)]
        ids = [1, *[IMAGE_TOKEN] * self.image_tokens, *text]
        labels = [IGNORE_INDEX] * (1 + self.image_tokens + asked) + text[asked:]
        shown = {"features": self.features[str(path)]} if self.features else {"pixels": self.look(path)}
        return Sample(str(index), "made", ids, labels, **shown, picture=str(path))


@dataclass
class Clock:
    """Seconds of a training's steps, from the end of the one before; what of it was spent waiting for data."""

    steps: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    before: float = 0.0
    """Seconds of work before the first step that all steps share."""
    positions: int = 0
    """That the language model's first layer was given, padding among them."""

    def watch(self, decoder: torch.nn.Module) -> None:
        def count(layer: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            self.positions += given[0].shape[:2].numel()

        decoder.layers[0].register_forward_pre_hook(count)

    def begin(self) -> None:
        now = perf_counter()
        self.waited.append(now - self._ended if self.steps else 0.0)
        self._began = now

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = perf_counter()
        self.steps.append(now - self._began + self.waited[-1])
        self._ended = now


@dataclass
class OurClock(Clock, Callback):
    """Under Lightning."""

    def on_train_batch_start(self, *ignored: Any) -> None:
        self.begin()

    def on_train_batch_end(self, *ignored: Any) -> None:
        self.end()


@dataclass
class PeersClock(Clock, transformers.TrainerCallback):
    """Under transformers' Trainer."""

    def on_step_begin(self, *ignored: Any, **more: Any) -> None:
        self.begin()

    def on_step_end(self, *ignored: Any, **more: Any) -> None:
        self.end()


@dataclass(frozen=True)
class Round:
    """A way's training, once."""

    seconds: float
    waited: float
    peak_bytes: int
    """Largest resident set of the process; on a GPU what torch's allocator held."""
    rate: float
    """Of plain matrix products, FLOP/s."""
    padding: float
    """Share of the language model's positions."""


def ours(cfg: DictConfig, data: Dialogues, precision: str) -> Clock:
    """A stage as `mvlm.fit` runs it."""
    data.features = None
    device = build.device()
    with device:
        model = build.model(cfg)
    rates = OmegaConf.to_container(cfg.strategy.finetune.rates, resolve=True)
    before = perf_counter()
    if cfg.keep_features:
        freeze_and_group(model, rates)
        data.features = encode_pictures(
            model, map(str, data.pictures), data.look, autocast=build.autocast_type(precision)
        )
    before = perf_counter() - before
    loader = StepData(data, cfg.micro_batch, cfg.micro_batch, workers=cfg.workers, order=cfg.recipe.finetune.order)
    module, clock = Stage(model, rates, steps=loader.steps), OurClock(before=before)
    clock.watch(model.language.model)
    trainer = L.Trainer(
        accelerator="auto", devices=1, precision=precision, max_epochs=1, logger=False, callbacks=[clock],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return clock


def peer(cfg: DictConfig, data: Dialogues, precision: str) -> Clock:
    """transformers' LlavaForConditionalGeneration and Trainer."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

    shape = plan.meta_model(cfg.model.module)
    language, tower = shape.language.config, _tower_config(shape.vision)
    words = language.vocab_size
    config = LlavaConfig(
        vision_config=tower,
        text_config=type(language)(**language.to_dict() | {"vocab_size": words + 1, "_attn_implementation": None}),
        image_token_id=words,
        image_token_index=words,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with build.device():
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.requires_grad_(False)

    clock = PeersClock()
    clock.watch(llava.model.language_model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=cfg.micro_batch, num_train_epochs=1, bf16=precision.startswith("bf16"),
            use_cpu=build.device().type == "cpu", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_num_workers=cfg.workers, remove_unused_columns=False, optim="adamw_torch_fused", seed=0,
        )  # fmt: skip
        trainer = Trainer(
            llava,
            arguments,
            data_collator=partial(for_the_peer, placeholder=words),
            train_dataset=data,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock


def for_the_peer(samples: Sequence[Sample], placeholder: int) -> dict[str, Tensor]:
    """A batch as transformers' class takes it."""
    batch: Batch = collate(samples)
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN, placeholder)
    mask = batch.attention_mask.long()
    return {"input_ids": ids, "labels": batch.labels, "attention_mask": mask, "pixel_values": batch.pixels}


def _tower_config(vision: Any) -> Any:
    """transformers' tower of the same size: Dinov2 where blocks have a layer scale, else CLIP's."""
    tower, block = vision.tower, vision.tower.blocks[0]
    sizes = {
        "hidden_size": vision.width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": block.attn.num_heads,
        "image_size": vision.image_size,
        "patch_size": tower.patch_embed.patch_size[0],
    }
    if isinstance(block.ls1, torch.nn.Identity):
        return transformers.CLIPVisionConfig(**sizes, intermediate_size=block.mlp.fc1.out_features)
    return transformers.Dinov2Config(**sizes, mlp_ratio=block.mlp.fc1.out_features // vision.width)


# ------------------------------------------------------------------------------------------------ what is useful


def useful(cfg: DictConfig, texts: Sequence[Sequence[int]], encoded: float = 1.0) -> list[int]:
    """FLOPs that each dialogue needs, two for a multiply-add, by torch's own counter on tensors without values; attention only up to
    each position's own.

    Args:
        encoded: pictures a dialogue that go through the tower.
    """
    net = plan.meta_model(cfg.model.module)
    freeze_and_group(net, OmegaConf.to_container(cfg.strategy.finetune.rates, resolve=True))
    with torch.device("meta"), FlopCounterMode(display=False) as tower:
        net.encode(torch.empty(1, 3, net.image_size, net.image_size))
    return [needed(net, count) - round((1 - encoded) * tower.get_total_flops()) for count in map(len, texts)]


@cache
def needed(net: MobileVLM, words: int) -> int:
    """FLOPs of one dialogue, forward and backward: a first id, a picture and so many words, the last half of them learned."""
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=plan.corrected()) as counter:
        tokens = net.project(net.encode(torch.empty(1, 3, net.image_size, net.image_size)))
        text = net.language.get_input_embeddings()(torch.zeros(1, words + 1, dtype=torch.long))
        seen = torch.cat([text, tokens], 1)
        length = seen.shape[1]
        mask = torch.empty(1, 1, length, length, dtype=torch.bool)  # given, so that no value is looked at
        hidden = net.language.model(inputs_embeds=seen, attention_mask=mask, use_cache=False).last_hidden_state
        net.language.lm_head(hidden[:, : words // 2]).sum().backward()
    sizes = net.language.config
    head = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
    # Six products of length x length a head: two forward, four backward. Torch counts them whole.
    hidden_half = 6 * 2 * (length**2 - length * (length + 1) // 2) * sizes.num_attention_heads * head
    # Three products of the last layer at positions that nothing reads: forward, and two more backward.
    unread = 3 * 2 * 3 * (length - words // 2) * sizes.hidden_size * sizes.intermediate_size
    return counter.get_total_flops() - hidden_half * sizes.num_hidden_layers - unread


def matrix_rate(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of plain matrix products (2048^3; on a GPU 8192^3), the best of five spells."""
    device = build.device()
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        began, count = perf_counter(), 0
        while perf_counter() - began < seconds / 5:
            a @ b
            count += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        best = max(best, 2 * size**3 * count / (perf_counter() - began))
    return best


# ------------------------------------------------------------------------------------------------------- the run


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train both ways, `cfg.rounds` times in turn, each time a fresh model, and print rates and ratios.

    Returns:
        What was measured, in plain types: by way `samples_per_second`, `tokens_per_second` (without padding), `share` of the
        matrix rate that is useful arithmetic, `padding` share of the positions, `waited` share of the time, `peak_bytes`; and the `ratio`.
    """
    words = {"auto": build.precision("auto"), "bfloat16": "bf16-mixed", "float32": "32-true"}
    if cfg.precision not in words:
        raise ValueError(f"precision={cfg.precision}: target=train knows {', '.join(words)}")
    precision = words[cfg.precision]
    net = plan.meta_model(cfg.model.module)
    step_bytes = cfg.micro_batch * 3 * 4 * net.image_size**2
    cfg = OmegaConf.merge(cfg, {"workers": worker_count(cfg.workers, int(torch.cuda.is_available()), step_bytes)})
    texts, more = (
        (WARM + cfg.steps) * cfg.micro_batch,
        {"words": net.language.config.vocab_size, "look": build.pictures(cfg, "finetune")},
    )
    with tempfile.TemporaryDirectory() as folder:
        made = partial(Dialogues, Path(folder), texts, **more)
        ways: dict[str, tuple[Callable, Dialogues, list[int]]] = {}
        patches = copy.deepcopy(cfg)
        patches.model.module.projector = {"_target_": "mvlm.projector.pw2.PW2", "_partial_": True}
        for name, way, whole in (
            (f"ours, {type(net.projector).__name__}{', features kept' if cfg.keep_features else ''}", ours, cfg),
            ("transformers' Trainer and LLaVA", peer, patches),
        ):
            data = made(image_tokens=plan.meta_model(whole.model.module).image_tokens)
            kept = cfg.keep_features and way is ours
            ways[name] = way, data, useful(whole, data.texts, len(data.pictures) / len(data) if kept else 1.0)
        dtype = build.autocast_type(precision) or torch.float32
        rounds: dict[str, list[Round]] = {name: [] for name in ways}
        for number in range(cfg.rounds):
            for name in ways if number % 2 == 0 else reversed(ways):
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    task = (cfg, *ways[name][:2], precision, dtype, torch.get_num_threads())
                    rounds[name].append(alone.submit(_round, *task).result())
    rate = float(np.median([one.rate for some in rounds.values() for one in some]))
    measured = {
        "what": f"{cfg.steps * cfg.micro_batch} dialogues of {np.mean(data.lengths):.0f} words and a picture ({len(data.pictures)} different), "
        f"{cfg.micro_batch} a step, "
        f"{precision}, {build.device()}, model {OmegaConf.select(cfg, 'model.module.vision.name')}",
        "matrix_flops_per_second": rate,
        "threads": torch.get_num_threads(),
        "workers": cfg.workers,
        "ways": {
            name: _told(rounds[name], data, flops, rate, cfg.micro_batch) for name, (_, data, flops) in ways.items()
        },
    }
    mine, theirs = measured["ways"].values()
    measured["ratio"] = round(mine["samples_per_second"] / theirs["samples_per_second"], 2)
    _show(measured)
    return measured


def _round(cfg: DictConfig, way: Callable, data: Dialogues, precision: str, dtype: torch.dtype, threads: int) -> Round:
    cuda = torch.cuda.is_available()
    for noise in (".*does not have many workers.*", ".*tokenizer.*", ".*pin_memory.*"):
        warnings.filterwarnings("ignore", noise)
    torch.set_num_threads(threads)
    rate = matrix_rate(dtype)
    torch.manual_seed(0)
    clock = way(cfg, data, precision)
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_resident()
    timed = sum(clock.steps[WARM:]) + clock.before * (1 - WARM / len(clock.steps))
    return Round(timed, sum(clock.waited[WARM:]), peak, rate, 1 - sum(data.positions) / clock.positions)


def _peak_resident() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _told(
    rounds: Sequence[Round], data: Dialogues, flops: Sequence[int], rate: float, micro_batch: int
) -> dict[str, Any]:
    count = len(data) - WARM * micro_batch
    seconds = sorted(one.seconds for one in rounds)
    middle = seconds[len(seconds) // 2]
    share = count / len(data)
    return {
        "image_tokens": data.image_tokens,
        "seconds": [round(one.seconds, 2) for one in rounds],
        "samples_per_second": round(count / middle, 3),
        "tokens_per_second": round(sum(data.positions) * share / middle, 1),
        "flops_per_sample": sum(flops) / len(flops),
        "share": round(sum(flops) * share / middle / rate, 3),
        "padding": round(float(np.median([one.padding for one in rounds])), 4),
        "waited": round(float(np.median([one.waited / one.seconds for one in rounds])), 4),
        "peak_bytes": int(np.median([one.peak_bytes for one in rounds])),
    }


def _show(measured: dict[str, Any]) -> None:
    ways = measured["ways"].values()
    table = plan.new_table(measured["what"], "", *measured["ways"])
    for row, key, form in (
        ("image tokens", "image_tokens", "{}"),
        ("samples/s", "samples_per_second", "{:.2f}"),
        ("tokens/s, without padding", "tokens_per_second", "{:.0f}"),
        ("useful share of matrix rate", "share", "{:.1%}"),
        ("padding", "padding", "{:.1%}"),
        ("waited for data", "waited", "{:.1%}"),
        ("peak memory, GB", "peak_bytes", "{:.1f}"),
    ):
        table.add_row(row, *(form.format(way[key] / 1e9 if key == "peak_bytes" else way[key]) for way in ways))
    Console().print(table)
    told = f"matrix products: {measured['matrix_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    Console().print(f"{told}; ratio of samples/s: {measured['ratio']:.2f}", soft_wrap=True)
