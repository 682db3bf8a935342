"""Weights in and out, in the layout of the released MobileVLM and MobileVLM V2 (its names are `names.py`'s matter).

Every reader matches all names and shapes first and changes no weight before they fit. Values take the dtype of the
model's own parameters. What a file holds beyond the model is refused, or skipped where it is said here, and reported.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from mvlm.model.files import fetch, read_config, read_tensors, some
from mvlm.model.mobilevlm import MobileVLM
from mvlm.model.names import (
    CLIP,
    PROJECTOR,
    TOWER,
    Place,
    clip_names,
    language_names,
    model_names,
    own_names,
    projector_arguments,
    projector_from,
    projector_names,
    projector_type,
    tower_names,
)
from mvlm.model.vision import Vision

__all__ = [
    "Loaded",
    "fetch",
    "from_released",
    "load_checkpoint",
    "load_language",
    "load_projector",
    "load_vision",
    "read_config",
    "read_tensors",
    "save_checkpoint",
]

RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of names that are skipped: tables that older versions of transformers stored and that are computed anyway."""

COMPUTES = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters")
"""Settings of a language model that change its numbers and no tensor's shape: unchecked, the wrong model loads well."""

NOT_LANGUAGE = re.compile(
    r"(mm|image|tune_mm|freeze_mm|use_mm|vision_tower)_.*|architectures|model_type|auto_map|.*dtype|.*(attn|experts)_implementation.*"
)
"""Keys of a checkpoint's config.json that don't speak of the language model; or of how it is computed, where transformers would take the
name of a kernel on the model hub, which is code."""


@dataclass(frozen=True)
class Loaded:
    """What a reader did."""

    tensors: int
    """Taken over from the files."""
    skipped: list[str] = field(default_factory=list)
    """Tensors of the files that no part of the model asks for, such as the text half of a whole CLIP."""
    tower: str = ""
    """Where the vision tower's weights came from, if any did."""


Plan = list[tuple[Tensor, Tensor]]
"""(tensor of the model, the value it will take). Made in full, and so checked, before anything is carried out."""


# ------------------------------------------------------------------------------------------------------- parts


def load_vision(vision: Vision, source: str | Path) -> Loaded:
    """Pretrained weights into the tower. What kind of file it is shows in its names; those of folders say nothing.

    Args:
        vision: the tower to fill.
        source: a timm state dict, a transformers CLIPVisionModel, a whole CLIPModel (its text half is skipped) or a
            MobileVLM checkpoint, as a file, a folder or a name on the model hub.

    Raises:
        ValueError: nothing readable there, or another tower; no weight was changed.
    """
    plan, loaded = _plan_vision(vision, fetch(source))
    _carry_out(plan)
    return loaded


def load_language(language: nn.Module, source: str | Path) -> Loaded:
    """Pretrained weights into the language model: a transformers checkpoint, or the language model of a MobileVLM's.

    A file saved with tied embeddings fills both matrices of an untied model.

    Raises:
        ValueError: nothing readable there, or another language model; no weight was changed.
    """
    path = fetch(source)
    tensors, config = read_tensors(path), read_config(path)
    skipped = _drop(tensors, lambda name: name.startswith((PROJECTOR, TOWER)) or name.endswith(RECOMPUTED))
    _settle_language(language, tensors, config, path)
    cure = "Build the language model with the sizes of its config.json."
    _carry_out(_plan(language, language_names(language), tensors, path, cure))
    return Loaded(len(tensors), skipped)


def load_projector(projector: nn.Module, source: str | Path) -> Loaded:
    """A trained projector: `mm_projector.bin` of the reference's first stage, or the projector of a whole checkpoint.

    Raises:
        ValueError: nothing readable there, or another projector; no weight was changed.
    """
    path = fetch(source)
    tensors = read_tensors(path)
    _check_projector(projector, read_config(path), path)
    skipped = _drop(tensors, lambda name: not name.startswith(PROJECTOR))
    cure = "Choose the projector that it was trained with."
    _carry_out(_plan(projector, projector_names(projector), tensors, path, cure))
    return Loaded(len(tensors), skipped)


# ------------------------------------------------------------------------------------------------- whole models


