"""Tower and projector as llama.cpp's `mmproj` file, and the checks without which it must be neither written nor opened.

llama.cpp runs a file that is slightly wrong without complaint, and ends the whole process over one that is very wrong.
What goes wrong silently, and where it is handled:

    class token             class_token.py
    one block too few       `metadata`: block_count and feature_layer both name the blocks that really run
    layer scale ignored     `_scaled`: folded into the layer before it
    final norm applied      `tower_tensors`: not stored, for the features are taken before it
    another GELU            `activation`
    pad before resize       `Pictures` of mode letterbox does as llama.cpp does; other modes are noted on the card
    fc1 and fc2 swapped     `check`: happens where the perceptron is as wide as the tower
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from mvlm.data.image import Pictures
from mvlm.export import container
from mvlm.export.class_token import positions
from mvlm.export.container import Opened, Stored, vector, weights
from mvlm.model.mobilevlm import MobileVLM
from mvlm.model.vision import Vision
from mvlm.projector.avgpool import AvgPool
from mvlm.projector.ldpv1 import LDPv1
from mvlm.projector.ldpv2 import LDPv2
from mvlm.projector.learnable_pe import LearnablePE
from mvlm.projector.pw2 import PW2

GRID = 24
"""Side of the patch grid that llama.cpp's ldp and ldpv2 have written into them. mlp takes any."""

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "gelu": (lambda x: functional.gelu(x, approximate="tanh"), {"clip.use_gelu": True}),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), {"clip.use_gelu": False}),
    "silu": (functional.silu, {"clip.use_gelu": False, "clip.use_silu": True}),
}
"""What llama.cpp's ViT can do between fc1 and fc2. Its GELU is the tanh one; the exact one is within 0.0005 of it."""

LINEARS = {
    "mlp": {"pw1": "mm.0", "pw2": "mm.2"},
    "ldpv2": {"pw1": "mm.model.mlp.0", "pw2": "mm.model.mlp.2"},
    "ldp": {"pw1": "mm.model.mlp.1", "pw2": "mm.model.mlp.3"},
}
"""llama.cpp's projectors, and its names for the two linear layers that every one of ours begins with."""

LDP_BLOCK = {"dw": "0.0", "norm1": "0.1", "se.fc1": "1.fc1", "se.fc2": "1.fc2", "pw": "2.0", "norm2": "2.1"}
"""A block of LDPv1 inside `mm.model.mb_block.N.block.`"""


def metadata(vision: Vision, projector: nn.Module, language_dim: int, pictures: Pictures, name: str) -> dict[str, Any]:
    """The file's table."""
    block: Block = vision.tower.blocks[0]
    runs = vision.depth - 1  # the features are the second-to-last block's
    return {
        "general.architecture": "clip",
        "general.name": name,
        "general.file_type": np.uint32(1),  # mostly float16
        "clip.has_vision_encoder": True,
        "clip.projector_type": projector_type(projector),
        **ACTIVATIONS[activation(block.mlp.act)][1],
        "clip.vision.image_size": np.uint32(vision.image_size),
        "clip.vision.patch_size": np.uint32(vision.tower.patch_embed.patch_size[0]),
        "clip.vision.embedding_length": np.uint32(vision.width),
        "clip.vision.feed_forward_length": np.uint32(block.mlp.fc1.out_features),
        "clip.vision.block_count": np.uint32(runs),
        "clip.vision.feature_layer": [np.int32(runs)],  # without it one block less than block_count is run
        "clip.vision.attention.head_count": np.uint32(block.attn.num_heads),
        "clip.vision.attention.layer_norm_epsilon": np.float32(block.norm1.eps),
        "clip.vision.projection_dim": np.uint32(language_dim),
        "clip.vision.image_mean": [np.float32(value) for value in pictures.mean],
        "clip.vision.image_std": [np.float32(value) for value in pictures.std],
    }


def write(path: Path, model: MobileVLM, pictures: Pictures, name: str, more: Mapping[str, Any] | None = None) -> None:
    """The float16 file.

    Args:
        more: further entries of its table.

    Raises:
        ValueError: see `check`.
    """
    check(model, pictures)
    table = metadata(model.vision, model.projector, model.language.config.hidden_size, pictures, name)
    container.write(
        path,
        table | dict(more or {}),
        [*tower_tensors(model.vision), *projector_tensors(model.projector, model.vision.grid)],
    )


# ---------------------------------------------------------------------------------------------------- the tower


