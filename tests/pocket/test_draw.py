"""Pictures: the same every time, and showing what the scene says."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest

from mvlm.pocket import shapes
from mvlm.pocket.draw import OUTLINE, Sprites, draw, repaint
from mvlm.pocket.objects import KINDS
from mvlm.pocket.scene import (
    BACKDROPS,
    COLOURS,
    PAINTING,
    PATTERNS,
    PLACES,
    PLAIN_STYLE,
    POSTER,
    Background,
    Scene,
    sample_scene,
)

CACHE = Path(os.environ.get("MVLM_CACHE") or Path(__file__).parents[2] / "cache")


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return Sprites(shapes.folder(tmp_path_factory.mktemp("shapes")))


@pytest.fixture(scope="module")
def openmoji():
    folder = CACHE / "pocket" / "openmoji" / "svg"
    if not folder.is_dir():
        pytest.skip(f"OpenMoji is not in {CACHE}: `python -m mvlm.pocket.parts openmoji` fetches it")
    return Sprites(folder)


def nearest(pixels: np.ndarray, colours: dict[str, tuple[int, int, int]]) -> list[str]:
    """The name of the colour at the least distance in RGB, for each of (n, 3) pixels."""
    table = np.asarray(list(colours.values()), dtype=float)
    distance = np.linalg.norm(pixels[:, None].astype(float) - table, axis=-1)
    return [list(colours)[k] for k in distance.argmin(1)]


def empty(name: str, pattern: str = "plain", texture: int = 0) -> Scene:
    return Scene(0, 320, 240, PLAIN_STYLE, Background(name, pattern, texture), (), ())


def test_same_scene_same_bytes(sprites):
    again = Sprites(sprites.svg)
    for number in range(20):
        scene = sample_scene(0, number)
        one, two = draw(scene, sprites), draw(scene, again)
        assert one.size == (scene.width, scene.height) and one.mode == "RGB"
        assert one.tobytes() == two.tobytes()
        files = [io.BytesIO(), io.BytesIO()]
        for file in files:
            one.save(file, "JPEG", quality=90)
        assert files[0].getvalue() == files[1].getvalue()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", BACKDROPS)
def test_plain_backgrounds_have_their_named_colour(sprites, name, pattern):
    """Every pixel of every pattern is nearest to the background's own name."""
    for texture in range(3):
        pixels = np.asarray(draw(empty(name, pattern, texture), sprites)).reshape(-1, 3)[::37]
        assert set(nearest(pixels, BACKDROPS)) == {name}


def test_places_look_different(sprites):
    """Mean colours of the upper and lower half of each place, over 5 textures, are pairwise apart by more than 25 of
    255 and further than a place is from itself."""
    looks = {}
    for place in PLACES:
        pictures = [np.asarray(draw(empty(place, texture=t), sprites), dtype=float) for t in range(5)]
        looks[place] = np.stack([[p[:120].mean((0, 1)), p[120:].mean((0, 1))] for p in pictures])
    for one in PLACES:
        spread = np.abs(looks[one] - looks[one].mean(0)).max()
        for two in PLACES:
            if one != two:
                apart = np.abs(looks[one].mean(0) - looks[two].mean(0)).max()
                assert apart > max(25, spread), (one, two, apart, spread)


def test_boxes_hold_their_objects(sprites):
    """Against the same scene without objects: every box has changed, and outside the boxes (plus the white outline)
    nothing has."""
    for number in range(40):
        scene = sample_scene(0, number)
        bare = Scene(**{**vars(scene), "items": (), "signs": ()})
        changed = np.any(np.asarray(draw(scene, sprites)) != np.asarray(draw(bare, sprites)), axis=-1)
        margin = np.zeros_like(changed)
        for thing in (*scene.items, *scene.signs):
            x0, y0, x1, y1 = thing.box
            assert changed[y0:y1, x0:x1].mean() > 0.2, thing
            around = 1 + round(OUTLINE * max(x1 - x0, y1 - y0) / 140)
            margin[max(0, y0 - around) : y1 + around, max(0, x0 - around) : x1 + around] = True
        if scene.style != POSTER:
            assert not changed[~margin].any()


def test_painted_objects_have_their_named_colour(sprites):
    """At least a tenth of each painted box (stars are thin) is nearest to the colour's name."""
    seen = set()
    for number in range(60):
        scene = sample_scene(0, number)
        picture = np.asarray(draw(scene, sprites))
        for item in scene.items:
            if item.colour and scene.style != PAINTING:
                x0, y0, x1, y1 = item.box
                pixels = picture[y0:y1, x0:x1].reshape(-1, 3)
                names = nearest(pixels, {**COLOURS, "white": (255, 255, 255), "black": (0, 0, 0)})
                share = names.count(item.colour) / len(names)
                assert share > 0.1, (item, share)
                seen.add(item.colour)
    assert seen == set(COLOURS)


def test_repaint_keeps_lines_and_order():
    svg = '<path fill="#f4aa41"/><path fill="#e27022" stroke="#000"/><path fill="#3f3f3f"/><path fill="none"/>'
    painted = repaint(svg, (40, 90, 220), (0xF4, 0xAA, 0x41))
    assert 'fill="#285adc"' in painted  # the main fill becomes the colour itself
    assert 'stroke="#000"' in painted and 'fill="#3f3f3f"' in painted and 'fill="none"' in painted
    assert "#e27022" not in painted and "#f4aa41" not in painted


def test_missing_drawings_are_named(tmp_path):
    with pytest.raises(ValueError, match=rf"lacks {len(KINDS)} of {len(KINDS)} OpenMoji files \(first: 1F415.svg\)"):
        Sprites(tmp_path)


@pytest.mark.pocket
def test_openmoji_has_the_table_s_proportions(openmoji):
    """2 %: the table has two decimals, the sprite is at most 160 px."""
    for kind in KINDS.values():
        sprite = openmoji.get(kind.name, None)
        aspect = (sprite.width - 2 * OUTLINE) / (sprite.height - 2 * OUTLINE)
        assert aspect == pytest.approx(kind.aspect, rel=0.02), kind


@pytest.mark.pocket
def test_openmoji_painted_is_mostly_that_colour(openmoji):
    """Of the pixels that are not black lines, dark parts or white outline, most are nearest to the named colour."""
    neutral = {"white": (255, 255, 255), "black": (0, 0, 0), "dark": (63, 63, 63)}
    table = {**COLOURS, **neutral}
    for number, kind in enumerate(k for k in KINDS.values() if k.paintable):
        for colour in list(COLOURS)[number % 3 :: 3]:  # every kind in two colours
            pixels = np.asarray(openmoji.get(kind.name, colour)).reshape(-1, 4)[::7]
            names = [n for n in nearest(pixels[pixels[:, 3] == 255][:, :3], table) if n not in neutral]
            assert names.count(colour) > 0.5 * len(names) > 0, (kind.name, colour)