def load_checkpoint(model: MobileVLM, folder: str | Path, *, vision: str | Path | None = None) -> Loaded:
    """A released checkpoint, or one of ours, into a model of its kind.

    Which tower: the reference keeps the checkpoint's own if the projector's type contains `v2`, and otherwise reads
    CLIP anew from `mm_vision_tower`; so does this. What `save_checkpoint` wrote keeps its own
    (`mm_vision_tower_inside`), for a strategy may have trained it. Where CLIP should be read anew and lies nowhere on
    this machine, the checkpoint's own is used, with a warning: it is that CLIP, rounded to the precision of training.

    Args:
        model: of the checkpoint's shapes.
        folder: the checkpoint, or a name on the model hub. One with nothing but a projector fills the projector only.
        vision: where `mm_vision_tower` is, if not where the checkpoint's config.json says.

    Raises:
        ValueError: nothing readable there, or another model; no weight was changed.
    """
    path = fetch(folder)
    tensors, config = read_tensors(path), read_config(path)
    if all(name.startswith(PROJECTOR) for name in tensors):
        return load_projector(model.projector, path)
    return _load(model, path, tensors, config, _original_tower(config, path, vision))


def _load(
    model: MobileVLM, path: Path, tensors: dict[str, Tensor], config: dict[str, Any], original: Path | None
) -> Loaded:
    _check_projector(model.projector, config, path)
    skipped = _drop(tensors, lambda name: name.endswith(RECOMPUTED))
    _settle_language(model.language, tensors, config, path)
    places, plan, tower = model_names(model), [], Loaded(0, [], str(path))
    inside = bool(config.get("mm_vision_tower_inside"))
    if not inside and "v2" not in config.get("mm_projector_type", projector_type(model.projector)):
        if original is not None:
            plan, tower = _plan_vision(model.vision, original)
            places = [place for place in places if not place.ours.startswith("vision.")]
            skipped += _drop(tensors, lambda name: name.startswith(TOWER))
        else:
            warnings.warn(
                f"{path}: the reference reads the tower {config.get('mm_vision_tower')!r} anew, and that is no folder "
                "here. The checkpoint's own tower is used; say vision=<folder> for the other",
                stacklevel=3,
            )
    elif not inside:
        _check_tower(model.vision, original, path)
    plan += _plan(model, places, tensors, path, "Build the model that its config.json describes, or take another one.")
    _carry_out(plan)
    return Loaded(len(tensors) + tower.tensors, skipped + tower.skipped, tower.tower)


def _original_tower(config: Mapping[str, Any], path: Path, vision: str | Path | None) -> Path | None:
    """Where the tower lies that the checkpoint started from: as said, or as its config says, from here or beside it."""
    if vision is not None:
        return fetch(vision)
    named = config.get("mm_vision_tower")
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{path}: mm_vision_tower is a name or a folder, not {named!r}: mend its config.json")
    candidates = [Path(named).expanduser(), path / named, path.parent / named] if named else []
    return next((candidate for candidate in candidates if candidate.exists()), None)


def from_released(folder: str | Path, *, vision: str | Path | None = None) -> MobileVLM:
    """A model built from a checkpoint's own config.json, with its weights: a released MobileVLM, or one that we saved.

    The tower's heads and activation show in no tensor. They are what `save_checkpoint` noted, else what the config.json
    of `mm_vision_tower` says where that is a local folder, else OpenAI's: heads 64 wide, quick-GELU.

    Args:
        folder: the checkpoint, or a name on the model hub.
        vision: where `mm_vision_tower` is, if not where the checkpoint's config.json says.

    Returns:
        The model in float32, set to `eval()`.

    Raises:
        ValueError: nothing readable there, no whole model, or one that can't be built from what is said.
    """
    path = fetch(folder)
    tensors, config = read_tensors(path), read_config(path)
    if lacks := [key for key in ("mm_projector_type", "hidden_size", "vocab_size") if key not in config]:
        raise ValueError(f"{path} is no MobileVLM checkpoint: its config.json lacks {', '.join(lacks)}")
    if "model.embed_tokens.weight" not in tensors or not any(name.startswith(TOWER) for name in tensors):
        raise ValueError(
            f"{path} is no whole model ({some(tensors, 3)}): load_checkpoint puts it into one that you built"
        )
    original = _original_tower(config, path, vision)
    tower = Vision(**(config.get("mm_vision_arguments") or _clip_arguments(tensors, original, path)))
    language = LlamaForCausalLM(_language_config(LlamaConfig, config))
    kind, arguments = config["mm_projector_type"], config.get("mm_projector_arguments", {})
    model = MobileVLM(tower, projector_from(kind, tower.grid, arguments), language)
    _load(model, path, tensors, config, original)
    return model.eval()


