"""Scene -> RGB picture, the same pixels every time.

The objects are OpenMoji pictures (CC BY-SA 4.0) rendered by resvg once a kind and colour and kept in memory; a white
outline keeps their black lines readable on dark backgrounds. Backgrounds, signs and frames are drawn here.
"""

from __future__ import annotations

import colorsys
import io
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .objects import KINDS
from .scene import BACKDROPS, COLOURS, FRAME_SHARE, LETTER_SHARE, PAINTING, POSTER, Background, Scene, Sign

RGB = tuple[int, int, int]

SPRITE = 160
"""Longer side of a stored sprite's ink, px; scenes show it at 45 to 230 px."""

OUTLINE = 5
"""Width of a stored sprite's white outline, px."""

_HEX = re.compile(r'((?:fill|stroke|stop-color)=")(#[0-9a-fA-F]{3,6})(?=")')


def _rgb(text: str) -> RGB:
    digits = text[1:] if len(text) == 7 else "".join(c * 2 for c in text[1:])
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def _luma(rgb: RGB) -> float:
    return (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    """`share` of b in a."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def _darker(rgb: RGB, share: float) -> RGB:
    return _mix(rgb, (0, 0, 0), share)


def _lighter(rgb: RGB, share: float) -> RGB:
    return _mix(rgb, (255, 255, 255), share)


def repaint(svg: str, colour: RGB, main: RGB) -> str:
    """The SVG with every fill but the near-black ones in shades of one colour.

    The fill `main` becomes the colour itself; lighter and darker fills stay lighter and darker, by half, so that an
    orange object never turns brown nor a red one pink.
    """

    def shade(match: re.Match[str]) -> str:
        old = _rgb(match[2])
        if _luma(old) < 0.27:
            return match[0]
        delta = _luma(old) - _luma(main)
        new = _lighter(colour, min(0.45, delta)) if delta > 0 else _darker(colour, min(0.22, -0.6 * delta))
        return match[1] + "#{:02x}{:02x}{:02x}".format(*new)

    return _HEX.sub(shade, svg)


class Sprites:
    """The objects' pictures, from a folder of OpenMoji SVG files named by codepoint.

    Raises:
        ValueError: a file is missing from the folder.
    """

    def __init__(self, svg: Path) -> None:
        self.svg = Path(svg)
        self._main: dict[str, RGB] = {}
        self._kept: dict[tuple[str, str | None], Image.Image] = {}
        missing = [k.codepoint for k in KINDS.values() if not (self.svg / f"{k.codepoint}.svg").is_file()]
        if missing:
            raise ValueError(
                f"{self.svg} lacks {len(missing)} of {len(KINDS)} OpenMoji files (first: {missing[0]}.svg); "
                "give the folder that holds the package's openmoji/svg files"
            )

    def get(self, kind: str, colour: str | None) -> Image.Image:
        """RGBA, its ink within a margin of OUTLINE px on every side."""
        key = (kind, colour)
        if key not in self._kept:
            self._kept[key] = self._render(kind, colour)
        return self._kept[key]

    def _render(self, kind: str, colour: str | None) -> Image.Image:
        text = (self.svg / f"{KINDS[kind].codepoint}.svg").read_text(encoding="utf-8")
        if colour:
            if kind not in self._main:
                self._main[kind] = _main_fill(text)
            text = repaint(text, COLOURS[colour], self._main[kind])
        full = _rasterise(text, round(1.5 * SPRITE))
        ink = full.crop(full.getchannel("A").point(lambda v: 255 * (v > 32)).getbbox())
        scale = SPRITE / max(ink.size)
        ink = ink.resize(
            (max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS
        )
        sprite = Image.new("RGBA", (ink.width + 2 * OUTLINE, ink.height + 2 * OUTLINE), (255, 255, 255, 0))
        alpha = Image.new("L", sprite.size)
        alpha.paste(ink.getchannel("A"), (OUTLINE, OUTLINE))
        halo = alpha.filter(ImageFilter.GaussianBlur(0.5 * OUTLINE)).point(lambda v: min(255, 8 * v))
        sprite.putalpha(halo)
        sprite.alpha_composite(ink, (OUTLINE, OUTLINE))
        return sprite


def _main_fill(text: str) -> RGB:
    """The fill that covers most of the picture, near-black apart."""
    fills = {_rgb(m[2]) for m in _HEX.finditer(text)}
    pixels = np.asarray(_rasterise(text, 72))
    counts = Counter(map(tuple, pixels[pixels[..., 3] == 255][:, :3].tolist()))
    return max((f for f in fills if _luma(f) >= 0.27), key=lambda f: (counts[f], f))


def _rasterise(svg: str, width: int) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def draw(scene: Scene, sprites: Sprites) -> Image.Image:
    """The scene as an RGB picture of scene.width x scene.height px."""
    image = _background(scene.background, scene.width, scene.height)
    if scene.style == POSTER:
        _poster_border(image)
    for sign in scene.signs:
        _sign(image, sign, LETTER_SHARE * max(image.size))
    for item in scene.items:
        x0, y0, x1, y1 = item.box
        sprite = sprites.get(item.kind, item.colour)
        ink = (sprite.width - 2 * OUTLINE, sprite.height - 2 * OUTLINE)
        sx, sy = (x1 - x0) / ink[0], (y1 - y0) / ink[1]
        mx, my = round(OUTLINE * sx), round(OUTLINE * sy)
        fitted = sprite.resize((x1 - x0 + 2 * mx, y1 - y0 + 2 * my), Image.Resampling.BILINEAR)
        image.paste(fitted, (x0 - mx, y0 - my), fitted)
    if scene.style == PAINTING:
        _frame(image, random.Random(scene.background.texture))
    return image


# -- signs, frames, posters


def _sign(image: Image.Image, sign: Sign, capital: float) -> None:
    pen = ImageDraw.Draw(image)
    x0, y0, x1, y1 = sign.box
    colour = COLOURS[sign.colour]
    ink = (20, 20, 20) if _luma(colour) > 0.55 else (255, 255, 255)
    border = max(2, round(capital / 12))
    pen.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), round(capital / 4), colour, ink, border)
    font = _font(capital)
    stroke = max(1, round(capital / 36))
    pen.text(
        ((x0 + x1) / 2, (y0 + y1) / 2), sign.word.upper(), ink, font, anchor="mm", stroke_width=stroke, stroke_fill=ink
    )


_FONTS: dict[int, ImageFont.FreeTypeFont] = {}


def _font(capital: float) -> ImageFont.FreeTypeFont:
    """PIL's own font at the size that makes a capital `capital` px high."""
    key = round(capital)
    if key not in _FONTS:
        _, top, _, bottom = ImageFont.load_default(200).getbbox("H")
        _FONTS[key] = ImageFont.load_default(key * 200 / (bottom - top))
    return _FONTS[key]


def _poster_border(image: Image.Image) -> None:
    pen, width = ImageDraw.Draw(image), round(0.025 * image.width)
    pen.rectangle((0, 0, image.width - 1, image.height - 1), None, (255, 255, 255), width)
    pen.rectangle((width, width, image.width - 1 - width, image.height - 1 - width), None, (30, 30, 30), 2)


def _frame(image: Image.Image, rng: random.Random) -> None:
    """A wooden or gilded frame over the picture's border."""
    wood = rng.choice(((120, 78, 40), (88, 54, 30), (196, 156, 66)))
    pen, total = ImageDraw.Draw(image), round(FRAME_SHARE * min(image.size))
    for i in range(total):
        depth = abs(2 * i / total - 1)  # 1 at both edges, 0 in the middle of the moulding
        tone = _lighter(wood, 0.35 * (1 - depth)) if i < total - 2 else (25, 18, 12)
        pen.rectangle((i, i, image.width - 1 - i, image.height - 1 - i), None, tone, 1)


# -- backgrounds


def _background(background: Background, width: int, height: int) -> Image.Image:
    rng = random.Random(background.texture)
    if background.is_place:
        image = Image.new("RGB", (width, height))
        _PLACES[background.name](ImageDraw.Draw(image), image, width, height, rng)
        return image
    return _PATTERNS[background.pattern](_vary(BACKDROPS[background.name], rng), width, height, rng)


def _vary(rgb: RGB, rng: random.Random) -> RGB:
    """A neighbour of the colour, still nearest to its own name."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(v / 255 for v in rgb))
    hue += rng.uniform(-0.008, 0.008)
    lightness = min(0.9, max(0.1, lightness + rng.uniform(-0.035, 0.035)))
    return tuple(round(255 * v) for v in colorsys.hls_to_rgb(hue % 1, lightness, saturation))


def _two_tones(rgb: RGB) -> tuple[RGB, RGB]:
    return rgb, _lighter(rgb, 0.18) if _luma(rgb) < 0.6 else _darker(rgb, 0.08)


def _plain(rgb: RGB, width: int, height: int, rng: random.Random) -> Image.Image:
    return Image.new("RGB", (width, height), rgb)


def _gradient(rgb: RGB, width: int, height: int, rng: random.Random) -> Image.Image:
    light, dark = _lighter(rgb, 0.12), _darker(rgb, 0.1)
    if rng.random() < 0.5:
        light, dark = dark, light
    ramp = np.linspace(light, dark, height).round().astype(np.uint8)
    return Image.fromarray(np.repeat(ramp[:, None], width, axis=1))


def _stripes(rgb: RGB, width: int, height: int, rng: random.Random) -> Image.Image:
    one, two = _two_tones(rgb)
    step, slope = rng.randint(14, 34), rng.choice((0, 1, -1))
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    upright = rng.random() < 0.5
    phase = x + slope * y if upright or slope else y + 0 * x
    return _pick((phase // step) % 2 + 0 * y, one, two)


def _checks(rgb: RGB, width: int, height: int, rng: random.Random) -> Image.Image:
    step = rng.randint(18, 42)
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    return _pick((x // step + y // step) % 2, *_two_tones(rgb))


def _dots(rgb: RGB, width: int, height: int, rng: random.Random) -> Image.Image:
    step = rng.randint(26, 46)
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    dx = (x + (y // step % 2) * (step // 2)) % step - step / 2
    dy = y % step - step / 2
    return _pick((dx * dx + dy * dy < (0.24 * step) ** 2).astype(int), *_two_tones(rgb))


def _noise(rgb: RGB, width: int, height: int, rng: random.Random) -> Image.Image:
    grain = np.random.default_rng(rng.randrange(2**31)).integers(-14, 15, (height // 4, width // 4, 1))
    coarse = np.clip(np.asarray(rgb) + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def _pick(mask: np.ndarray, one: RGB, two: RGB) -> Image.Image:
    return Image.fromarray(np.asarray((one, two), dtype=np.uint8)[mask])


_PATTERNS = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "noise": _noise,
}


def _fill(pen: ImageDraw.ImageDraw, width: int, y0: float, y1: float, top: RGB, bottom: RGB) -> None:
    """Rows from y0 to y1, blended from one colour to another in bands of 4 px."""
    y0, y1 = round(y0), round(y1)
    for y in range(y0, y1, 4):
        pen.rectangle((0, y, width, min(y + 3, y1)), _mix(top, bottom, (y - y0) / max(1, y1 - y0)))


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), colour)


def _clouds(pen: ImageDraw.ImageDraw, w: int, h: float, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        x, y, r = rng.uniform(0, w), rng.uniform(0.15 * h, 0.7 * h), rng.uniform(0.1, 0.17) * h
        for dx in (-1.4, -0.5, 0.5, 1.4):
            _disc(pen, x + dx * r, y - (abs(dx) < 1) * 0.4 * r, r, (250, 252, 255))


def _hills(
    pen: ImageDraw.ImageDraw, w: int, h: int, y: float, rise: float, colour: RGB, rng: random.Random, waves: float
) -> None:
    """A filled rolling line around height y."""
    phase = rng.uniform(0, 6.28)
    xs = range(0, w + 8, 8)
    line = [(x, y - rise * np.sin(phase + waves * 6.28 * x / w)) for x in xs]
    pen.polygon([(0, h), *line, (w, h)], colour)


def _beach(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, 0.34 * h, (120, 200, 245), (205, 236, 252))
    _clouds(pen, w, 0.34 * h, rng)
    _fill(pen, w, 0.34 * h, 0.6 * h, (30, 140, 190), (70, 195, 210))
    _hills(pen, w, h, 0.57 * h, 0.015 * h, (250, 250, 245), rng, 1.5)
    _hills(pen, w, h, 0.6 * h, 0.02 * h, (240, 214, 150), rng, 1.5)
    for _ in range(90):
        x, y = rng.uniform(0, w), rng.uniform(0.66 * h, h)
        pen.point((x, y), (205, 175, 110))
        _disc(pen, x, y, 1, (214, 186, 122))


def _meadow(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, 0.45 * h, (150, 210, 250), (225, 243, 255))
    _clouds(pen, w, 0.38 * h, rng)
    for y, colour in ((0.36, (150, 205, 110)), (0.5, (120, 190, 85)), (0.68, (98, 172, 66))):
        _hills(pen, w, h, y * h, 0.05 * h, colour, rng, rng.uniform(0.6, 1.2))
    for _ in range(70):
        x, y, tall = rng.uniform(0, w), rng.uniform(0.5 * h, h), rng.uniform(4, 8)
        pen.line((x, y, x - 2, y - tall), (70, 140, 50))
        pen.line((x, y, x + 2, y - tall), (70, 140, 50))


def _night(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, h, (8, 12, 40), (30, 34, 84))
    for _ in range(w * h // 900):
        _disc(
            pen,
            rng.uniform(0, w),
            rng.uniform(0, h),
            rng.choice((0.6, 0.8, 1.4)),
            rng.choice(((255, 255, 255), (255, 240, 190))),
        )
    x, y, r = rng.uniform(0.15, 0.85) * w, rng.uniform(0.12, 0.2) * h, 0.08 * min(w, h)
    _disc(pen, x, y, r, (250, 244, 205))
    _disc(pen, x + 0.3 * r, y - 0.2 * r, 0.2 * r, (232, 224, 180))  # a full moon: a crescent looks like a banana


def _desert(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, 0.5 * h, (250, 214, 150), (255, 240, 205))
    _disc(pen, rng.uniform(0.15, 0.85) * w, 0.14 * h, 0.08 * min(w, h), (255, 250, 225))
    for y, colour in ((0.42, (226, 170, 96)), (0.58, (214, 150, 74)), (0.76, (200, 132, 60))):
        _hills(pen, w, h, y * h, 0.06 * h, colour, rng, rng.uniform(0.5, 1.0))


def _snow(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, 0.5 * h, (178, 196, 214), (214, 224, 234))
    for y, colour in ((0.42, (226, 234, 242)), (0.6, (242, 246, 250))):
        _hills(pen, w, h, y * h, 0.05 * h, colour, rng, rng.uniform(0.5, 1.0))
    for _ in range(w * h // 700):
        _disc(pen, rng.uniform(0, w), rng.uniform(0, h), rng.choice((1.2, 1.8, 2.4)), (255, 255, 255))


def _sea(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, 0.2 * h, (170, 220, 245), (220, 240, 250))
    _fill(pen, w, 0.2 * h, h, (40, 135, 175), (12, 70, 120))
    for row in np.arange(0.27, 1.0, 0.09):
        offset = rng.uniform(0, 40)
        for x in np.arange(-40 + offset, w, 40):
            pen.arc((x, row * h - 6, x + 20, row * h + 6), 200, 340, (150, 210, 230), 2)


def _street(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, 0.6 * h, (200, 214, 224), (226, 232, 236))
    x = -rng.uniform(0, 30)
    while x < w:
        wide, top = rng.uniform(50, 90), rng.uniform(0.06, 0.3) * h
        wall = rng.choice(((172, 122, 104), (150, 140, 132), (190, 172, 142), (128, 134, 148)))
        pen.rectangle((x, top, x + wide, 0.66 * h), wall)
        for wy in np.arange(top + 8, 0.58 * h, 22):
            for wx in np.arange(x + 8, x + wide - 12, 20):
                pen.rectangle((wx, wy, wx + 9, wy + 12), (232, 226, 190))
        x += wide + 2
    pen.rectangle((0, 0.64 * h, w, 0.7 * h), (178, 176, 170))
    pen.rectangle((0, 0.7 * h, w, h), (84, 86, 92))
    for x in range(rng.randint(-40, 0), w, 60):
        pen.rectangle((x, 0.835 * h, x + 32, 0.855 * h), (240, 240, 235))


def _forest(pen: ImageDraw.ImageDraw, image: Image.Image, w: int, h: int, rng: random.Random) -> None:
    _fill(pen, w, 0, h, (176, 206, 176), (60, 92, 56))
    for base, colour, tall in ((0.62, (92, 136, 96), 0.5), (0.82, (56, 104, 66), 0.6), (1.02, (34, 76, 46), 0.55)):
        x = -rng.uniform(0, 30)
        while x < w + 30:
            half, top = rng.uniform(18, 30), (base - tall * rng.uniform(0.75, 1)) * h
            pen.rectangle((x - 3, base * h - 20, x + 3, base * h), (74, 52, 34))
            for share in (0.0, 0.25, 0.5):
                y = top + share * (base * h - 14 - top)
                pen.polygon(
                    [
                        (x, y),
                        (x - half * (0.5 + share), y + 0.42 * (base * h - top)),
                        (x + half * (0.5 + share), y + 0.42 * (base * h - top)),
                    ],
                    colour,
                )
            x += rng.uniform(30, 52)


_PLACES = {
    "beach": _beach,
    "meadow": _meadow,
    "night sky": _night,
    "desert": _desert,
    "snow": _snow,
    "sea": _sea,
    "street": _street,
    "forest": _forest,
}