def tower_tensors(vision: Vision) -> Iterator[Stored]:
    """The patch convolution, the positions and the blocks that run. The final norm is left out: stored, it would be applied."""
    tower: VisionTransformer = vision.tower
    yield from _layer("v.patch_embd", tower.patch_embed.proj)
    if tower.cls_token is not None:
        yield vector("v.class_embd", tower.cls_token.flatten())
    yield vector("v.position_embd.weight", positions(tower))
    yield from _norm("v.pre_ln", tower.norm_pre)
    for number, block in enumerate(tower.blocks[:-1]):
        theirs = f"v.blk.{number}"
        yield from _norm(f"{theirs}.ln1", block.norm1)
        for third, name in enumerate("qkv"):  # the graph of these projectors reads no joined matrix
            yield weights(f"{theirs}.attn_{name}.weight", block.attn.qkv.weight.chunk(3)[third])
            if block.attn.qkv.bias is not None:
                yield vector(f"{theirs}.attn_{name}.bias", block.attn.qkv.bias.chunk(3)[third])
        yield from _layer(f"{theirs}.attn_out", block.attn.proj, _scaled(block.ls1))
        yield from _norm(f"{theirs}.ln2", block.norm2)
        yield from _layer(f"{theirs}.ffn_up", block.mlp.fc1)
        yield from _layer(f"{theirs}.ffn_down", block.mlp.fc2, _scaled(block.ls2))


def _layer(name: str, layer: nn.Linear | nn.Conv2d, scale: Tensor | None = None) -> Iterator[Stored]:
    weight, bias = layer.weight, layer.bias
    if scale is not None:  # s * (W x + b) = (s * W) x + s * b, exactly
        weight, bias = weight * scale[:, None], None if bias is None else bias * scale
    yield weights(f"{name}.weight", weight)
    if bias is not None:
        yield vector(f"{name}.bias", bias)


def _scaled(scale: nn.Module) -> Tensor | None:
    """A block's layer scale. llama.cpp would load it under a name of its own and not apply it."""
    return None if isinstance(scale, nn.Identity) else scale.gamma


def _norm(name: str, norm: nn.Module) -> Iterator[Stored]:
    if not isinstance(norm, nn.Identity):
        yield vector(f"{name}.weight", norm.weight)
        if norm.bias is not None:
            yield vector(f"{name}.bias", norm.bias)


def activation(act: nn.Module) -> str:
    """Which of llama.cpp's activations this is, by what it computes, since libraries name them variously.

    Raises:
        ValueError: none of them.
    """
    probe = torch.linspace(-4, 4, 161)
    here = act(probe)
    for name, (theirs, _) in ACTIVATIONS.items():
        if torch.allclose(here, theirs(probe), atol=1e-3):
            return name
    raise ValueError(
        f"the tower's activation {type(act).__name__} is none that llama.cpp's ViT has: {', '.join(ACTIVATIONS)}"
    )


# ------------------------------------------------------------------------------------------------- the projector


def projector_type(projector: nn.Module) -> str:
    """llama.cpp's projector that computes the same as ours.

    By the exact class: one derived from these may compute something else.

    Raises:
        ValueError: there is none; the message names the projector, the reason and what to take.
    """
    kind, pool = type(projector), getattr(projector, "pool", 1)
    if kind is LDPv1:
        return "ldp"
    if kind in (PW2, AvgPool, LearnablePE) and pool == 1:
        return "mlp"  # a table of positions goes into its last bias
    if kind in (AvgPool, LearnablePE, LDPv2) and pool == 2:
        return "ldpv2"  # without a PEG its kernel is zero; a table of positions goes into its bias
    if kind in (AvgPool, LearnablePE, LDPv2):
        reason = f"with pool={pool}: its ldpv2 pools 2x2" + (", and its mlp has no PEG" if kind is LDPv2 else "")
        cure = "projector.pool=2" if kind is LDPv2 else "projector.pool=2 or 1"
        raise ValueError(f"llama.cpp has no {kind.__name__} {reason}. Export one trained with {cure}")
    raise ValueError(
        f"llama.cpp has no projector that computes what {kind.__name__} does; it has mlp, ldp and ldpv2. "
        "Export a model trained with projector=pw2, ldpv1, avgpool, learnable_pe or ldpv2"
    )


