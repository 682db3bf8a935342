"""What a pocket picture shows, as data: objects, signs, background, each with its place in pixels.

A scene is drawn at random from a seed and is the only truth there is: the picture (`draw.py`) and every question about
it (`questions.py`) are made from it. Scenes of training and evaluation never share their content; see `Scene.content`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from PIL import ImageFont

from .objects import KINDS, Kind

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 42),
    "yellow": (252, 220, 40),
    "green": (52, 168, 70),
    "blue": (44, 98, 214),
}
"""What objects and signs are painted with."""

BACKDROPS: dict[str, tuple[int, int, int]] = {**COLOURS, "pink": (252, 168, 200), "gray": (150, 150, 152)}
"""Colours of plain backgrounds."""

PLACES: dict[str, str] = {
    "beach": "a beach",
    "meadow": "a meadow",
    "night sky": "the night sky",
    "desert": "a desert",
    "snow": "snow",
    "sea": "the sea",
    "street": "a street",
    "forest": "a forest",
}
"""Drawn backgrounds: name and the name with its article."""

PATTERNS = ("plain", "gradient", "stripes", "dots", "checks", "noise")

CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""Names of the 3 x 3 grid's cells, row by row."""

WORDS = ("go", "zoo", "stop", "cafe", "hotel", "school", "library", "hospital")
"""Words printed on signs, in capitals; none is the name of an object or a place."""

SIDES = (224, 448)
"""Shortest and longest side of a picture, px."""

SIZES = {"small": 0.25, "large": 0.40}
"""Side of an object over the picture's shorter side."""

LETTER_SHARE = 32 / 336
"""Height of a sign's capitals over the picture's longer side: about 32 px once the picture is 336 px."""

GROUPS = (58, 14, 14, 14)
"""How often the first kind stands there once, twice, three and four times, in percent."""

POSTER, PAINTING, PLAIN_STYLE = "poster", "painting", "scene"
STYLES = (PLAIN_STYLE, POSTER, PAINTING)
FRAME_SHARE = 0.06
"""Width of a painting's frame over the shorter side."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, x1 and y1 exclusive."""


@dataclass(frozen=True)
class Item:
    """One object. `colour` None means the picture's own colours, which have no name and are never asked about."""

    kind: str
    colour: str | None
    size: str
    cell: int
    box: Box

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.kind}" if self.colour else self.kind


@dataclass(frozen=True)
class Sign:
    """A coloured board with a word; no two signs of a scene have the same colour or word."""

    word: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Background:
    """`name` is a colour of BACKDROPS (drawn with a pattern) or a place of PLACES; `texture` seeds its details."""

    name: str
    pattern: str
    texture: int

    @property
    def is_place(self) -> bool:
        return self.name in PLACES


@dataclass(frozen=True)
class Scene:
    """A picture's whole content. Sizes in pixels."""

    id: int
    width: int
    height: int
    style: str
    background: Background
    items: tuple[Item, ...]
    signs: tuple[Sign, ...]

    @property
    def picture(self) -> str:
        """Its file's name."""
        return f"{self.id:08d}.jpg"

    @property
    def content(self) -> tuple:
        """What could be asked about: two scenes of equal content differ only in jitter, pattern and proportions."""
        items = sorted((i.kind, i.colour or "", i.size, i.cell) for i in self.items)
        return self.style, self.background.name, tuple(items), tuple(sorted((s.word, s.colour) for s in self.signs))

    def count(self, kind: str) -> int:
        return sum(item.kind == kind for item in self.items)

    @property
    def kinds(self) -> list[str]:
        """The kinds shown, each once, in drawing order."""
        return list(dict.fromkeys(item.kind for item in self.items))

    @property
    def singles(self) -> list[Item]:
        """Objects that are alone of their kind: only these can be called "the dog"."""
        return [item for item in self.items if self.count(item.kind) == 1]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict) -> Scene:
        return cls(
            **{
                **record,
                "background": Background(**record["background"]),
                "items": tuple(Item(**{**item, "box": tuple(item["box"])}) for item in record["items"]),
                "signs": tuple(Sign(**{**sign, "box": tuple(sign["box"])}) for sign in record["signs"]),
            }
        )


def sample_scene(
    seed: int | str,
    scene_id: int = 0,
    *,
    style: str | None = None,
    place: bool | None = None,
    signs: int | None = None,
    group: int | None = None,
    others: int | None = None,
    first: Sequence[Kind] | None = None,
    avoid: frozenset[tuple] | set[tuple] = frozenset(),
) -> Scene:
    """A scene from a seed; what is left None is drawn at random.

    Args:
        seed: with `scene_id`, decides everything.
        style: one of STYLES.
        place: a place (True) or a plain colour (False) behind.
        signs: number of signs, 0 to 2.
        group: objects of the first kind, 1 to 4.
        others: further objects, each of a kind of its own.
        first: kinds the first kind is drawn from.
        avoid: contents (`Scene.content`) the scene must not have.

    Raises:
        ValueError: 100 drawn scenes all fell among `avoid`: the choices leave too few scenes.
    """
    for attempt in range(100):
        rng = random.Random(f"{seed}/{scene_id}/{attempt}")
        scene = _sample(rng, scene_id, style, place, signs, group, others, first)
        if scene.content not in avoid:
            return scene
    raise ValueError(
        f"100 draws of scene {scene_id} (seed {seed}) all repeat one of {len(avoid)} contents to avoid; "
        "ask for fewer scenes or fix fewer of their properties"
    )


