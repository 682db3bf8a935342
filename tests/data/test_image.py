"""Pixels against the reference's processor, llama.cpp's fit from its rule, and every kind of bad file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from mvlm.data.image import LETTERBOX_COLOUR, PictureError, Pictures, open_picture

REFERENCE = Path(__file__).parents[1] / "reference"
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("name", ["img0.png", "img1.png", "img2.png"])
def test_pixels_equal_the_reference(name, mode):
    pixels = Pictures(336, mode, **CLIP)(REFERENCE / "images" / name)
    assert pixels.shape == (3, 336, 336) and pixels.dtype == torch.float32
    tensors = load_file(REFERENCE / "tensors/pixel_values.safetensors")
    for key, view in ((f"{name}.{mode}", pixels), (f"{name}.{mode}.every6", pixels[:, ::6, ::6])):
        if key in tensors:
            # One grey level is 0.014 here; 1e-5 leaves room for another order of the same few operations only.
            torch.testing.assert_close(view, tensors[key], atol=1e-5, rtol=0)
    facts = json.loads((REFERENCE / "tensors/pixel_values.json").read_text())[f"{name}.{mode}"]
    np.testing.assert_allclose(pixels.double().mean((1, 2)), facts["mean"], atol=1e-5)
    np.testing.assert_allclose(pixels.double().std((1, 2), correction=0), facts["std"], atol=1e-5)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == facts["sha256"]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


def test_letterbox_by_hand():
    """200 x 100 to 64: k = 0.32, so 64 x 32, 16 rows of the colour above and below; no mean enters."""
    picture = noise(200, 100)
    for mean in (0.0, 0.5):
        fit = Pictures(64, "letterbox", mean=[mean] * 3, std=[1.0] * 3).fit(picture)
        array = np.asarray(fit)
        assert (array[:16] == LETTERBOX_COLOUR).all() and (array[48:] == LETTERBOX_COLOUR).all()
        assert (array[16:48] == np.asarray(picture.resize((64, 32), Image.Resampling.BICUBIC))).all()
    # 100 x 34: k = 0.64, 34 k = 21.76, rounded up to 22; the odd rest of 21 rows goes above.
    array = np.asarray(Pictures(64, "letterbox", **PLAIN).fit(noise(100, 34)))
    assert (array[:21] == LETTERBOX_COLOUR).all() and (array[43:] == LETTERBOX_COLOUR).all()
    assert not (array[21] == LETTERBOX_COLOUR).all() and not (array[42] == LETTERBOX_COLOUR).all()


def test_letterbox_rounds_as_single_precision_does():
    """300 x 100 to 336: 100 times 1.12 is 112.00000000000001 in double precision and 112 in llama.cpp's single one."""
    array = np.asarray(Pictures(336, "letterbox", **PLAIN).fit(noise(300, 100)))
    assert (array[:112] == LETTERBOX_COLOUR).all() and (array[224:] == LETTERBOX_COLOUR).all()


@pytest.mark.parametrize("mode", ["square", "pad", "letterbox"])
def test_a_fitting_picture_is_untouched(mode):
    picture = noise(56, 56)
    pixels = Pictures(56, mode, **PLAIN)(picture)
    assert torch.equal((pixels * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.asarray(picture).copy()))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), mode=st.sampled_from(["square", "pad", "letterbox"]))
def test_any_shape_fits(width, height, mode):
    pixels = Pictures(28, mode, **CLIP)(noise(width, height))
    assert pixels.shape == (3, 28, 28) and bool(pixels.isfinite().all())


def test_strips_do_not_fill_the_memory(tmp_path):
    assert Pictures(28, "letterbox", **CLIP)(Image.new("RGB", (1, 90_000))).shape == (3, 28, 28)
    Image.new("1", (1, 900_000)).save(tmp_path / "x.png")
    for mode in ("square", "pad"):
        with pytest.raises(PictureError, match=r"1 x 900000 pixels are too narrow"):
            Pictures(336, mode, **CLIP)(Image.new("RGB", (1, 900_000)))
        with pytest.raises(PictureError, match=r"x\.png: 1 x 900000 pixels are too narrow"):
            Pictures(336, mode, **CLIP)(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "YCbCr", "F", "I"])
def test_kinds_of_pictures(mode, tmp_path):
    """As the reference's `convert("RGB")`."""
    source = noise(9, 7).convert(mode)
    path = tmp_path / ("x.tiff" if mode in ("CMYK", "F", "I", "YCbCr") else "x.png")
    source.save(path)
    opened = open_picture(path)
    with Image.open(path) as again:
        assert again.mode == mode
        assert (opened.mode, opened.size) == ("RGB", (9, 7))
        assert opened.tobytes() == again.convert("RGB").tobytes()
    assert open_picture(path.read_bytes()).tobytes() == opened.tobytes()


