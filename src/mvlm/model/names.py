"""The one table of names, read both ways: our tensors <-> the files of the released MobileVLM and MobileVLM V2.

model.embed_tokens.weight, model.layers.N.*,      the language model, as transformers names it
model.norm.weight, lm_head.weight
model.mm_projector.*                              the projector
model.vision_tower.vision_tower.vision_model.*    a CLIP tower, as transformers names it
model.vision_tower.vision_tower.*                 any other tower, as timm names it
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mvlm.model.mobilevlm import MobileVLM

PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower."
CLIP = "vision_model."

Table = Mapping[str, str | tuple[str, ...]]
"""Ours -> theirs, by module or by parameter. `#` is a block's number; several names share a tensor, cut on axis 0."""

CLIP_NAMES: Table = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",  # misspelt in the released files
    "blocks.#.norm1": "encoder.layers.#.layer_norm1",
    "blocks.#.attn.qkv": tuple(f"encoder.layers.#.self_attn.{x}_proj" for x in "qkv"),
    "blocks.#.attn.proj": "encoder.layers.#.self_attn.out_proj",
    "blocks.#.norm2": "encoder.layers.#.layer_norm2",
    "blocks.#.mlp.fc1": "encoder.layers.#.mlp.fc1",
    "blocks.#.mlp.fc2": "encoder.layers.#.mlp.fc2",
    "norm": "post_layernorm",
}
"""timm's ViT -> transformers' CLIP."""
CLIP_AXES = {"cls_token": 1, "pos_embed": 2}
"""Where timm has further axes of one in front: how many axes CLIP has."""

_LDPV1_BLOCK = {"dw": "0.0", "norm1": "0.1", "se.fc1": "1.fc1", "se.fc2": "1.fc2", "pw": "2.0", "norm2": "2.1"}
_LDPV2 = {"pw1": "mlp.mlp.0", "pw2": "mlp.mlp.2"}

PROJECTORS: dict[str, tuple[str, Table]] = {
    # released
    "mlp2x_gelu": ("mvlm.projector.pw2.PW2", {"pw1": "0", "pw2": "2"}),
    "ldpnet": (
        "mvlm.projector.ldpv1.LDPv1",
        {"pw1": "model.mlp.1", "pw2": "model.mlp.3"}
        | {f"block{n}.{a}": f"model.mb_block.{n}.block.{b}" for n in (1, 2) for a, b in _LDPV1_BLOCK.items()},
    ),
    "ldpnetv2": ("mvlm.projector.ldpv2.LDPv2", {**_LDPV2, "peg": "peg.peg.0"}),
    # ours: the reference has none of them and refuses these types, rather than build another projector
    "mvlm_avgpool": ("mvlm.projector.avgpool.AvgPool", _LDPV2),
    "mvlm_learnable_pe": ("mvlm.projector.learnable_pe.LearnablePE", {**_LDPV2, "position": "pe.pe"}),
}
"""`mm_projector_type` -> class and names. Any other projector is stored by its class path, its own names and the arguments it keeps."""

POOL = 2
"""What these types pool by. Another factor changes no tensor's shape, so it makes another type: `mvlm_ldpnetv2_pool1`.
(The reference would build its LDPv2 from anything that begins with `ldpnetv2`.)"""


