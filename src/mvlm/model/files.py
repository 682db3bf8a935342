"""Files of weights on a disk or a hub: a name -> a folder -> named tensors. What the names mean is in `names.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WHOLE = ("model.safetensors", "pytorch_model.bin")
PROJECTOR_ONLY = "mm_projector.bin"


def fetch(source: str | Path, weights: bool = True) -> Path:
    """A local file or folder as it is; `owner/name` of the model hub downloaded, pickles only for want of safetensors.

    Args:
        weights: what a checkpoint is made of; else its small files alone, among them the tokenizer's.

    Raises:
        ValueError: neither is to be had.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise ValueError(f"{source}: there is no such file or folder")
    import huggingface_hub

    def with_small_files(*kinds: str) -> Path:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=[*kinds, "*.json", "*.model"]))

    try:
        if not weights:
            return with_small_files()
        folder = with_small_files("*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else with_small_files("*.bin")
    except Exception as error:  # no network, no such model, no permission: many types, one cure
        raise ValueError(
            f"{source} is no local folder, and the model hub gave nothing ({first_line(error)}): check the name, "
            "or fetch it on a machine with a network and give the folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; empty where there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): copy or download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings but {type(config).__name__}: copy or download it again")
    return config


def read_tensors(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or of a checkpoint's folder: safetensors or torch's zip files, whole or in indexed shards.

    Pickles are read as plain tensors only, so that no file can run code.

    Raises:
        ValueError: nothing there, a shard missing, a file torn or not of tensors; the message names the file.
    """
    path = Path(source)
    if path.is_file():
        return _read_index(path) if path.name.endswith(".index.json") else _read_file(path)
    for name in WHOLE:
        if (path / name).is_file():
            return _read_file(path / name)
        if (path / f"{name}.index.json").is_file():
            return _read_index(path / f"{name}.index.json")
    if (path / PROJECTOR_ONLY).is_file():
        return _read_file(path / PROJECTOR_ONLY)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} holds adapters, not a model: merge them into their base model first")
    there = some(sorted(p.name for p in path.iterdir()), 12) or "it is empty" if path.is_dir() else "no such folder"
    raise ValueError(f"{path} holds no weights ({', '.join(WHOLE)}, an index of shards, or {PROJECTOR_ONLY}): {there}")


def _read_index(path: Path) -> dict[str, Tensor]:
    try:
        place: dict[str, str] = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(shard, str) for shard in place.values()):
            raise TypeError("weight_map gives each tensor the name of a file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole index ({first_line(error)}): copy or download it again") from error
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(place.values())):
        if Path(shard).name != shard or not (path.parent / shard).is_file():
            raise ValueError(f"{path} names the shard {shard}, which is not in its folder: copy or download it")
        tensors |= _read_file(path.parent / shard)
    if lost := sorted(set(place) - set(tensors)):
        raise ValueError(f"{path} promises tensors that no shard holds ({some(lost)}): the shards are of another save")
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch and safetensors tell a torn file by half a dozen types
        with path.open("rb") as file:
            if file.read(30).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{path} is git-lfs's note of a file, not the file: run `git lfs pull` there"
                ) from error
        what = "torn" if path.suffix == ".safetensors" else "torn, older than torch 1.6, or more than plain tensors"
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) can't be read, it is {what}: copy or download it again "
            f"({first_line(error)})"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is no plain state dict: a mapping of names to tensors was expected")
    return tensors


def first_line(error: BaseException) -> str:
    """An error in one line, for a message of ours."""
    lines = str(error).splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:160]}"


def some(words: Iterable[Any], most: int = 6) -> str:
    """The first few words of a list, and how many are left."""
    words = [str(word) for word in words]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
