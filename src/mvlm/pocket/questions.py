"""Questions a scene can answer, with the truth.

Three rules keep a model from scoring without the picture: yes and no are dealt exactly 1 : 1 within each skill, option
letters evenly, and no turn of a dialogue asks what an earlier turn gave away. One rule keeps the questions fair: "the
dog" is said only where there is one dog, and a colour is asked only of painted objects.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from .objects import KINDS, Kind, with_article
from .scene import BACKDROPS, CELLS, COLOURS, GROUPS, PAINTING, PLACES, PLAIN_STYLE, POSTER, STYLES, WORDS, Item, Scene

LETTERS = "ABCD"

SHORT = "Answer the question using a single word or phrase."
"""Ends a question that wants a short answer (LLaVA-1.5's instruction, as in Tables 8 and 9 of the paper)."""

LETTER = "Answer with the option's letter from the given choices directly."
"""Ends a question with lettered options (the same)."""

PLAIN_SHARE = 0.06
"""Ordinary scenes are asked their style this seldom: so posters, paintings and scenes are equally frequent answers."""


COMMON_SKILLS = 12
"""Skills that an ordinary scene offers, open and yes/no together."""


@dataclass(frozen=True)
class Question:
    """One question with its truth.

    `wrong` holds answers that are false here, for options; `sentence` the answer as a sentence. `asks` are the facts it
    tests and `reveals` those that someone who read question and answer knows ("colour:dog", "exists:cat", "at:4").
    """

    skill: str
    text: str
    answer: str
    wrong: tuple[str, ...]
    asks: frozenset[str]
    reveals: frozenset[str]
    sentence: str


@dataclass(frozen=True)
class Pair:
    """A question answered yes and its twin answered no; a data set uses one of them, dealt by `settle`."""

    yes: Question
    no: Question

    @property
    def skill(self) -> str:
        return self.yes.skill

    @property
    def asks(self) -> frozenset[str]:
        return self.yes.asks | self.no.asks

    @property
    def reveals(self) -> frozenset[str]:
        return self.yes.reveals | self.no.reveals


@dataclass(frozen=True)
class Choice:
    """A question with this many lettered options; the right letter is dealt by `settle`."""

    question: Question
    options: int

    @property
    def skill(self) -> str:
        return self.question.skill

    @property
    def asks(self) -> frozenset[str]:
        return self.question.asks

    @property
    def reveals(self) -> frozenset[str]:
        return self.question.reveals


Slot = Question | Pair | Choice
"""A turn before it is known which answers it gets."""


@dataclass(frozen=True)
class Turn:
    """A turn as it is written: `options` are empty unless lettered, and `answer` is then the letter."""

    question: Question
    answer: str
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The question, with its options a line each."""
        return "\n".join([self.question.text, *(f"{a}. {o}" for a, o in zip(LETTERS, self.options, strict=False))])


def background_phrase(scene: Scene) -> str:
    """ "on a blue background", "in a forest" ... for captions."""
    name = scene.background.name
    if not scene.background.is_place:
        return f"on {with_article(name)} background"
    preposition = {"beach": "on", "night sky": "under", "desert": "in", "snow": "in", "sea": "at", "forest": "in"}
    return f"{preposition.get(name, 'on')} {PLACES[name]}"


# -- open questions


def open_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every open question of the scene (phrasings drawn from rng), in no particular order."""
    return [
        *_background(scene, rng),
        *_style(scene, rng),
        *_at(scene, rng),
        *_where(scene, rng),
        *_colour(scene, rng),
        *_count(scene, rng),
        *_larger(scene, rng),
        *_words(scene, rng),
        *_which(scene, rng),
    ]


def _question(
    skill: str,
    text: str,
    answer: str,
    pool: Iterable[str],
    sentence: str,
    asks: Iterable[str],
    reveals: Iterable[str] = (),
) -> Question:
    asks = frozenset(asks)
    wrong = tuple(dict.fromkeys(w for w in pool if w != answer))
    return Question(skill, text, answer, wrong, asks, asks | frozenset(reveals), sentence)


def _mentioned(kind: str) -> set[str]:
    """What "the dog" or "the dogs" gives away: that there is one, or that there are several."""
    return {f"exists:{kind}", f"count:{kind}"}


def _background(scene: Scene, rng: random.Random) -> list[Question]:
    name = scene.background.name
    if scene.background.is_place:
        text = rng.choice(("What place is shown in the image?", "Where was this picture taken?"))
        return [_question("place", text, name, PLACES, f"The image shows {PLACES[name]}.", ["background"])]
    text = rng.choice(("What color is the background?", "What is the color of the background?"))
    return [_question("background", text, name, BACKDROPS, f"The background is {name}.", ["background"])]


def _style(scene: Scene, rng: random.Random) -> list[Question]:
    if scene.style == PLAIN_STYLE and rng.random() > PLAIN_SHARE:
        return []
    text = "Is this image a poster, a painting or a scene?"
    return [_question("style", text, scene.style, STYLES, f"This image is a {scene.style}.", ["style"])]


def _at(scene: Scene, rng: random.Random) -> list[Question]:
    """What stands in a cell, which holds one object at most. Not asked of kinds already spoken of: the answer could be guessed."""
    found = []
    for item in scene.items:
        cell = CELLS[item.cell]
        text = rng.choice((f"Which object is at the {cell}?", f"What object is at the {cell} of the image?"))
        pool = [*(k for k in scene.kinds if k != item.kind), *_other_kinds(scene, rng)]
        facts = [f"where:{item.kind}", f"count:{item.kind}"]
        sentence = f"There is {KINDS[item.kind].a} at the {cell} of the image."
        found.append(_question("object", text, item.kind, pool, sentence, [f"at:{cell}", f"exists:{item.kind}"], facts))
    return found


def _other_kinds(scene: Scene, rng: random.Random, number: int = 6) -> list[str]:
    absent = [name for name in KINDS if name not in scene.kinds]
    return rng.sample(absent, number)


def _where(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    for item in scene.singles if scene.style != POSTER else ():  # always the center
        the, cell = KINDS[item.kind].the, CELLS[item.cell]
        text = rng.choice((f"Where is {the}?", f"Where is {the} in the image?"))
        facts = [f"at:{cell}", *_mentioned(item.kind)]
        sentence = f"{_capital(the)} is at the {cell} of the image."
        found.append(_question("position", text, cell, CELLS, sentence, [f"where:{item.kind}"], facts))
    return found


def _colour(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    for kind, colour in _painted(scene).items():
        n = scene.count(kind)
        text, sentence = f"What color is the {kind}?", f"The {kind} in the image is {colour}."
        if n > 1:
            text, sentence = f"What color are the {KINDS[kind].plural}?", f"The {KINDS[kind].plural} are {colour}."
        facts = _mentioned(kind)
        found.append(_question("color", text, colour, COLOURS, sentence, [f"colour:{kind}"], facts))
    return found


def _painted(scene: Scene) -> dict[str, str]:
    return {item.kind: item.colour for item in scene.items if item.colour}


def counted(scene: Scene, rng: random.Random) -> str | None:
    """The kind whose number is asked: the repeated one, else seldom any, so that 1 to 4 are equally frequent answers."""
    if scene.style == POSTER:  # always one
        return None
    repeated = next((kind for kind in scene.kinds if scene.count(kind) > 1), None)
    if repeated or rng.random() > GROUPS[1] / GROUPS[0]:
        return repeated
    return rng.choice([k for k in scene.kinds if KINDS[k].category != "landmark"] or [None])


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    kind = counted(scene, rng)
    if not kind:
        return []
    n, plural = scene.count(kind), KINDS[kind].plural
    text = rng.choice((f"How many {plural} are there?", f"How many {plural} are in the image?"))
    sentence = f"There {'is' if n == 1 else 'are'} {n} {kind if n == 1 else plural} in the image."
    return [_question("count", text, str(n), "1234", sentence, [f"count:{kind}"], [f"exists:{kind}"])]


def _larger(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    for large, small in _size_pairs(scene):
        one, two = rng.sample((large, small), 2)
        text = f"Which is larger, {KINDS[one.kind].the} or {KINDS[two.kind].the}?"
        sentence = f"{_capital(KINDS[large.kind].the)} is larger."
        facts = _mentioned(one.kind) | _mentioned(two.kind)
        asks = [f"size:{one.kind}", f"size:{two.kind}"]  # either's size, once known, tells the other's
        found.append(_question("size", text, large.kind, (small.kind,), sentence, asks, facts))
    return found


def _size_pairs(scene: Scene) -> list[tuple[Item, Item]]:
    """(large, small) of single objects whose drawn areas leave no doubt either."""
    return [
        (a, b)
        for a in scene.singles
        for b in scene.singles
        if a.size == "large" and b.size == "small" and _area(a) > 1.5 * _area(b)
    ]


def _area(item: Item) -> int:
    x0, y0, x1, y1 = item.box
    return (x1 - x0) * (y1 - y0)


def _words(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    printed = [sign.word for sign in scene.signs]
    for sign in scene.signs:
        pool = [*(w for w in printed if w != sign.word), *rng.sample([w for w in WORDS if w not in printed], 4)]
        text = f"What word is on the {sign.colour} sign?"
        if len(printed) == 1:
            text = rng.choice((text, "What does the sign say?", "What word is in the image?"))
        if scene.style == POSTER:
            text = "What is the title of the poster?"
        fact = [f"sign:{sign.word}", f"sign:{sign.colour}"]
        said = f'The {sign.colour} sign says "{sign.word}".'
        found.append(_question("word", text, sign.word, pool, said, fact))
        text = f'What color is the sign that says "{sign.word}"?'
        said = f'The sign that says "{sign.word}" is {sign.colour}.'
        found.append(_question("sign color", text, sign.colour, COLOURS, said, fact))
    return found


def _which(scene: Scene, rng: random.Random) -> list[Question]:
    """The character or landmark, where there is one kind of it."""
    found = []
    for category in ("character", "landmark"):
        shown = [k for k in scene.kinds if KINDS[k].category == category]
        if len(shown) == 1:
            pool = [k.name for k in KINDS.values() if k.category == category]
            text = f"Which {category} is in the image?"
            asks = [category, f"exists:{shown[0]}"]
            sentence = f"The {category} in the image is {KINDS[shown[0]].a}."
            found.append(_question(category, text, shown[0], rng.sample(pool, len(pool)), sentence, asks))
    return found


def present(scene: Scene, rng: random.Random) -> Question:
    """Which of the options is shown: needs options."""
    kind = rng.choice(scene.kinds)
    return _question(
        "presence",
        "Which of these is in the image?",
        kind,
        _other_kinds(scene, rng),
        f"The image shows {KINDS[kind].a}.",
        [f"exists:{kind}"],
    )


# -- yes or no


def pairs(scene: Scene, rng: random.Random, *, skills: Sequence[str] | None = None) -> list[Pair]:
    """Every yes/no pair of the scene, of the given skills or all."""
    found = [
        *_background_pairs(scene, rng),
        *_style_pairs(scene, rng),
        *existence_pairs(scene, rng),
        *_colour_pairs(scene, rng),
        *_count_pairs(scene, rng),
        *_position_pairs(scene, rng),
        *relation_pairs(scene, rng),
        *_size_yes_no(scene, rng),
        *_word_pairs(scene, rng),
        *_which_pairs(scene, rng),
    ]
    return [pair for pair in found if skills is None or pair.skill in skills]


def _pair(skill: str, yes: str, no: str, asks: Iterable[str], reveals: Iterable[str], said: str, denied: str) -> Pair:
    asks, reveals = list(asks), list(reveals)
    return Pair(
        _question(skill, yes, "yes", ("no",), f"Yes, {said}.", asks, reveals),
        _question(skill, no, "no", ("yes",), f"No, {denied}.", asks, reveals),
    )


def _background_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    name = scene.background.name
    if scene.background.is_place:
        wrong = rng.choice([p for p in PLACES if p != name])
        this = PAINTING if scene.style == PAINTING else "image"
        yes, no = (f"Does this {this} show {PLACES[n]}?" for n in (name, wrong))
        said = f"it shows {PLACES[name]}"
        return [_pair("place?", yes, no, ["background"], [], said, said)]
    wrong = rng.choice([c for c in BACKDROPS if c != name])
    yes, no = (f"Is the background {n}?" for n in (name, wrong))
    said = f"the background is {name}"
    return [_pair("background?", yes, no, ["background"], [], said, said)]


def _style_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    if scene.style == PLAIN_STYLE and rng.random() > PLAIN_SHARE:
        return []
    wrong = rng.choice([s for s in STYLES if s != scene.style])
    said = f"it is a {scene.style}"
    yes, no = (f"Is this image a {style}?" for style in (scene.style, wrong))
    return [_pair("style?", yes, no, ["style"], [], said, said)]


def askable(kind: Kind) -> bool:
    """Landmarks have their own question; "is there a mount fuji" is no English."""
    return kind.category != "landmark"


def existence_pairs(
    scene: Scene, rng: random.Random, *, negatives: str = "mixed", popular: Sequence[str] = ()
) -> list[Pair]:
    """Is there a ... in the image? A pair for each kind shown, its twin about a kind that is not.

    `negatives` is POPE's: "random" any absent kind, "popular" the first absent one of `popular`, "adversarial" an
    absent kind of the same category (the company it keeps here); "mixed" draws random or adversarial.
    """
    absent = [k.name for k in KINDS.values() if askable(k) and k.name not in scene.kinds]
    found = []
    for kind in (k for k in scene.kinds if askable(KINDS[k])):
        how = rng.choice(("random", "adversarial")) if negatives == "mixed" else negatives
        pool = [k for k in absent if KINDS[k].category == KINDS[kind].category] if how == "adversarial" else absent
        wrong = next(k for k in popular if k in absent) if how == "popular" else rng.choice(pool or absent)
        absent.remove(wrong)
        form = rng.choice(("Is there {} in the image?", "Is there {} in this image?"))
        one, two = KINDS[kind].a, KINDS[wrong].a
        yes = _question("existence", form.format(one), "yes", ("no",), f"Yes, there is {one}.", [f"exists:{kind}"])
        facts = [f"exists:{wrong}"]
        no = _question("existence", form.format(two), "no", ("yes",), f"No, there is no {wrong}.", facts)
        found.append(Pair(yes, no))
    return found


def _colour_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    found = []
    for kind, colour in _painted(scene).items():
        wrong = rng.choice([c for c in COLOURS if c != colour])
        n = scene.count(kind)
        facts = _mentioned(kind)
        is_, those = ("Is", f"the {kind}") if n == 1 else ("Are", f"the {KINDS[kind].plural}")
        said = f"{those} {is_.lower()} {colour}"
        yes, no = (f"{is_} {those} {c}?" for c in (colour, wrong))
        found.append(_pair("color?", yes, no, [f"colour:{kind}"], facts, said, said))
        yes, no = (f"Is there {with_article(c)} {kind} in the image?" for c in (colour, wrong))
        found.append(_pair("attribute", yes, no, [f"colour:{kind}"], [f"exists:{kind}"], said, said))
    return found


def _count_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    kind = counted(scene, rng)
    if not kind:
        return []
    n = scene.count(kind)
    wrong = rng.choice([m for m in (1, 2, 3, 4) if m != n])

    def number(m: int) -> str:
        return f"exactly {m} {kind if m == 1 else KINDS[kind].plural}"

    yes, no = (f"{'Is' if m == 1 else 'Are'} there {number(m)} in the image?" for m in (n, wrong))
    said = f"there {'is' if n == 1 else 'are'} {number(n)}"
    return [_pair("count?", yes, no, [f"count:{kind}"], [f"exists:{kind}"], said, said)]


def _position_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    found = []
    for item in scene.singles if scene.style != POSTER else ():
        cell, the = CELLS[item.cell], KINDS[item.kind].the
        wrong = rng.choice([c for c in CELLS if c != cell])
        said = f"{the} is at the {cell}"
        yes, no = (f"Is {the} at the {c} of the image?" for c in (cell, wrong))
        facts = [f"at:{cell}", *_mentioned(item.kind)]
        found.append(_pair("position?", yes, no, [f"where:{item.kind}"], facts, said, said))
    return found


def relation_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    """Left of, right of, above, below: between single objects whose centres are at least a fifth of the side apart."""
    found = []
    for one, two in combinations(rng.sample(scene.singles, len(scene.singles)), 2):
        for axis, side, names in (
            (0, scene.width, ("to the left of", "to the right of")),
            (1, scene.height, ("above", "below")),
        ):
            distance = (two.box[axis] + two.box[axis + 2] - one.box[axis] - one.box[axis + 2]) / 2
            if abs(distance) < 0.2 * side:
                continue
            first, last = (one, two) if distance > 0 else (two, one)
            name = rng.choice(names)
            a, b = (first, last) if name == names[0] else (last, first)
            a, b = KINDS[a.kind], KINDS[b.kind]
            said = f"{a.the} is {name} {b.the}"
            yes, no = f"Is {a.the} {name} {b.the}?", f"Is {b.the} {name} {a.the}?"
            asks = [f"relation:{axis}:{sorted((a.name, b.name))}"]
            along = {f"along:{axis}:{kind.name}" for kind in (a, b)}
            facts = _mentioned(a.name) | _mentioned(b.name) | along
            found.append(_pair("relation", yes, no, asks, facts, said, said))
    return found


def _size_yes_no(scene: Scene, rng: random.Random) -> list[Pair]:
    found = []
    for large, small in _size_pairs(scene):
        word = rng.choice(("larger", "smaller"))
        a, b = (large, small) if word == "larger" else (small, large)
        a, b = KINDS[a.kind], KINDS[b.kind]
        said = f"{a.the} is {word} than {b.the}"
        yes, no = f"Is {a.the} {word} than {b.the}?", f"Is {b.the} {word} than {a.the}?"
        asks = [f"size:{a.name}", f"size:{b.name}"]
        found.append(_pair("size?", yes, no, asks, _mentioned(a.name) | _mentioned(b.name), said, said))
    return found


def _word_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    found = []
    printed = [sign.word for sign in scene.signs]
    for sign in scene.signs:
        elsewhere = [w for w in printed if w != sign.word]
        wrong = rng.choice(elsewhere or [w for w in WORDS if w not in printed])
        if elsewhere and rng.random() < 0.5:
            wrong = rng.choice([w for w in WORDS if w not in printed])
        form = f'Does the {sign.colour} sign say "{{}}"?'
        if len(printed) == 1:
            form = rng.choice((form, 'Is the word in the image "{}"?'))
        if scene.style == POSTER:
            form = 'Is the title of the poster "{}"?'
        fact = [f"sign:{sign.word}", f"sign:{sign.colour}"]
        said = f'the sign says "{sign.word}"'
        found.append(_pair("word?", form.format(sign.word), form.format(wrong), fact, [], said, said))
    return found


def _which_pairs(scene: Scene, rng: random.Random) -> list[Pair]:
    found = []
    for category in ("character", "landmark"):
        shown = [k for k in scene.kinds if KINDS[k].category == category]
        if len(shown) == 1:
            right = KINDS[shown[0]]
            wrong = rng.choice([k for k in KINDS.values() if k.category == category and k != right])
            said = f"the {category} is {right.a}"
            yes, no = (f"Is the {category} in the image {k.a}?" for k in (right, wrong))
            found.append(_pair(f"{category}?", yes, no, [category, f"exists:{right.name}"], [], said, said))
    return found


# -- dialogues


def pick(slots: Sequence[Slot], number: int, rng: random.Random) -> list[Slot]:
    """Up to `number` turns of varied skill, none of which an earlier one answers."""
    by_skill: dict[str, list[Slot]] = defaultdict(list)
    for slot in rng.sample(slots, len(slots)):
        by_skill[slot.skill].append(slot)
    # Counting goes first or not at all, and at a rate that does not depend on the scene: "the dog" in an earlier turn
    # would rule it out for one dog more often than for three, and "1" would become a rare answer.
    counts = [skill for skill in by_skill if skill.startswith("count")]
    alone = len(counts) == len(by_skill)
    first = rng.choice(counts) if counts and (alone or rng.random() < number / COMMON_SKILLS) else None
    chosen: list[Slot] = [rng.choice(by_skill[first])] if first else []
    known = {fact for slot in chosen for fact in slot.reveals}
    asked = {skill: 0 for skill in by_skill if skill not in counts}
    while asked and len(chosen) < number:
        fewest = min(asked.values())
        skill = rng.choice([name for name, times in asked.items() if times == fewest])
        slot = by_skill[skill].pop()
        if not (slot.asks & known or _deducible(slot, known)):
            chosen.append(slot)
            known |= slot.reveals
            asked[skill] += 1
        if not by_skill[skill]:
            del asked[skill]
    return chosen


def _deducible(slot: Slot, known: set[str]) -> bool:
    """Whether a relation may follow from places already known, or from relations with a third object."""
    along = {fact for fact in slot.reveals if fact.startswith("along:")}
    return bool(along) and (along <= known or any(f"where:{fact.split(':')[2]}" in known for fact in along))


def dealt(number: int, values: int, rng: random.Random, first: int | None = None) -> list[int]:
    """`number` draws from range(values), each equally often (give or take one), in random order.

    Where they do not come out even, `first` (default: any) is one of those drawn once more.
    """
    order = rng.sample(range(values), values)
    if first is not None:
        order.sort(key=lambda value: value != first)
    draws = [order[i % values] for i in range(number)]
    rng.shuffle(draws)
    return draws


def settle(dialogues: Sequence[Sequence[Slot]], rng: random.Random) -> list[list[Turn]]:
    """Deals a whole data set's answers: yes and no 1 : 1 in each skill, letters evenly for each number of options."""
    needed: dict[tuple[str, int], int] = defaultdict(int)
    for slots in dialogues:
        for slot in slots:
            needed[_deck(slot)] += 1
    decks: dict[tuple[str, int], list[int]] = {}
    spare = rng.randrange(2)
    for key, number in needed.items():
        is_pair = key[0] not in ("choice", "open")
        decks[key] = dealt(number, max(1, key[1]), rng, spare if is_pair else None)
        if is_pair and number % 2:  # the odd yes of one skill is met by the odd no of the next
            spare = 1 - spare
    settled = []
    for slots in dialogues:
        turns = []
        for slot in slots:
            card = decks[_deck(slot)].pop()
            if isinstance(slot, Pair):
                question = (slot.yes, slot.no)[card]
                turns.append(Turn(question, question.answer))
            elif isinstance(slot, Choice):
                options = list(slot.question.wrong[: slot.options - 1])
                rng.shuffle(options)
                options.insert(card, slot.question.answer)
                turns.append(Turn(slot.question, LETTERS[card], tuple(options)))
            else:
                turns.append(Turn(slot, slot.answer))
        settled.append(turns)
    return settled


def _deck(slot: Slot) -> tuple[str, int]:
    if isinstance(slot, Pair):
        return slot.skill, 2
    return ("choice", slot.options) if isinstance(slot, Choice) else ("open", 0)


def with_options(question: Question, rng: random.Random, options: int | None = None) -> Choice:
    """The question with 2 to 4 lettered options (or the number given, if it has that many false answers)."""
    most = min(4, 1 + len(question.wrong))
    shuffled = question.wrong
    if question.skill not in ("object", "word"):  # those list what the scene shows first: the harder options
        shuffled = tuple(rng.sample(question.wrong, len(question.wrong)))
    return Choice(replace(question, wrong=shuffled), min(most, options or rng.randint(2, most)))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
