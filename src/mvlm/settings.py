"""What a setting may be, where no part that takes it would refuse another at once: a word that is misspelt would count as its default, and
a number out of its range would train something else. Looked at before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what is."""


def _number(low: float, high: float = inf, open_below: bool = False) -> Callable[[Any], bool]:
    """A number from `low`, or above it, and below `high`."""

    def right(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (low < value if open_below else low <= value) and value < high

    return right


def _count(least: int) -> Rule:
    return lambda value: isinstance(value, int) and _number(least)(value), f"a whole number from {least}"


def _one_of(*words: str | bool) -> Rule:
    return lambda value: isinstance(value, type(words[0])) and value in words, ", ".join(str(w).lower() for w in words)


def _or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


POLICY = _one_of("stop", "skip")
ORDER = _one_of("random", "grouped", "text_first")
SOURCES = (lambda value: isinstance(value, ListConfig), "a list: [coco,mine.json], or []")

RULES: dict[str, Rule] = {
    "seed": _count(0),
    "on_bad_sample": POLICY,
    "on_divergence": POLICY,
    "checkpoint_every": _or_null(_count(1)),
    "evaluate": _one_of(True, False),
    "controls": (
        lambda value: isinstance(value, ListConfig) and {*value} <= {"blind", "shuffled"},
        "a list of none, one or both of blind and shuffled",
    ),
    "batch_size": _count(1),
    "questions": _count(1),
    "rounds": _count(1),
    "steps": _count(1),
    "devices": _count(1),
    "text": _count(0),
    "mfu": (
        lambda value: _number(0, open_below=True)(value) and value <= 1,
        "a share of the peak, above 0 and up to 1",
    ),
    "peak": _or_null((_number(0, open_below=True), "TFLOP/s, a number above 0")),
    "max_new_tokens": _or_null(_count(1)),
    "recipe.pretrain.epochs": _count(1),
    "recipe.finetune.epochs": _count(1),
    "recipe.pretrain.order": ORDER,
    "recipe.finetune.order": ORDER,
    "recipe.optimizer.betas": (
        lambda value: isinstance(value, ListConfig) and len(value) == 2 and all(map(_number(0, 1), value)),
        "two numbers from 0, below 1",
    ),
    "recipe.optimizer.eps": (_number(0, open_below=True), "a number above 0"),
    "recipe.optimizer.weight_decay": (_number(0), "a number from 0"),
    "recipe.warmup": (_number(0, 1), "a share of the steps from 0, below 1"),
    "recipe.clip": _or_null((_number(0, open_below=True), "the largest norm of a gradient, a number above 0")),
    "recipe.max_length": _count(1),
    "recipe.start": _one_of("random", "words"),
    "follow_links": _one_of(True, False),
    "data.pretrain": SOURCES,
    "data.finetune": SOURCES,
    "recipe.cache_features": _one_of(True, False),
}


def check(cfg: DictConfig) -> None:
    """Look at the settings that a configuration has of these.

    Raises:
        ValueError: the first that is wrong, with what it may be; a start from words whose pictures are cut, as the truth of their cells is
            known of whole ones; or a folder of own pictures beside no file of one's own.
    """
    missing = object()
    for key, (right, known) in RULES.items():
        value = OmegaConf.select(cfg, key, default=missing)
        if value is not missing and not right(value):
            raise ValueError(f"{key}={value}: it may be {known}")
    if OmegaConf.select(cfg, "recipe.start") == "words" and OmegaConf.select(cfg, "data") is not None:
        first = next((stage for stage in ("pretrain", "finetune") if cfg.data[stage]), None)
        if first and cfg.recipe[first].pictures == "square":
            raise ValueError(
                f"recipe.start=words knows what each place of a whole picture shows, and recipe.{first}.pictures=square cuts them. Set "
                f"recipe.{first}.pictures=letterbox (or pad), or recipe.start=random"
            )
    if (images := OmegaConf.select(cfg, "data.images")) is not None:
        from mvlm.data.corpus import is_own  # with what reads them, which takes long to import

        if not any(map(is_own, [*cfg.data.pretrain, *cfg.data.finetune])):
            raise ValueError(
                f"data.images={images} is where the pictures of own files lie, and there are none: name them (data=custom "
                "data.finetune=[mine.json]), or leave it out; a corpus knows its own folders (corpus.root=...)"
            )
