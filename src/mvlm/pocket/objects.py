"""The kinds of objects that stand in pocket scenes: OpenMoji pictures with plain names (OpenMoji is CC BY-SA 4.0).

Picked by hand from the 4,495 pictures of OpenMoji 17: outlines that differ even at 40 pixels, names of one word where
possible, and nothing that a background or another picture shows as well (no tree, for the forest is full of them).
"""

from __future__ import annotations

from dataclasses import dataclass

OPEN_CATEGORIES = ("animal", "food", "vehicle", "thing")
"""Categories of common nouns; the others are `character` and `landmark`."""


@dataclass(frozen=True)
class Kind:
    """A kind of object.

    `codepoint` names the SVG file, `aspect` is width / height of its ink (a test compares it with the rendered
    picture), `a` the name with its article.
    """

    name: str
    codepoint: str
    category: str
    aspect: float
    plural: str = ""
    a: str = ""

    @property
    def the(self) -> str:
        return f"the {self.name}"

    @property
    def paintable(self) -> bool:
        """Characters and landmarks are known by their colours too, so they keep them."""
        return self.category in OPEN_CATEGORIES


def _kind(category: str, name: str, codepoint: str, aspect: float, plural: str = "", a: str = "") -> Kind:
    return Kind(name, codepoint, category, aspect, plural or f"{name}s", a or with_article(name))


def with_article(words: str) -> str:
    """ "a red dog", "an elephant"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_TABLE = (
    _kind("animal", "dog", "1F415", 1.15),
    _kind("animal", "cat", "1F408", 1.54),
    _kind("animal", "elephant", "1F418", 1.43),
    _kind("animal", "turtle", "1F422", 1.52),
    _kind("animal", "duck", "1F986", 0.88),
    _kind("animal", "lion", "1F981", 0.87),
    _kind("animal", "frog", "1F438", 0.99),
    _kind("food", "apple", "1F34E", 1.000),
    _kind("food", "banana", "1F34C", 0.87),
    _kind("food", "strawberry", "1F353", 0.91, "strawberries"),
    _kind("food", "pizza", "1F355", 0.84),
    _kind("food", "cake", "1F382", 1.10),
    _kind("food", "donut", "1F369", 1.000),
    _kind("food", "mushroom", "1F344", 1.099),
    _kind("vehicle", "car", "1F697", 2.25),
    _kind("vehicle", "bus", "1F68C", 3.00, "buses"),
    _kind("vehicle", "motorcycle", "1F3CD", 1.84),
    _kind("vehicle", "canoe", "1F6F6", 1.61),
    _kind("vehicle", "rocket", "1F680", 1.000),
    _kind("vehicle", "tractor", "1F69C", 1.41),
    _kind("thing", "key", "1F511", 1.011),
    _kind("thing", "camera", "1F4F7", 1.35),
    _kind("thing", "umbrella", "2602", 0.98),
    _kind("thing", "chair", "1FA91", 0.64),
    _kind("thing", "crown", "1F451", 1.32),
    _kind("thing", "balloon", "1F388", 0.83),
    _kind("thing", "bell", "1F514", 0.77),
    _kind("thing", "cactus", "1F335", 0.86, "cactuses"),
    _kind("thing", "house", "1F3E0", 0.84),
    _kind("character", "wizard", "1F9D9-200D-2642-FE0F", 0.92),
    _kind("character", "vampire", "1F9DB", 0.95),
    _kind("character", "astronaut", "1F9D1-200D-1F680", 0.85),
    _kind("character", "clown", "1F921", 1.033),
    _kind("landmark", "castle", "1F3F0", 1.29),
    _kind("landmark", "statue of liberty", "1F5FD", 0.72, a="the statue of liberty"),
    _kind("landmark", "moai", "1F5FF", 0.79, "moai"),
    _kind("landmark", "ferris wheel", "1F3A1", 0.95),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _TABLE}


def of_category(*categories: str) -> list[Kind]:
    """The kinds of the given categories, in the table's order."""
    return [kind for kind in _TABLE if kind.category in categories]
