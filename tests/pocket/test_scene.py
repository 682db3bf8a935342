"""Scenes: layout, round trip, distinct content, the words of cells."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from mvlm.pocket.objects import KINDS
from mvlm.pocket.questions import counted
from mvlm.pocket.scene import (
    BACKDROPS,
    COLOURS,
    LETTER_SHARE,
    PLACES,
    POSTER,
    SIDES,
    STYLES,
    WORDS,
    Background,
    Item,
    Scene,
    Sign,
    cell_words,
    letters_width,
    sample_scene,
)

SCENES = [sample_scene(0, number) for number in range(1500)]


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_same_seed_same_scene():
    assert [sample_scene(0, number) for number in range(50)] == SCENES[:50]
    assert sample_scene(1, 0) != SCENES[0]


def test_json_round_trip():
    for scene in SCENES[:200]:
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_layout():
    for scene in SCENES:
        assert all(SIDES[0] <= side <= SIDES[1] for side in (scene.width, scene.height))
        assert 1 <= len(scene.items) <= 5 and len(scene.signs) <= 2
        boxes = [thing.box for thing in (*scene.items, *scene.signs)]
        assert all(0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height for x0, y0, x1, y1 in boxes)
        assert not any(overlap(a, b) for k, a in enumerate(boxes) for b in boxes[:k])
        assert len({item.cell for item in scene.items}) == len(scene.items)  # "at the top left" means one object


def test_every_object_is_inside_the_cell_it_names():
    for scene in SCENES:
        for item in scene.items:
            x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
            assert int(y * 3 / scene.height) * 3 + int(x * 3 / scene.width) == item.cell


def test_paint_differs_from_the_background():
    for scene in SCENES:
        colours = [item.colour for item in scene.items] + [sign.colour for sign in scene.signs]
        assert scene.background.name not in colours
        assert (
            len({sign.colour for sign in scene.signs}) == len({sign.word for sign in scene.signs}) == len(scene.signs)
        )


def test_large_is_clearly_larger():
    """The two sizes are 1.6 apart, measured in shares of the picture's shorter side; rounding to pixels takes less."""
    sides = {
        (item.kind, item.size): (item.box[2] - item.box[0]) / min(scene.width, scene.height)
        for scene in SCENES
        if scene.style != POSTER
        for item in scene.items
    }
    both = [kind for kind in KINDS if {(kind, "small"), (kind, "large")} <= set(sides)]
    assert len(both) > 33
    assert all(sides[kind, "large"] > 1.4 * sides[kind, "small"] for kind in both)


def test_letters_are_readable_and_fit():
    """At least 30 px high once the longer side is 336, the board wider than its word."""
    assert LETTER_SHARE * 336 >= 30
    for scene in SCENES:
        capital = LETTER_SHARE * max(scene.width, scene.height)
        for sign in scene.signs:
            assert sign.box[2] - sign.box[0] > capital * letters_width(sign.word)
            assert sign.box[3] - sign.box[1] > 1.5 * capital


def test_everything_occurs_evenly():
    """Backgrounds and colours: no value is twice as frequent as another (1,500 scenes give each value at least 60 draws,
    whose standard deviation is 13 %). Cells: the center, which most signs cross, stays within 2.5 times."""
    assert {scene.style for scene in SCENES} == set(STYLES)
    places = Counter(scene.background.name for scene in SCENES)
    assert set(places) == {*BACKDROPS, *PLACES}
    ordinary = [scene for scene in SCENES if scene.style != POSTER]
    for values in (
        [s.background.name for s in ordinary if s.background.is_place],
        [s.background.name for s in ordinary if not s.background.is_place],
        [item.colour for s in ordinary for item in s.items if item.colour],
    ):
        counts = Counter(values)
        assert max(counts.values()) < 2 * min(counts.values()), counts
    cells = Counter(item.cell for s in ordinary for item in s.items)
    assert max(cells.values()) < 2.5 * min(cells.values()), cells
    assert {item.kind for s in SCENES for item in s.items} == set(KINDS)
    assert {sign.word for s in SCENES for sign in s.signs} == set(WORDS)


def test_asked_numbers_are_uniform():
    """1 to 4 of the counted kind, each a quarter, though most groups are of one (4 sigma of some 700 draws is 6.5 %)."""
    rng = random.Random(0)
    asked = [(scene, counted(scene, rng)) for scene in SCENES]
    sizes = Counter(scene.count(kind) for scene, kind in asked if kind)
    assert sizes.total() > 600
    assert all(abs(sizes[n] / sizes.total() - 0.25) < 0.065 for n in (1, 2, 3, 4)), sizes


def test_avoid():
    taken = {SCENES[3].content}
    assert sample_scene(0, 3, avoid=taken).content not in taken
    with pytest.raises(ValueError, match="fewer scenes"):
        sample_scene(0, 3, avoid=_Everything())


class _Everything(frozenset):
    def __contains__(self, content):
        return True


def test_words_name_no_object_or_place():
    assert not set(WORDS) & {*KINDS, *(kind.plural for kind in KINDS.values()), *BACKDROPS, *PLACES}


def test_cell_words_by_hand():
    """A 200 x 100 picture in a 400 x 400 square: scaled by 2, 100 px of padding above and below; 100 px cells."""
    scene = Scene(
        0,
        200,
        100,
        "scene",
        Background("blue", "plain", 0),
        (Item("dog", "red", "large", 0, (0, 0, 50, 45)), Item("cat", None, "small", 8, (160, 60, 200, 100))),
        (Sign("stop", "green", (50, 0, 150, 28)),),
    )
    assert cell_words(scene, 4, 400) == [
        *([""] * 4),
        *["red dog", "green stop", "green stop", "blue"],
        *["blue", "blue", "blue", "cat"],
        *([""] * 4),
    ]


def test_cell_words_match_the_cell_under_each_centre():
    """A second way: on a grid as fine as pixels, the cell at a box's centre names the box."""
    for scene in SCENES[:15]:
        side = 112
        words = cell_words(scene, side, 336)
        assert len(words) == side * side
        scale = 336 / max(scene.width, scene.height)
        left, top = (336 - scene.width * scale) / 2, (336 - scene.height * scale) / 2
        for thing in (*scene.items, *scene.signs):
            x = (thing.box[0] + thing.box[2]) / 2 * scale + left
            y = (thing.box[1] + thing.box[3]) / 2 * scale + top
            expected = thing.phrase if isinstance(thing, Item) else f"{thing.colour} {thing.word}"
            assert words[int(y / 3) * side + int(x / 3)] == expected
        corners = "" if scene.width != scene.height else None
        assert corners is None or words[0] == words[-1] == corners


def test_colours_are_named_once():
    assert set(COLOURS) < set(BACKDROPS) and not set(BACKDROPS) & set(PLACES)