def _clip_arguments(tensors: Mapping[str, Tensor], original: Path | None, path: Path) -> dict[str, Any]:
    """What to build a checkpoint's CLIP tower with: sizes from its tensors, the rest from the original's config."""
    inside = TOWER + CLIP
    shape = {name.removeprefix(inside): value.shape for name, value in tensors.items() if name.startswith(inside)}
    blocks = {name.split(".")[2] for name in shape if name.startswith("encoder.layers.")}
    try:
        width, _, patch, _ = shape["embeddings.patch_embedding.weight"]
        positions, _ = shape["embeddings.position_embedding.weight"]
        hidden, _ = shape["encoder.layers.0.mlp.fc1.weight"]
    except KeyError as error:
        raise ValueError(
            f"{path} has no CLIP tower (no {error}): build the model from its own configuration and load_checkpoint"
        ) from error
    said = _clip_config(original)
    if said is None and width % 64:
        raise ValueError(
            f"{path}: a tower {width} wide doesn't tell its heads (OpenAI's CLIPs have them 64 wide) and its "
            "mm_vision_tower is no folder here: say vision=<folder of that tower, with its config.json>"
        )
    return {
        "name": "vit_large_patch14_clip_quickgelu_336",  # the frame; every size below is given
        "image_size": patch * round((positions - 1) ** 0.5),
        "patch_size": patch,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": said.num_attention_heads if said else width // 64,
        "mlp_ratio": hidden / width,
        "act_layer": said.hidden_act if said else "quick_gelu",
    }


# ------------------------------------------------------------------------------------------------------ matching


def _plan(module: nn.Module, places: list[Place], tensors: Mapping[str, Tensor], source: Path, cure: str) -> Plan:
    """Match names and shapes.

    Raises:
        ValueError: a name too few or too many, another shape, or integer codes where numbers are.
    """
    state = module.state_dict()
    if any(value.is_meta for value in state.values()):
        raise ValueError(
            "a model on torch's meta device keeps no values: build it on a real one before weights are loaded"
        )
    asked = {name: (place.shape, state[place.ours]) for place in places for name in place.theirs}
    wrong = [
        f"{name} is {tuple(there.shape)} {there.dtype} there and {shape} {ours.dtype} here"
        for name, (shape, ours) in asked.items()
        if (there := tensors.get(name)) is not None
        and (tuple(there.shape) != shape or there.is_floating_point() != ours.is_floating_point())
    ]
    faults = {
        "": wrong,
        "the model asks for more: ": [name for name in asked if name not in tensors],
        "the model has no place for ": [name for name in tensors if name not in asked],
    }
    if told := [text + some(names) for text, names in faults.items() if names]:
        raise ValueError(f"{source} doesn't fit the model, nothing was loaded: {'; '.join(told)}. {cure}")
    return [(state[place.ours], place.read(tensors, state[place.ours])) for place in places]


@torch.no_grad()
def _carry_out(plan: Plan) -> None:
    for ours, value in plan:
        ours.copy_(value)


def _drop(tensors: dict[str, Tensor], unwanted: Callable[[str], bool]) -> list[str]:
    """Take names out of `tensors`, and tell which."""
    dropped = [name for name in tensors if unwanted(name)]
    for name in dropped:
        del tensors[name]
    return dropped


POOLED = ("head.", "attn_pool.", "fc_norm.")
"""What timm's own files have behind the blocks: the pool of SigLIP, the norm of EVA-02, the classifier."""


