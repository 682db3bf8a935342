"""From a configuration to its parts. Every script builds them here, so what was trained is what is evaluated, shown and exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mvlm.cli import instance
from mvlm.data.corpus import Corpus, sources_of
from mvlm.data.dataset import LlavaDataset
from mvlm.data.doctor import read_exclusions
from mvlm.data.image import Pictures
from mvlm.data.mixture import Mixture
from mvlm.data.prompt import Template, template
from mvlm.data.tokenizer import Tokenizer, load_tokenizer
from mvlm.model.checkpoint import load_checkpoint, load_language, load_vision
from mvlm.model.files import fetch
from mvlm.model.mobilevlm import MobileVLM
from mvlm.run import Run

STAGES = ("pretrain", "finetune")


def run_folder(folder: str | Path) -> Path:
    """The run folder that a stage's folder lies in; any other folder is itself."""
    folder = Path(folder)
    inside = folder.name in STAGES and (folder.parent / "config.yaml").exists()
    return folder.parent if inside else folder


def corpus(cfg: DictConfig) -> Corpus:
    """The files behind the sources' names; the pocket world is generated here on first use."""
    return instance(cfg.corpus)


def tokenizer(cfg: DictConfig) -> Tokenizer:
    """The language model's own tokenizer."""
    return load_tokenizer(tokenizer_folder(cfg))


def tokenizer_folder(cfg: DictConfig) -> Path:
    """Where its files are; fetched from the model hub if `model.tokenizer` is a name there."""
    said = cfg.model.tokenizer
    return Path(instance(said)) if isinstance(said, DictConfig) else fetch(said, weights=False)


def model(cfg: DictConfig) -> MobileVLM:
    """The model with fresh weights."""
    return instance(cfg.model.module)


def pretrained(net: MobileVLM, cfg: DictConfig) -> None:
    """Load what the model starts from: a tower and a language model, wherever the configuration says they are."""
    weights = instance(cfg.model.weights)
    if weights["vision"]:
        load_vision(net.vision, weights["vision"])
    if weights["language"]:
        load_language(net.language, weights["language"])


def trained(run: Run) -> MobileVLM:
    """The model as a run folder's last finished stage left it."""
    net = model(run.config)
    load_checkpoint(net, run.last_stage())
    return net


def pictures(cfg: DictConfig, stage: str) -> Pictures:
    """How a stage turns picture files into pixels."""
    look = cfg.model.pictures
    return Pictures(look.size, cfg.recipe[stage].pictures, tuple(look.mean), tuple(look.std))


def talk(cfg: DictConfig, stage: str = "finetune") -> Template:
    """How a stage turns dialogues into text."""
    return template(cfg.recipe[stage].template)


def asking(cfg: DictConfig, words: Tokenizer, model: Callable[[], MobileVLM]) -> dict[str, Any]:
    """What the benchmarks' answer loop must be told beside the model: questions are asked as the last stage trains.

    Args:
        model: called when the first prompt is made, so that stored answers are scored without one.
    """
    said, look = talk(cfg), pictures(cfg, "finetune")
    return {
        "encode_prompt": lambda text, seen: said.prompt(text, words, image_tokens=model().image_tokens, has_image=seen),
        "decode": words.decode,
        "pictures": look,
        "cropped": Pictures(look.size, "square", look.mean, look.std) if look.mode == "pad" else None,
        "stop_ids": said.stop_ids(words),
    }


def datasets(
    cfg: DictConfig, stage: str, files: Corpus, words: Tokenizer, image_tokens: int, on_bad_sample: str
) -> list[LlavaDataset]:
    """A stage's sources, checked record by record, without the records that `exclude` lists."""
    listed = cfg.get("exclude")
    return [
        LlavaDataset(
            source.annotations,
            source.images,
            talk(cfg, stage),
            words,
            pictures(cfg, stage),
            image_tokens=image_tokens,
            max_length=cfg.recipe.max_length,
            source=source.name,
            on_bad_sample=on_bad_sample,
            exclude=partial(read_exclusions, listed, stage, source.name) if listed else (),
            follow_links=cfg.get("follow_links", False),
        )
        for source in sources_of(files, list(cfg.data[stage]), cfg.data.get("images"))
    ]


def mixture(cfg: DictConfig, stage: str, files: Corpus, words: Tokenizer, image_tokens: int) -> Mixture | None:
    """A stage's samples; None if the stage has no data."""
    if not cfg.data[stage]:
        return None
    return Mixture(datasets(cfg, stage, files, words, image_tokens, cfg.on_bad_sample))


def device(wanted: str = "auto") -> torch.device:
    """Where a model answers: `auto` is the process' own GPU, or the processor where there is none.

    Raises:
        ValueError: there is no such device.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device={wanted}: auto, cpu or cuda is wanted") from None
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device={wanted}: this machine shows {count} GPUs; auto takes what there is")
    return found


def on_gpu(device: str = "auto") -> bool:
    """Whether a device, or Lightning's accelerator, is this machine's GPU: all but `cpu` are, where there is one."""
    return torch.cuda.is_available() and device != "cpu"


def precision(wanted: str = "auto", device: str = "auto") -> str:
    """Lightning's word for the precision: bfloat16 where the hardware multiplies it, else float32.

    A processor without bfloat16 instructions emulates them several times slower than float32.

    Args:
        device: `cpu`, or else this machine's GPU if it has one.
    """
    if wanted != "auto":
        return wanted
    if on_gpu(device):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if any(f in flags for f in ("avx512_bf16", "amx_bf16", " bf16")) else "32-true"


def autocast_type(word: str | int) -> torch.dtype | None:
    """The type that autocast computes in under Lightning's word for a precision; None without autocast.

    Raises:
        ValueError: no such word.
    """
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "32": None, "64": None}
    kind, _, how = str(word).partition("-")
    if kind not in kinds or how not in ("", "true", "mixed"):
        raise ValueError(f"precision={word}: it may be auto, 32-true, bf16-mixed or 16-mixed")
    return kinds[kind]