def projector_tensors(projector: nn.Module, grid: int) -> Iterator[Stored]:
    """A projector's tensors by llama.cpp's names.

    Args:
        grid: side of the tower's patch grid.
    """
    kind = projector_type(projector)
    extra = getattr(projector, "position", None)  # LearnablePE's table, (M, D)
    last = extra if kind == "mlp" else None
    yield from _layer(LINEARS[kind]["pw1"], projector.pw1)
    yield weights(f"{LINEARS[kind]['pw2']}.weight", projector.pw2.weight)
    yield vector(f"{LINEARS[kind]['pw2']}.bias", projector.pw2.bias if last is None else projector.pw2.bias + last)
    if kind == "ldpv2":
        yield from _peg(projector, extra, grid // 2)
    if kind == "ldp":
        for number, block in ((1, projector.block1), (2, projector.block2)):
            for ours, theirs in LDP_BLOCK.items():
                yield from _ldp_layer(f"mm.model.mb_block.{number}.block.{theirs}", block.get_submodule(ours))


def _peg(projector: nn.Module, table: Tensor | None, side: int) -> Iterator[Stored]:
    """The depth-wise convolution after pooling. llama.cpp adds its bias by broadcasting and does not look at its shape:
    so a bias of shape (side, side, D) is a table of positions. That is nowhere promised, and tested here."""
    dim = projector.pw2.out_features
    peg = getattr(projector, "peg", None)
    kernel = torch.zeros(dim, 1, 3, 3) if peg is None else peg.weight
    bias = torch.zeros(dim) if peg is None else peg.bias
    yield weights("mm.model.peg.0.weight", kernel)
    yield vector("mm.model.peg.0.bias", bias if table is None else bias + table.unflatten(0, (side, side)))


def _ldp_layer(name: str, layer: nn.Module) -> Iterator[Stored]:
    if isinstance(layer, nn.LayerNorm):
        return _norm(name, layer)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return _pointwise(name, layer)
    return _layer(name, layer)


def _pointwise(name: str, layer: nn.Conv2d) -> Iterator[Stored]:
    """A 1x1 convolution is stored as the matrix it is."""
    yield weights(f"{name}.weight", layer.weight.flatten(1))
    if layer.bias is not None:
        yield vector(f"{name}.bias", layer.bias)


# ---------------------------------------------------------------------------------------------------- the checks


def check(model: MobileVLM, pictures: Pictures) -> None:
    """Whether llama.cpp computes what this model's tower and projector do.

    Raises:
        ValueError: it does not; nothing was written. Each message names the part, the reason and the cure.
    """
    vision, projector = model.vision, model.projector
    kind = projector_type(projector)
    if kind != "mlp" and vision.grid != GRID:
        raise ValueError(
            f"llama.cpp's {kind} has a {GRID}x{GRID} grid of patches written into it and ends the process on another; this tower "
            f"makes {vision.grid}x{vision.grid} ({vision.image_size} px). Train with a grid of {GRID} (336 px in patches of 14, "
            "384 in patches of 16), or with projector=pw2, which takes any"
        )
    if pictures.size != vision.image_size:
        raise ValueError(f"pictures are fitted into {pictures.size} px and the tower takes {vision.image_size}")
    _check_tower(vision)


def _check_tower(vision: Vision) -> None:
    tower = vision.tower
    if type(tower) is not VisionTransformer or any(type(block) is not Block for block in tower.blocks):
        raise ValueError(
            f"llama.cpp runs the plain ViT, not a {type(tower).__name__} of {type(tower.blocks[0]).__name__}: "
            "take one of timm's vision_transformer.py, as CLIP and DINOv2 are"
        )
    block: Block = tower.blocks[0]
    known = {
        f"{name}.{leaf}" for name in ("patch_embed.proj", "norm_pre", "norm", "fc_norm") for leaf in ("weight", "bias")
    }
    known |= {"cls_token", "pos_embed"}
    inside = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    known |= {f"blocks.#.{name}.{leaf}" for name in inside for leaf in ("weight", "bias")}
    known |= {"blocks.#.ls1.gamma", "blocks.#.ls2.gamma"}
    names = {".".join("#" if word.isdecimal() else word for word in name.split(".")) for name in tower.state_dict()}
    if strange := sorted(names - known):
        raise ValueError(
            f"the tower {vision.arguments['name']} has {', '.join(strange)}, for which llama.cpp's ViT has no place: take another"
        )
    wide, deep = vision.width, block.mlp.fc1.out_features
    if wide == deep:
        raise ValueError(
            f"the tower's perceptron is as wide as the tower ({wide}), and llama.cpp then takes fc1 for fc2: "
            "build it with mlp_ratio other than 1 (4 is usual)"
        )
    if block.attn.num_heads * block.attn.head_dim != wide:
        raise ValueError(
            f"the tower's {block.attn.num_heads} heads of {block.attn.head_dim} do not make its width of {wide}"
        )
    norms = {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)}
    if len(norms) > 1:
        raise ValueError(f"the tower's norms have several epsilons ({sorted(norms)}), and the file has room for one")
    activation(block.mlp.act)


NEEDED = (
    "clip.has_vision_encoder", "clip.projector_type", "clip.vision.image_size", "clip.vision.patch_size",
    "clip.vision.embedding_length", "clip.vision.feed_forward_length", "clip.vision.block_count",
    "clip.vision.attention.head_count", "clip.vision.attention.layer_norm_epsilon", "clip.vision.projection_dim",
    "clip.vision.image_mean", "clip.vision.image_std",
)  # fmt: skip
"""Keys without which llama.cpp refuses a file, or worse."""