def _plan_vision(vision: Vision, source: Path) -> tuple[Plan, Loaded]:
    """The tower in whichever of its shapes the names of a file show."""
    tensors, tower = read_tensors(source), vision.tower
    clip, own = clip_names(tower), own_names(tower)
    ways = [  # what stands before the tower's names, and these
        (TOWER, [place.under(TOWER) for place in tower_names(tower)]),  # a MobileVLM checkpoint
        (CLIP, [place.under(CLIP) for place in clip]),  # a CLIPModel, a CLIPVisionModel of transformers 4
        ("", clip),  # a CLIPVisionModel of transformers 5
        ("", own),  # timm
    ]

    def hits(way: tuple[str, list[Place]]) -> int:
        return sum(name in tensors for place in way[1] for name in place.theirs)

    prefix, places = max(ways, key=hits)
    if not hits((prefix, places)):
        expected = " or ".join(f"{some([name for p in way for name in p.theirs], 2)}, ..." for _, way in ways if way)
        raise ValueError(
            f"{source} holds no such tower, nothing was loaded: {some(tensors, 3)} there, {expected} expected"
        )
    _check_tower(vision, source, source)
    known = {name for place in places for name in place.theirs}
    skipped = _drop(
        tensors,
        lambda name: (
            not name.startswith(prefix) or (name.startswith(POOLED) and name not in known) or name.endswith(RECOMPUTED)
        ),
    )
    if places is own:
        # The norm that follows the last block is never run, and a tower with another way to pool has none.
        places = [place for place in own if place.theirs[0] in tensors or not place.ours.startswith("norm.")]
    cure = f"Build the tower that these weights are of (this one: {vision.arguments})."
    return _plan(tower, places, tensors, source, cure), Loaded(len(tensors), skipped, str(source))


def _clip_config(folder: Path | None) -> CLIPVisionConfig | None:
    """The settings of a CLIPVisionModel's or a CLIPModel's folder; None for anything else."""
    config = read_config(folder) if folder is not None else {}
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        return None
    return CLIPVisionConfig.from_dict(config.get("vision_config", config))


def _check_tower(vision: Vision, original: Path | None, source: Path) -> None:
    """Compare what shows in no tensor: heads, epsilon and activation (by what it computes, its names differ).

    Raises:
        ValueError: the tower's own config.json computes otherwise.
    """
    config = _clip_config(original)
    if config is None or not clip_names(vision.tower):
        return
    block, probe = vision.tower.blocks[0], torch.linspace(-3, 3, 61)
    heads, eps, act = block.attn.num_heads, block.norm1.eps, block.mlp.act
    # GELU and quick-GELU differ by up to 0.02 on the probe
    same = torch.allclose(act(probe), ACT2FN[config.hidden_act](probe), atol=1e-3)
    told = [f"{config.num_attention_heads} heads there, {heads} here"] * (config.num_attention_heads != heads)
    told += [f"epsilon {config.layer_norm_eps} there, {eps} here"] * (config.layer_norm_eps != eps)
    told += [f"{config.hidden_act} there, {type(act).__name__} here (timm's names with `quickgelu`?)"] * (not same)
    if told:
        raise ValueError(f"{source} has another tower than the one built, nothing was loaded: {'; '.join(told)}")