def _sample(
    rng: random.Random,
    scene_id: int,
    style: str | None,
    place: bool | None,
    signs: int | None,
    group: int | None,
    others: int | None,
    first: Sequence[Kind] | None,
) -> Scene:
    style = style or rng.choices(STYLES, (86, 7, 7))[0]
    place = rng.random() < 0.4 if place is None else place
    if style == POSTER:  # one large object and a title
        place, signs, group, others = False, 1, 1, 0
    name = rng.choice(list(PLACES if place else BACKDROPS))
    background = Background(name, rng.choice(PATTERNS), rng.randrange(2**31))
    free = [colour for colour in COLOURS if colour != name]  # paint would vanish on its own colour

    group = rng.choices((1, 2, 3, 4), GROUPS)[0] if group is None else group
    if signs is None:
        signs = rng.choices((0, 1, 2), (50, 27, 23))[0]
    if others is None:
        others = rng.choices((1, 2, 3), (20, 35, 45))[0] if group == 1 else rng.randint(0, 4 - group)
    most = (4 if style == PAINTING else 5) - signs
    others = min(others, max(0, most - group))  # a group stays whole: its number is asked

    repeatable = [k for k in KINDS.values() if k.category != "landmark"]
    leader = rng.choice(list(first) if first else list(KINDS.values()) if group == 1 else repeatable)
    chosen = [leader] * group
    for _ in range(others):
        used = {k.name for k in chosen}
        has_landmark = any(k.category == "landmark" for k in chosen)
        pool = repeatable if has_landmark else list(KINDS.values())
        chosen.append(rng.choice([k for k in pool if k.name not in used]))
    looks = {kind.name: _look(rng, kind, free) for kind in chosen}  # a group shares colour and size
    rng.shuffle(chosen)

    words = rng.sample(WORDS, signs)
    boards = list(zip(words, rng.sample(free, signs), strict=True))
    if style == POSTER:
        return _poster(rng, scene_id, background, chosen[0], looks[chosen[0].name][0], *boards[0])
    for attempt in range(200):
        if attempt % 40 == 39:  # too crowded: let the large ones shrink, but drop nothing, or counts would be biased
            looks = {k: (colour, "small") for k, (colour, _) in looks.items()}
        width, height = _proportions(rng)
        placed = _layout(rng, width, height, style, [(k, *looks[k.name]) for k in chosen], boards)
        if placed:
            return Scene(scene_id, width, height, style, background, *placed)
    raise ValueError(f"scene {scene_id}: {len(chosen)} objects and {signs} signs do not fit; ask for fewer")


def _look(rng: random.Random, kind: Kind, free: list[str]) -> tuple[str | None, str]:
    colour = rng.choice(free) if kind.paintable and rng.random() < 0.65 else None
    return colour, rng.choice(list(SIZES))


def _proportions(rng: random.Random) -> tuple[int, int]:
    """Width and height in px: ratio 2:3 to 3:2 (uniform in its logarithm), sides within SIDES, multiples of 8."""
    ratio = 1.5 ** rng.uniform(-1, 1)
    low, high = SIDES
    long_side = rng.uniform(max(low, low * max(ratio, 1 / ratio)), high)
    width, height = (long_side, long_side / ratio) if ratio > 1 else (long_side * ratio, long_side)
    return tuple(min(high, max(low, round(v / 8) * 8)) for v in (width, height))


def _extent(kind: Kind, side: float) -> tuple[int, int]:
    """Width and height of an object in px. Flat ones get a longer side (up to 1.3), or they would look small."""
    longer = side * min(1.3, max(kind.aspect, 1 / kind.aspect) ** 0.5)
    width, height = (longer, longer / kind.aspect) if kind.aspect > 1 else (longer * kind.aspect, longer)
    return max(1, round(width)), max(1, round(height))


@cache
def letters_width(word: str) -> float:
    """Width of the word in capitals over the height of a capital, in PIL's own font."""
    font = ImageFont.load_default(100)
    left, _, right, _ = font.getbbox(word.upper(), stroke_width=2)
    _, top, _, bottom = font.getbbox("H")
    return (right - left) / (bottom - top)


def _sign_extent(word: str, width: int, height: int) -> tuple[int, int]:
    capital = LETTER_SHARE * max(width, height)
    return round(capital * (letters_width(word) + 0.9)), round(capital * 1.8)


