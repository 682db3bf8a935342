"""Plain shapes under OpenMoji's file names: the generated world without its download, for the `nano` corpus.

Each kind of object gets one of twelve outlines, its own width over height and its own hue. What is asked and answered
about it stays the same. Objects that a scene paints can look alike, so this world is for tests, not for scores.
"""

from __future__ import annotations

import colorsys
import math
import os
from pathlib import Path

from mvlm.pocket.objects import KINDS, Kind


def folder(root: str | Path) -> Path:
    """Write `root`/nano/svg/<codepoint>.svg for every kind and return the folder, to be taken for OpenMoji's."""
    svg = Path(root) / "nano" / "svg"
    svg.mkdir(parents=True, exist_ok=True)
    for index, kind in enumerate(KINDS.values()):
        aside = svg / f".{kind.codepoint}.{os.getpid()}"
        aside.write_text(shape(kind, index), encoding="utf-8")
        aside.replace(svg / f"{kind.codepoint}.svg")  # several processes may be here at once
    return svg


def shape(kind: Kind, index: int) -> str:
    """A polygon or a star of 3 to 8 points, stretched to the kind's width over height, on OpenMoji's 72 x 72 canvas."""
    points, notch = 3 + index % 6, (1.0, 0.45)[index // 6 % 2]
    corners = [
        ((1.0, notch)[k % 2] * math.sin(math.pi * k / points), -(1.0, notch)[k % 2] * math.cos(math.pi * k / points))
        for k in range(2 * points)
        if k % 2 == 0 or notch < 1
    ]
    xs, ys = zip(*corners, strict=True)
    width, height = (60, 60 / kind.aspect) if kind.aspect > 1 else (60 * kind.aspect, 60)
    ink = " ".join(
        f"{36 + width * ((x - min(xs)) / (max(xs) - min(xs)) - 0.5):.2f},"
        f"{36 + height * ((y - min(ys)) / (max(ys) - min(ys)) - 0.5):.2f}"
        for x, y in corners
    )
    # Never near-black: the generator repaints every lighter fill and keeps the dark ones as outlines.
    red, green, blue = (round(255 * v) for v in colorsys.hls_to_rgb(index / len(KINDS), 0.6, 0.7))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        f'<polygon points="{ink}" fill="#{red:02x}{green:02x}{blue:02x}" stroke="#000000" stroke-width="2" '
        'stroke-linejoin="round"/></svg>\n'
    )
