"""Picture file to pixels. One named way of fitting a picture into a square serves training, evaluation, chat and
export."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mvlm.data import shards

Mode = Literal["square", "pad", "letterbox"]

LETTERBOX_COLOUR = (122, 116, 104)
"""llama.cpp pads with this colour whatever the mean (the rounded CLIP mean)."""

MAX_PIXELS = 50_000_000
"""Width times height above which a picture is refused before it is decoded (200 MB as RGB with its working copies)."""


class PictureError(ValueError):
    """A picture that cannot be read; the message names the file and the reason, `kind` says the latter in a few words."""

    def __init__(self, message: str, kind: str = "damaged picture") -> None:
        super().__init__(message)
        self.kind = kind


class Pictures:
    """Fits a picture into `size` x `size` pixels and normalises it.

    Args:
        size: side S in pixels.
        mode: `square` resizes the shorter side to S and crops the middle (the reference in stage 1 and for ScienceQA);
            `pad` first fills it up to a square with the mean colour (the reference elsewhere);
            `letterbox` resizes the longer side to S, then fills up with llama.cpp's fixed colour.
        mean, std: of the three channels, on the scale 0 to 1.
        max_pixels: largest file that is decoded, see `open_picture`.
    """

    def __init__(
        self, size: int, mode: Mode, mean: Sequence[float], std: Sequence[float], max_pixels: int = MAX_PIXELS
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"no picture mode {mode!r}; there are {', '.join(get_args(Mode))}")
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"need a positive side and three means and deviations, not {size=}, {mean=}, {std=}")
        self.size, self.mode, self.max_pixels = size, mode, max_pixels
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self.fill = tuple(int(255 * m) for m in mean)  # cut, not rounded, as the reference does

    def __repr__(self) -> str:
        return f"Pictures({self.size}, {self.mode!r}, {self.mean}, {self.std})"

    def __call__(self, image: str | Path | bytes | Image.Image) -> Tensor:
        """A file, its bytes or an opened picture to (3, S, S) float32.

        Raises:
            PictureError: it cannot be read, or is too narrow a strip to be fitted.
        """
        picture = _rgb(image) if isinstance(image, Image.Image) else self.open(image)
        pixels = np.asarray(self.fit(picture))
        # In double precision up to here and single from here on: so the result is the reference's, bit for bit.
        scaled = (pixels * (1 / 255)).astype(np.float32)
        return torch.from_numpy((scaled - self.mean) / self.std).permute(2, 0, 1).contiguous()

    def open(self, source: str | Path | bytes) -> Image.Image:
        """A picture file as RGB, see `open_picture`.

        Raises:
            PictureError: it cannot be read, or is too narrow a strip to be fitted.
        """
        picture = open_picture(source, self.max_pixels)
        try:
            self._check(picture)
        except PictureError as error:
            raise PictureError(f"{_name(source)}: {error}", error.kind) from None
        return picture

    def fit(self, picture: Image.Image) -> Image.Image:
        """An RGB picture to S x S, still in 0 to 255."""
        if self.mode == "letterbox":
            return self._letterbox(picture)
        self._check(picture)
        return self._crop(_expand(picture, self.fill) if self.mode == "pad" else picture)

    def _check(self, picture: Image.Image) -> None:
        """Raises PictureError if fitting a strip, one pixel wide say, would fill the memory."""
        short, long = sorted(picture.size)
        needed = {"square": self.size * self.size * long // short, "pad": long * long, "letterbox": 0}[self.mode]
        if needed > 4 * self.max_pixels:
            told = f"{picture.width} x {picture.height} pixels are too narrow for mode {self.mode}"
            raise PictureError(told, "too narrow a picture")

    def _crop(self, picture: Image.Image) -> Image.Image:
        """Shorter side to S by bicubic, the longer one cut down in whole pixels, then the middle S x S (CLIP's
        processor)."""
        short, long = sorted(picture.size)
        side = int(self.size * long / short)
        width, height = (self.size, side) if picture.width <= picture.height else (side, self.size)
        resized = _resize(picture, width, height)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return resized.crop((left, top, left + self.size, top + self.size))

    def _letterbox(self, picture: Image.Image) -> Image.Image:
        """Longer side to S by bicubic, in the middle of llama.cpp's colour; its sums are in single precision, so are
        these."""
        k = min(np.float32(self.size) / np.float32(picture.width), np.float32(self.size) / np.float32(picture.height))
        width, height = (min(math.ceil(np.float32(side) * k), self.size) for side in picture.size)
        canvas = Image.new("RGB", (self.size, self.size), LETTERBOX_COLOUR)
        canvas.paste(_resize(picture, width, height), ((self.size - width) // 2, (self.size - height) // 2))
        return canvas


def open_picture(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file, decoded, as RGB: of an animation the first frame; transparency and the camera's orientation (EXIF) are
    ignored, as the reference's `convert("RGB")` has it. Grey of more than 8 bits is scaled, where that cuts it to white.

    Args:
        source: path (of a picture in a shard, too: see `mvlm.data.shards`), or the bytes of a file.
        max_pixels: larger ones are refused before anything is decoded.

    Raises:
        PictureError: missing, empty, no picture, cut off, damaged or too large.
        ConnectionError: its shard cannot be fetched. No picture is bad for that, so a run ends whatever `on_bad_sample` is.
    """
    name = _name(source)
    try:
        if isinstance(source, str) and (member := shards.read(source)) is not None:
            source = member
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            width, height = picture.size
            if width * height == 0:
                raise PictureError(f"{name}: the picture has no pixels ({width} x {height})", "no pixels")
            if width * height > max_pixels:
                raise PictureError(
                    f"{name}: {width} x {height} pixels are more than the limit of {max_pixels:,}",
                    "too large a picture",
                )
            return _rgb(picture)
    except (PictureError, ConnectionError):
        raise
    except shards.ShardError as error:
        raise PictureError(f"{name}: {error}", error.kind) from None
    except FileNotFoundError:
        raise PictureError(f"{name}: there is no such file", "missing picture") from None
    except UnidentifiedImageError:
        empty = (
            len(source) == 0 if isinstance(source, bytes) else os.path.exists(source) and not os.path.getsize(source)
        )
        told = ("the file is empty", "empty file") if empty else ("this is not a picture", "not a picture")
        raise PictureError(f"{name}: {told[0]}", told[1]) from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too large: {error}", "too large a picture") from None
    except Exception as error:  # Pillow's readers meet damage with anything: OSError, SyntaxError, struct.error ...
        if getattr(error, "errno", None):  # the system's own: a folder, no right to read, a disk that is gone
            raise PictureError(f"{name}: cannot be read ({error.strerror})", "unreadable file") from None
        raise PictureError(f"{name}: damaged or cut off ({type(error).__name__}: {error})") from error


def _name(source: str | Path | bytes) -> str:
    return "the picture" if isinstance(source, bytes) else str(source)


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB by Pillow's `convert`. That cuts what is above 255 to white, and makes floats from 0 to 1 black: these grey
    pictures are scaled before. Floats and integers of 32 bits do not tell their range: it is the least of 1 (floats), 8, 16 and 31 bits that
    holds them."""
    if picture.mode.startswith("I") or picture.mode == "F":
        picture.load()  # here damage is told; numpy would make something of it
        grey = np.asarray(picture, np.float32)
        depths = {"F": (1, 255, 65535), "I": (255, 65535)}.get(picture.mode, (65535,))
        most = grey[np.isfinite(grey)].max(initial=0)
        full = next((depth for depth in depths if most <= depth), 2**31 - 1)
        if full != 255:
            grey = np.nan_to_num(grey, posinf=full, neginf=0)
            picture = Image.fromarray((grey * (255 / full)).clip(0, 255).round().astype(np.uint8))
    return picture.convert("RGB")


def _expand(picture: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of one colour."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)