def _overlaps(box: Box, others: Sequence[Box], gap: float) -> bool:
    return any(
        box[0] < o[2] + gap and o[0] < box[2] + gap and box[1] < o[3] + gap and o[1] < box[3] + gap for o in others
    )


def _layout(
    rng: random.Random,
    width: int,
    height: int,
    style: str,
    looks: list[tuple[Kind, str | None, str]],
    boards: list[tuple[str, str]],
) -> tuple[tuple[Item, ...], tuple[Sign, ...]] | None:
    """Boxes for all, none overlapping, each object's centre well inside its cell; None when this draw does not fit."""
    shorter = min(width, height)
    edge = round(shorter * (FRAME_SHARE + 0.01 if style == PAINTING else 0.01))
    gap = 0.03 * shorter  # room for the white outline
    taken: list[Box] = []
    signs = []
    for word, colour in boards:
        w, h = _sign_extent(word, width, height)
        if w > width - 2 * edge or h > height - 2 * edge:
            return None
        x, y = rng.randint(edge, width - edge - w), rng.randint(edge, height - edge - h)
        box = (x, y, x + w, y + h)
        if _overlaps(box, taken, gap):
            return None
        taken.append(box)
        signs.append(Sign(word, colour, box))
    items = []
    cells = rng.sample(range(9), 9)
    for kind, colour, size in looks:
        w, h = _extent(kind, SIZES[size] * shorter)
        for cell in cells:
            box = _place(rng, cell, w, h, width, height, edge, gap, taken)
            if box:
                break
        else:
            return None
        cells.remove(cell)
        taken.append(box)
        items.append(Item(kind.name, colour, size, cell, box))
    return tuple(items), tuple(signs)


def _place(
    rng: random.Random, cell: int, w: int, h: int, width: int, height: int, edge: int, gap: float, taken: list[Box]
) -> Box | None:
    """A free box of w x h px whose centre lies well inside the cell, or None after 6 tries."""
    row, column = divmod(cell, 3)
    for _ in range(6):
        x = round((column + 0.5 + rng.uniform(-0.3, 0.3)) * width / 3 - w / 2)
        y = round((row + 0.5 + rng.uniform(-0.3, 0.3)) * height / 3 - h / 2)
        x = min(max(edge, x), width - edge - w)
        y = min(max(edge, y), height - edge - h)
        off_x = abs((x + w / 2) * 3 / width - column - 0.5)
        off_y = abs((y + h / 2) * 3 / height - row - 0.5)
        if max(off_x, off_y) < 0.36 and not _overlaps((x, y, x + w, y + h), taken, gap):
            return x, y, x + w, y + h
    return None


def _poster(
    rng: random.Random, scene_id: int, background: Background, kind: Kind, colour: str | None, word: str, board: str
) -> Scene:
    """A title above one large object in the center."""
    while True:
        width, height = _proportions(rng)
        w, h = _sign_extent(word, width, height)
        if height >= width and w <= 0.9 * width:
            break
    margin = round(0.06 * width)
    sign = Sign(word, board, ((width - w) // 2, margin, (width - w) // 2 + w, margin + h))
    side = min(0.55 * width, 0.5 * height)
    ow, oh = _extent(kind, side / 1.15)
    x, y = (width - ow) // 2, round(height * 0.54 - oh / 2)
    y = max(y, sign.box[3] + margin)
    item = Item(kind.name, colour, "large", 4, (x, y, x + ow, y + oh))
    return Scene(scene_id, width, height, POSTER, background, (item,), (sign,))


def cell_words(scene: Scene, side: int, size: int) -> list[str]:
    """What each cell of a `side` x `side` grid shows once the scene is letterboxed to `size` x `size` px.

    The phrase of whatever covers most of the cell: "red dog" (or "dog" in its own colours), a sign's ("red stop"), or the
    background's name; "" where the padding covers most. Used to start projectors from known words.

    Returns:
        side * side phrases, row by row.
    """
    scale = size / max(scene.width, scene.height)
    left, top = (size - scene.width * scale) / 2, (size - scene.height * scale) / 2
    things = [(item.box, item.phrase) for item in scene.items] + [
        (sign.box, f"{sign.colour} {sign.word}") for sign in scene.signs
    ]
    step = size / side

    def cover(box: tuple[float, float, float, float], x: float, y: float) -> float:
        w = min(box[2] * scale + left, x + step) - max(box[0] * scale + left, x)
        h = min(box[3] * scale + top, y + step) - max(box[1] * scale + top, y)
        return max(0.0, w) * max(0.0, h)

    words = []
    for row in range(side):
        for column in range(side):
            x, y = column * step, row * step
            picture = cover((0, 0, scene.width, scene.height), x, y)
            areas = [(cover(box, x, y), phrase) for box, phrase in things]
            areas.append((picture - sum(area for area, _ in areas), scene.background.name))
            areas.append((step * step - picture, ""))
            words.append(max(areas, key=lambda pair: pair[0])[1])
    return words