WEIGHTS = "mvlm.weights"
"""Key of both files of an export: a hash of what they were made from."""


def check_file(path: Path, language: Path) -> None:
    """Whether llama.cpp survives a pair of files: it ends the process over what is missing or has another shape or type.

    Args:
        path: the mmproj.
        language: the language model's file.

    Raises:
        ValueError: it would not, and the message lists all that is wrong; or the two are of different exports.
    """
    _check_pair(path, language, *((file.stat().st_size, file.stat().st_mtime_ns) for file in (path, language)))


@cache
def _check_pair(path: Path, language: Path, *stamps: tuple[int, int]) -> None:
    """`check_file`, once for the files as they are: reading a vocabulary takes seconds, and every task of the engine asks."""
    file, words = Opened(path), Opened(language)
    if lacks := [key for key in NEEDED if file.get(key) is None]:
        raise ValueError(f"{path} is no mmproj that llama.cpp can open: it lacks {', '.join(lacks)}")
    kind = file.get("clip.projector_type")
    if kind not in LINEARS:
        raise ValueError(f"{path} has the projector {kind!r}; known here are {', '.join(LINEARS)}")
    theirs = [one.get(WEIGHTS) for one in (file, words)]
    if None not in theirs and theirs[0] != theirs[1]:
        raise ValueError(
            f"{path.name} and {language.name} were exported from different weights ({theirs[0][:12]} and {theirs[1][:12]}): they would "
            "load, and the answers would have nothing to do with the picture. Take both from one export"
        )
    wanted = _shapes(file, words.get("llama.embedding_length"))
    faults = [f"{name} is missing" for name in wanted if name not in file]
    faults += [
        f"{name} is {file.shape(name)}, not {' or '.join(map(str, shapes))}"
        for name, shapes in wanted.items()
        if name in file and file.shape(name) not in shapes
    ]
    deep = [name for name in file.names() if len(file.shape(name)) == 4 and "patch_embd" not in name]
    faults += [
        f"{name} is {file.kind(name)}, and a depth-wise kernel must be F16" for name in deep if file.kind(name) != "F16"
    ]
    grid = file.get("clip.vision.image_size") // file.get("clip.vision.patch_size")
    faults += [f"its grid is {grid}x{grid}, and {kind} needs {GRID}x{GRID}"] * (kind != "mlp" and grid != GRID)
    if faults:
        raise ValueError(f"{path} would end llama.cpp's process: {'; '.join(faults)}. Export it again")


def _shapes(file: Opened, dim: int) -> Mapping[str, list[tuple[int, ...]]]:
    """The shapes that each tensor may have."""
    wide, deep, patch, side = (
        file.get(f"clip.vision.{key}")
        for key in ("embedding_length", "feed_forward_length", "patch_size", "image_size")
    )
    count, kind = (side // patch) ** 2, file.get("clip.projector_type")
    first, last = LINEARS[kind].values()
    shapes = {
        "v.patch_embd.weight": [(wide, 3, patch, patch)],
        "v.position_embd.weight": [(count + ("v.class_embd" in file), wide)],
        f"{first}.weight": [(dim, wide)],
        f"{first}.bias": [(dim,)],
        f"{last}.weight": [(dim, dim)],
        f"{last}.bias": [(dim,), (count, dim)] if kind == "mlp" else [(dim,)],
    }
    for block in range(file.get("clip.vision.block_count")):
        matrices = {"attn_q": (wide, wide), "attn_k": (wide, wide), "attn_v": (wide, wide), "attn_out": (wide, wide)}
        matrices |= {"ffn_up": (deep, wide), "ffn_down": (wide, deep), "ln1": (wide,), "ln2": (wide,)}
        shapes |= {f"v.blk.{block}.{name}.weight": [shape] for name, shape in matrices.items()}
    if kind == "ldpv2":
        half = GRID // 2
        shapes |= {"mm.model.peg.0.weight": [(dim, 1, 3, 3)], "mm.model.peg.0.bias": [(dim,), (half, half, dim)]}
    if kind == "ldp":
        inside = {"0.0": (dim, 1, 3, 3), "1.fc1": (dim // 4, dim), "1.fc2": (dim, dim // 4), "2.0": (dim, dim)}
        inside |= {"0.1": (dim,), "2.1": (dim,)}
        for block in (1, 2):
            shapes |= {f"mm.model.mb_block.{block}.block.{name}.weight": [shape] for name, shape in inside.items()}
    return shapes