@dataclass(frozen=True)
class Place:
    """Where one of our tensors stands in a file."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each of theirs."""

    def read(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Our tensor from theirs."""
        parts = [tensors[name] for name in self.theirs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(like.shape)

    def write(self, value: Tensor) -> dict[str, Tensor]:
        """Theirs from our tensor. Parts are copies: safetensors refuses tensors that share memory."""
        if len(self.theirs) == 1:
            return {self.theirs[0]: value.reshape(self.shape).contiguous()}
        return {name: part.clone() for name, part in zip(self.theirs, value.chunk(len(self.theirs)), strict=True)}

    def under(self, prefix: str, part: str = "") -> Place:
        """The same place in a larger file and a larger model."""
        return Place(part + self.ours, tuple(prefix + name for name in self.theirs), self.shape)


def _renamed(name: str, table: Table) -> tuple[str, ...] | None:
    """The other side of a parameter's name, by its own row or by its module's; None without a row."""
    block = re.search(r"\.(\d+)\.", name)
    key, number = (name.replace(block[0], ".#.", 1), block[1]) if block else (name, "")
    module, _, leaf = key.rpartition(".")
    row, ending = (table[key], "") if key in table else (table.get(module), f".{leaf}")
    if row is None:
        return None
    return tuple(one.replace("#", number) + ending for one in ((row,) if isinstance(row, str) else row))


def own_names(module: nn.Module) -> list[Place]:
    """Every tensor under its own name."""
    return [Place(name, (name,), tuple(value.shape)) for name, value in module.state_dict().items()]


def clip_names(tower: nn.Module) -> list[Place]:
    """A CLIP tower's places, without prefix; none for any other ViT, whose names are not just those of the table."""
    places = []
    for place in own_names(tower):
        theirs = _renamed(place.ours, CLIP_NAMES)
        if theirs is None or place.ours == "patch_embed.proj.bias":
            return []
        kept = CLIP_AXES.get(place.ours)
        shape = place.shape[-kept:] if kept else place.shape
        places.append(Place(place.ours, theirs, (shape[0] // len(theirs), *shape[1:])))
    return places if {"cls_token", "norm_pre.weight"} <= {place.ours for place in places} else []


def tower_names(tower: nn.Module) -> list[Place]:
    """A tower's places inside a checkpoint, below TOWER."""
    return [place.under(CLIP) for place in clip_names(tower)] or own_names(tower)


def projector_names(projector: nn.Module) -> list[Place]:
    """A projector's places inside a checkpoint."""
    _, table = PROJECTORS.get(_stem(projector), ("", None))
    places = []
    for place in own_names(projector):
        theirs = (place.ours,) if table is None else _renamed(place.ours, table)
        assert theirs, f"{type(projector).__name__} has a tensor {place.ours} that its row in PROJECTORS does not name"
        places.append(Place(place.ours, theirs, place.shape).under(PROJECTOR))
    return places


def language_names(language: nn.Module) -> list[Place]:
    """transformers' own names. A tied head is the embedding once more and is not stored."""
    tied = language.config.tie_word_embeddings
    return [place for place in own_names(language) if not (tied and place.ours == "lm_head.weight")]


def model_names(model: MobileVLM) -> list[Place]:
    """Every tensor of the model and its place in a checkpoint."""

    def part(name: str, places: Iterable[Place], prefix: str = "") -> list[Place]:
        return [place.under(prefix, name) for place in places]

    return [
        *part("language.", language_names(model.language)),
        *part("projector.", projector_names(model.projector)),
        *part("vision.tower.", tower_names(model.vision.tower), TOWER),
    ]


def _path(projector: nn.Module) -> str:
    return f"{type(projector).__module__}.{type(projector).__qualname__}"


def _stem(projector: nn.Module) -> str:
    """The projector's key in the table; its class path if it has none."""
    return next((kind for kind, (path, _) in PROJECTORS.items() if path == _path(projector)), _path(projector))


def projector_type(projector: nn.Module) -> str:
    """What `mm_projector_type` says: `ldpnetv2`, `mvlm_avgpool`, `mvlm_ldpnetv2_pool1`, `mvlm.projector.mine.Mine`."""
    kind, pool = _stem(projector), getattr(projector, "pool", POOL)
    if kind not in PROJECTORS or pool == POOL:
        return kind
    return f"mvlm_{kind.removeprefix('mvlm_')}_pool{pool}"


def projector_arguments(projector: nn.Module) -> dict[str, Any]:
    """What a projector outside the table was built with, as far as it keeps that under the arguments' own names."""
    named = list(inspect.signature(type(projector)).parameters)[2:] if _stem(projector) not in PROJECTORS else []
    kept = {name: getattr(projector, name, None) for name in named}
    return {name: value for name, value in kept.items() if isinstance(value, bool | int | float | str)}


def projector_from(kind: str, grid: int, arguments: Mapping[str, Any]) -> Callable[[int, int], nn.Module]:
    """The reverse of `projector_type` and `projector_arguments`, for a tower of grid x grid patches.

    Raises:
        ValueError: a type from elsewhere. Only this package's projectors are imported by name.
    """
    stem, pool = kind, POOL
    if pooled := re.fullmatch(r"mvlm_(\w+)_pool(\d+)", kind):
        stem, pool = pooled[1] if pooled[1] in PROJECTORS else f"mvlm_{pooled[1]}", int(pooled[2])
    path, _ = PROJECTORS.get(stem, (stem, {}))
    if not re.fullmatch(r"mvlm\.projector\.\w+\.\w+", path):
        raise ValueError(
            f"mm_projector_type {kind!r} is none of {', '.join(PROJECTORS)}: "
            "build the model from its own configuration and load the weights into it"
        )
    module, _, name = path.rpartition(".")
    try:
        made = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"mm_projector_type {kind!r} names a projector that is not in this package: {error}"
        ) from error
    known = {"grid": grid, **({"pool": pool} if stem in PROJECTORS else arguments)}
    takes = inspect.signature(made).parameters
    return partial(made, **{key: value for key, value in known.items() if key in takes})
