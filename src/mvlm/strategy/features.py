"""A frozen tower gives the same features for a picture every time: keep them, and neither decode nor encode it twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvlm.data.image import PictureError
from mvlm.model.cpu import keep_memory
from mvlm.model.mobilevlm import MobileVLM


@torch.no_grad()
def encode_pictures(
    model: MobileVLM,
    paths: Iterable[str],
    pixels: Callable[[str], Tensor],
    *,
    autocast: torch.dtype | None = None,
    batch_size: int = 16,
    kept_in: str | Path | None = None,
    unreadable: Callable[[str, PictureError], None] | None = None,
) -> dict[str, Tensor]:
    """The tower's output of every distinct picture.

    Args:
        pixels: picture file -> (3, S, S); what it prints as tells how.
        autocast: the precision the tower will have in training, too.
        kept_in: a folder where other runs find the same features, with the same tower, pictures, pixels and precision.
        unreadable: told of each picture that cannot be read, in this run or in the one that kept the features; it may raise.

    Returns:
        path -> (N, Dv) in `autocast`'s type, on the CPU: N * Dv * 2 bytes a picture, 442 kB at 576 x 384. Pictures that cannot be
        read are not among them.

    Raises:
        PictureError: one cannot be read, and there is no `unreadable`.
    """
    distinct, device = sorted(set(paths)), next(model.vision.parameters()).device
    if device.type == "cpu":
        keep_memory()
    file = kept_in and Path(kept_in) / f"{_fingerprint(model, distinct, pixels, autocast)}.safetensors"
    features: dict[str, Tensor] = load_file(file) if file and file.exists() else {}

    def read(path: str) -> Tensor | None:
        try:
            return pixels(path)
        except PictureError as error:
            if unreadable is None:
                raise
            unreadable(path, error)
            return None

    known = len(features)
    distinct = [path for path in distinct if path not in features]
    starts = range(0, len(distinct), batch_size)
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        for start in track(starts, description=f"encoding {len(distinct)} pictures", disable=not distinct):
            found = {path: read(path) for path in distinct[start : start + batch_size]}
            some = {path: picture for path, picture in found.items() if picture is not None}
            if some:
                encoded = model.encode(torch.stack(list(some.values())).to(device))
                features.update(zip(some, encoded.to(autocast or encoded.dtype).cpu().contiguous(), strict=True))
    if file and len(features) > known:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        save_file(features, aside)
        aside.replace(file)
    return features


def _fingerprint(model: MobileVLM, files: list[str], pixels: object, autocast: torch.dtype | None) -> str:
    """Of all that features depend on; pictures by path, size and time of change, those in shards by place and CRC-32."""
    device = next(model.vision.parameters()).device.type
    told = [torch.__version__, device, str(autocast), repr(pixels), repr(model.vision)]
    for path in files:
        try:
            told.append([path, (stat := os.stat(path)).st_size, stat.st_mtime_ns])
        except OSError:  # in a shard, where the path tells all; or gone, which reading it will tell
            told.append([path])
    whole = sha256(json.dumps(told).encode())
    for name, weight in model.vision.state_dict().items():
        whole.update(name.encode() + weight.detach().cpu().float().numpy().tobytes())
    return whole.hexdigest()[:16]