RAMP = np.array([[0, 255, 256, 1000, 30000, 65535]], np.uint16)


@pytest.mark.parametrize(
    ("values", "file", "mode"),
    [
        (RAMP, "x.png", "I;16"),
        (RAMP, "x.tiff", "I;16"),
        (RAMP.astype(">u2"), "x.tiff", "I;16B"),
        (RAMP.astype(np.int32), "x.tiff", "I"),
        (RAMP, "x.pgm", "I"),
        ((RAMP / 65535).astype(np.float32), "x.tiff", "F"),
        (RAMP.astype(np.float32), "x.tiff", "F"),
    ],
)
def test_deep_grey_is_scaled(values, file, mode, tmp_path):
    """0 to 65535 is 0 to 255, half is half. By Pillow's `convert`, which the reference uses, all but the first would be white (of
    floats from 0 to 1 all black): a picture of no more use than a blank one."""
    Image.fromarray(values).save(tmp_path / file)
    with Image.open(tmp_path / file) as again:
        assert again.mode == mode and len(set(again.convert("L").tobytes())) <= 2
    opened = np.asarray(open_picture(tmp_path / file))
    assert opened.shape == (1, 6, 3) and (opened == opened[..., :1]).all()
    assert opened[0, :, 0].tolist() == [0, 1, 1, 4, 117, 255]


def test_very_deep_grey(tmp_path):
    Image.fromarray(np.array([[0, -5, 2**30, 2**31 - 1]], np.int32)).save(tmp_path / "x.tiff")
    assert np.asarray(open_picture(tmp_path / "x.tiff"))[0, :, 0].tolist() == [0, 0, 128, 255]
    Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)).save(tmp_path / "y.tiff")
    assert np.asarray(open_picture(tmp_path / "y.tiff"))[0, :, 0].tolist() == [0, 255, 0, 128], "of floats from 0 to 1"


def test_cmyk_of_a_camera(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    assert open_picture(tmp_path / "x.jpg").getpixel((4, 4)) == (255, 0, 0)


def test_transparency_is_ignored(tmp_path):
    """As the reference: what lies under it shows."""
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert open_picture(tmp_path / "x.png").getpixel((1, 1)) == (10, 20, 30)


def test_the_cameras_orientation_is_ignored(tmp_path):
    """As the reference, which never looks at EXIF: a photograph taken upright may lie on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    noise(16, 8).save(tmp_path / "x.jpg", exif=exif)
    assert open_picture(tmp_path / "x.jpg").size == (16, 8)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(kind, tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"x.{kind}", save_all=True, append_images=frames[1:], **lossless)
    with Image.open(tmp_path / f"x.{kind}") as again:
        assert again.n_frames == 2
    assert open_picture(tmp_path / f"x.{kind}").getpixel((2, 2)) == (255, 0, 0)


def png_that_claims(width, height):
    """A few bytes of PNG whose header claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named_with_their_reason(tmp_path):
    path = tmp_path / "x.png"

    def expect(reason, content=None, **options):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PictureError, match=rf"x\.png: {reason}"):
            open_picture(path, **options)

    expect("there is no such file")
    expect("the file is empty", b"")
    expect("this is not a picture", b"<html>404</html>")
    noise(64, 64).save(path)
    whole = path.read_bytes()
    expect("damaged or cut off", whole[: len(whole) // 2])
    expect("damaged or cut off|this is not a picture", whole[:60] + bytes(40) + whole[100:])
    expect(r"64 x 64 pixels are more than the limit of 4,000", whole, max_pixels=4000)
    expect(r"8000 x 8000 pixels are more than the limit of 50,000,000", png_that_claims(8000, 8000))
    expect("too large", png_that_claims(60_000, 60_000))
    expect(r"damaged or cut off|the picture has no pixels|this is not a picture", png_that_claims(0, 8))
    noise(64, 64).save(tmp_path / "y.jpg")
    cut = (tmp_path / "y.jpg").read_bytes()[:900]
    expect("damaged or cut off", cut)
    with pytest.raises(PictureError, match=r"cannot be read \(Is a directory\)"):
        open_picture(tmp_path)
    with pytest.raises(PictureError, match="the picture: this is not a picture"):
        open_picture(b"nothing")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_raises_nothing_else(data):
    whole = (REFERENCE / "images/img2.png").read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + data.draw(st.binary(max_size=20)) + whole[at + data.draw(st.integers(0, 30)) :]
    with contextlib.suppress(PictureError):
        assert open_picture(damaged).mode == "RGB"


def test_wrong_settings_are_said():
    with pytest.raises(ValueError, match="no picture mode 'crop'; there are square, pad, letterbox"):
        Pictures(336, "crop", **CLIP)
    with pytest.raises(ValueError, match="positive side"):
        Pictures(0, "pad", **CLIP)