def _check_projector(projector: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    """By type first: two projectors may have the same names and shapes.

    Raises:
        ValueError: `mm_projector_type` is not the model's, or `mm_projector_arguments` are not.
    """
    told = {"mm_projector_type": projector_type(projector), "mm_projector_arguments": projector_arguments(projector)}
    for key, here in told.items():
        there = config.get(key, here)
        if there != here:
            raise ValueError(
                f"{path} was trained with the projector {there!r} and the model has {here!r}, nothing was loaded: "
                "choose the same projector and pooling, or another checkpoint"
            )


def _settle_language(language: nn.Module, tensors: dict[str, Tensor], config: Mapping[str, Any], source: Path) -> None:
    """Compare what shows in no tensor; make the file's head look like the model's: stored, or tied to the embedding.

    Raises:
        ValueError: the file's config.json computes otherwise, or its head is a matrix that a tied model can't hold.
    """
    if "num_attention_heads" in config:
        there, here = _language_config(type(language.config), config), language.config
        differs = [
            f"{key} {getattr(there, key, None)!r} there, {getattr(here, key, None)!r} here"
            for key in COMPUTES
            if getattr(there, key, None) != getattr(here, key, None)
        ]
        if differs:
            raise ValueError(
                f"{source} has another language model than the one built, nothing was loaded: {'; '.join(differs)}. "
                "Its tensors may fit and would compute something else: take the settings of its config.json"
            )
    embedding, head = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    if head is None and embedding is not None and config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = head = embedding
    if head is not None and language.config.tie_word_embeddings:
        if embedding is None or not torch.equal(head, embedding):
            raise ValueError(
                f"{source} has a head of its own and the model ties it to the word embeddings, nothing was loaded: "
                "build the language model with tie_word_embeddings=false"
            )
        del tensors["lm_head.weight"]


def _language_config(made: type, config: Mapping[str, Any]) -> Any:
    return made.from_dict({key: value for key, value in config.items() if not NOT_LANGUAGE.fullmatch(key)})


# -------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    model: MobileVLM,
    folder: str | Path,
    *,
    extras: Mapping[str, Any] | None = None,
    files: Iterable[str | Path] = (),
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
) -> Path:
    """The whole model as a folder in the released layout. Files are written aside and renamed: what is there is whole.

    Args:
        model: its adapters merged, its parameters in one piece (under ZeRO-3: inside `GatheredParameters`).
        folder: made if needed; weights of an earlier save are replaced, other files stay.
        extras: for config.json, what the model can't know: `mm_vision_tower` (where the tower came from),
            `image_aspect_ratio`. They overrule what is written otherwise.
        files: copied beside it (the tokenizer's).
        dtype: store in another precision than the parameters'.
        shard_size: a larger model is cut into shards with an index.

    Raises:
        ValueError: adapters are not merged.
    """
    folder, state = Path(folder), model.state_dict()
    if adapters := [name for name in state if ".lora_" in name]:
        raise ValueError(f"the layout has no place for adapters: merge them before saving ({some(adapters, 2)})")
    tensors: dict[str, Tensor] = {}
    for place in model_names(model):
        value = state[place.ours].detach().cpu()
        tensors |= place.write(value.to(dtype) if dtype and value.is_floating_point() else value)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)

    aside = folder / ".part"
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    aside.mkdir(parents=True)
    try:
        for name, members in split.filename_to_tensors.items():
            save_file({member: tensors[member] for member in members}, aside / name, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(aside / "model.safetensors.index.json", index)
        _write_json(aside / "config.json", _released_config(model, tensors) | dict(extras or {}))
        for file in map(Path, files):
            shutil.copyfile(file, aside / file.name)
        _replace_weights(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _replace_weights(aside: Path, folder: Path) -> None:
    """Move new files into place. Shards of two saves must never stand under one index: old weights go first, unless
    one file replaces one file, and the index comes last."""
    weights = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
    new = sorted((path.name for path in aside.iterdir()), key=lambda name: (name.endswith(".index.json"), name))
    for old in [path for path in folder.iterdir() if weights.fullmatch(path.name)]:
        if old.name not in new or old.name != "model.safetensors":
            old.unlink()
    for name in new:
        (aside / name).replace(folder / name)


def _released_config(model: MobileVLM, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json as the reference writes it, and keys of ours: how to build the tower, that it is inside, and how to build a projector
    that the reference has not."""
    config = json.loads(model.language.config.to_json_string())
    rope = config.pop("rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    stored = {value.dtype for value in tensors.values()}
    arguments = {key: v for key, v in model.vision.arguments.items() if key not in ("pretrained", "checkpoint_path")}
    of_projector = projector_arguments(model.projector)
    return {key: value for key, value in config.items() if not NOT_LANGUAGE.fullmatch(key)} | {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "torch_dtype": str(stored.pop() if len(stored) == 1 else torch.float32).removeprefix("torch."),
        "rope_theta": rope.get("rope_theta"),  # as the reference's version of transformers reads it
        "rope_scaling": None if kind == "default" else {"type": kind, **scaling},
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": model.vision.width,
        **({"mm_projector_arguments": of_projector} if of_projector else {}),
        "mm_projector_lr": None,
        "mm_projector_type": projector_type(model.projector),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_arguments": arguments,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": None,
        "mm_vision_tower_inside": True,
        "use_mm_proj": True,
        "vision_tower_type": "clip" if clip_names(model.vision.tower) else "timm",
    }
