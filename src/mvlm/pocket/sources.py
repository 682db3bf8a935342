"""Training records in LLaVA's format, one function a source of Table 2 (and V1's two), from generated scenes.

Each keeps the conversational shape that Tables 8 and 9 of the paper show for its namesake. Sources with several
questions about one picture ask `turns` of them in one record: a picture costs far more than a question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from .objects import KINDS, OPEN_CATEGORIES, of_category, with_article
from .questions import (
    LETTER,
    LETTERS,
    SHORT,
    Question,
    Slot,
    Turn,
    background_phrase,
    open_questions,
    pairs,
    pick,
    present,
    settle,
    with_options,
)
from .scene import CELLS, PAINTING, POSTER, WORDS, Item, Scene

IMAGE_TAG = "<image>"

Record = dict
"""{"id", "image"? (relative to the folder of pictures), "conversations": [{"from": "human" | "gpt", "value"}]}."""

NUMBERS = ("no", "one", "two", "three", "four", "five")

BRIEF_PROMPTS = (
    "Describe this image briefly.",
    "What is this photo about?",
    "Give a short caption for the picture.",
    "Sum up what you see.",
    "What are the key elements in this picture?",
)
LONGER_PROMPTS = (
    "Describe this image in detail.",
    "What do you see in this picture, and where?",
    "Can you elaborate on the elements of the picture provided?",
    "Tell me everything that is in the image.",
)


# -- captions


def _amount(items: Sequence[Item], *, size: bool = False, colour: bool = True) -> str:
    """ "a large red dog", "three cats": objects of one kind, which share colour and size."""
    item, kind = items[0], KINDS[items[0].kind]
    looks = " ".join(word for word in (item.size if size else "", (colour and item.colour) or "") if word)
    if len(items) > 1:
        return " ".join(word for word in (NUMBERS[len(items)], looks, kind.plural) if word)
    if not looks or kind.a.split()[0] not in ("a", "an"):
        return kind.a
    return with_article(f"{looks} {kind.name}")


def _groups(scene: Scene) -> list[list[Item]]:
    """The objects by kind, groups in reading order of their first."""
    ordered = sorted(scene.items, key=lambda item: item.cell)
    kinds = dict.fromkeys(item.kind for item in ordered)
    return [[item for item in ordered if item.kind == kind] for kind in kinds]


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def short_caption(scene: Scene, *, colours: bool) -> str:
    """ "a red dog and two cats on a beach". Without colours the objects are only named."""
    said = f"{_listed([_amount(g, colour=colours) for g in _groups(scene)])} {background_phrase(scene)}"
    if scene.style == POSTER:
        return f'a poster of {said} with the title "{scene.signs[0].word}"'
    if scene.style == PAINTING:
        said = f"a painting of {said}"
    if scene.signs and colours:
        boards = [f'{with_article(s.colour)} sign that says "{s.word}"' for s in scene.signs]
        said += f", and {_listed(boards)}"
    return said


def dense_caption(scene: Scene, rng: random.Random) -> str:
    """Everything: the background, each object with size, colour and place, each sign. Three phrasings of one core."""
    name = scene.background.name
    opening = f"The image shows {background_phrase(scene).split(' ', 1)[1]}." if scene.background.is_place else ""
    opening = opening or f"The background is {name}."
    if scene.style in (POSTER, PAINTING):
        opening = f"This is a {scene.style}. {opening}"
    form = rng.randrange(3)
    sentences = [opening]
    for group in _groups(scene):
        what, where = _amount(group, size=True), _listed([f"the {CELLS[item.cell]}" for item in group])
        is_ = "is" if len(group) == 1 else "are"
        sentences.append(
            (f"There {is_} {what} at {where}.", f"{_capital(what)} {is_} at {where}.", f"At {where} {is_} {what}.")[
                form
            ]
        )
    for sign in scene.signs:
        sentences.append(f'{_capital(with_article(sign.colour))} sign says "{sign.word}".')
    return " ".join(sentences)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# -- records


def _record(source: str, number: int, scene: Scene | None, said: Sequence[tuple[str, str]]) -> Record:
    turns = []
    for k, (human, gpt) in enumerate(said):
        tag = f"{IMAGE_TAG}\n" if scene and k == 0 else ""
        turns += [{"from": "human", "value": tag + human}, {"from": "gpt", "value": gpt}]
    record: Record = {"id": f"{source}-{number:06d}", "conversations": turns}
    return record if scene is None else {"id": record["id"], "image": scene.picture, "conversations": turns}


def _suffixed(turns: Sequence[Turn], instruction: str = SHORT) -> list[tuple[str, str]]:
    """(human, gpt) with the instruction at the first turn only, as LLaVA-1.5's mixture has it: at each it would double the text."""
    return [(f"{turn.text}\n{instruction}" if k == 0 else turn.text, turn.answer) for k, turn in enumerate(turns)]


Chooser = Callable[[Scene, random.Random], list[Slot]]
Writer = Callable[[Scene, list[Turn], random.Random], list[tuple[str, str]]]


def _dialogues(
    source: str,
    scenes: Sequence[Scene],
    count: int,
    rng: random.Random,
    choose: Chooser,
    write: Writer,
    fewest: int,
    picture: bool = True,
) -> list[Record]:
    """`count` records of at least `fewest` turns each, the scenes in turn; answers are dealt over the whole source.

    Without `picture` the records are text alone: the writer tells what the scene shows.
    """
    chosen: list[tuple[Scene, list[Slot]]] = []
    passed = 0
    for scene in _in_turn(scenes, rng):
        if len(chosen) == count:
            break
        slots = choose(scene, rng)
        passed = 0 if len(slots) >= fewest else passed + 1
        if passed > 3 * len(scenes):
            raise ValueError(
                f"source {source!r}: none of {len(scenes)} scenes can be asked {fewest} questions of its kind; "
                "generate more scenes"
            )
        if not passed:
            chosen.append((scene, slots))
    settled = settle([slots for _, slots in chosen], rng)
    return [
        _record(source, k, scene if picture else None, write(scene, turns, rng))
        for k, ((scene, _), turns) in enumerate(zip(chosen, settled, strict=True))
    ]


def _in_turn(scenes: Sequence[Scene], rng: random.Random) -> Iterator[Scene]:
    """All scenes in random order, again and again: every picture serves a source before any serves it twice."""
    while True:
        yield from rng.sample(scenes, len(scenes))


def _captions(
    source: str,
    scenes: Sequence[Scene],
    count: int,
    rng: random.Random,
    prompts: Sequence[str],
    say: Callable[[Scene], str],
) -> list[Record]:
    order = _in_turn(scenes, rng)
    return [
        _record(source, k, scene, [(rng.choice(prompts), say(scene))])
        for k, scene in ((k, next(order)) for k in range(count))
    ]


# -- the sources, each (scenes, count, turns, rng) -> records


def lcs558k(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """V1's pre-training: short captions that name the objects."""
    return _captions("lcs558k", scenes, count, rng, BRIEF_PROMPTS, lambda s: short_caption(s, colours=False))


def sharegpt4v_pt(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """V2's pre-training: dense captions."""
    return _captions("sharegpt4v_pt", scenes, count, rng, LONGER_PROMPTS, lambda s: dense_caption(s, rng))


def coco(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """A caption as an annotator writes it."""
    return _captions(
        "coco", scenes, count, rng, BRIEF_PROMPTS, lambda s: f"{_capital(short_caption(s, colours=True))}."
    )


def sbu(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """A caption as the owner of a photo writes it: what stands out, and where."""

    def say(scene: Scene) -> str:
        group = rng.choice(_groups(scene))
        return f"{_capital(_amount(group))} {background_phrase(scene)}."

    return _captions("sbu", scenes, count, rng, (*BRIEF_PROMPTS, LONGER_PROMPTS[2]), say)


def visual_dialog(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """A dialogue of up to ten turns without an instruction: open questions answered by a word, yes/no ones with what is true."""

    def choose(scene: Scene, rng: random.Random) -> list[Slot]:
        return pick([*open_questions(scene, rng), *pairs(scene, rng)], min(10, turns + 2), rng)

    def write(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
        return [
            (turn.text, turn.question.sentence if turn.answer in ("yes", "no") else turn.answer) for turn in settled
        ]

    return _dialogues("visual_dialog", scenes, count, rng, choose, write, fewest=2)


def textvqa(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """Reading, with the words an OCR tool "found" in the first turn: those printed and one or two that are not."""

    def choose(scene: Scene, rng: random.Random) -> list[Slot]:
        asked = open_questions(scene, rng)
        reading = pick([q for q in asked if q.skill in ("word", "sign color")], 2, rng)
        rest = [*(q for q in asked if q.skill not in ("word", "sign color")), *pairs(scene, rng, skills=["word?"])]
        known = frozenset().union(*(q.reveals for q in reading))
        more = pick([q for q in rest if not q.asks & known], max(0, turns // 2 - len(reading)), rng)
        return [*reading, *more] if reading else []

    def write(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
        said = _suffixed(settled)
        first = f"{settled[0].text}\nReference OCR token: {', '.join(ocr_tokens(scene, rng))}\n{SHORT}"
        return [(first, said[0][1]), *said[1:]]

    return _dialogues("textvqa", scenes, count, rng, choose, write, fewest=1)


def ocr_tokens(scene: Scene, rng: random.Random, least: int = 3) -> list[str]:
    """The printed words and one or two others, three or four in all, shuffled: they alone do not tell the answer."""
    printed = [sign.word for sign in scene.signs]
    others = rng.sample([w for w in WORDS if w not in printed], max(rng.randint(1, 2), least - len(printed)))
    return rng.sample([*printed, *others], len(printed) + len(others))


def vsr(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """Spatial statements as yes/no questions."""

    def choose(scene: Scene, rng: random.Random) -> list[Slot]:
        return pick(pairs(scene, rng, skills=("relation", "position?", "size?")), turns, rng)

    def write(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
        return _suffixed(settled)

    return _dialogues("vsr", scenes, count, rng, choose, write, fewest=2)


def vigc(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """Open questions answered by a sentence."""

    def choose(scene: Scene, rng: random.Random) -> list[Slot]:
        return pick(open_questions(scene, rng), turns, rng)

    def write(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
        return [(turn.text, turn.question.sentence) for turn in settled]

    return _dialogues("vigc", scenes, count, rng, choose, write, fewest=2)


def iconqa(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """Multiple choice."""
    return _dialogues("iconqa", scenes, count, rng, lambda s, r: choices(s, turns, r), _lettered, fewest=2)


def choices(scene: Scene, turns: int, rng: random.Random) -> list[Slot]:
    """Lettered questions about a scene."""
    asked = [q for q in [*open_questions(scene, rng), present(scene, rng)] if q.wrong]
    return [with_options(q, rng) for q in pick(asked, turns, rng)]


def _lettered(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
    """Turns whose options stand a line each, or all in ScienceQA's dress.

    The answer says the option before its letter, "red. The answer is B.": so small a model learns that in a few steps and the
    bare letter hardly at all. The official scorers of ScienceQA and MMBench read either.
    """
    in_lines = rng.random() < 0.5
    asked = [t.text if in_lines else f"Context: N/A\nQuestion: {t.question.text}\n{in_a_line(t)}" for t in settled]
    asked[0] += f"\n{LETTER}"
    return [
        (text, f"{turn.question.answer}. The answer is {turn.answer}.")
        for text, turn in zip(asked, settled, strict=True)
    ]


def in_a_line(turn: Turn) -> str:
    """ "Options: (A) cat (B) dog", as ScienceQA has them."""
    return "Options: " + " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, turn.options, strict=False))


LECTURES = {
    "background": "The background is what lies behind all objects. Its color fills most of the picture.",
    "place": "A place is known by its ground and its sky.",
    "object": "To name an object, first find its place, then look at its shape.",
    "position": "A picture has three rows, top to bottom, and three columns, left to right.",
    "color": "The color of an object is the color of its largest part.",
    "count": "To count objects of a kind, point at each of them once.",
    "size": "The larger of two objects covers more of the picture.",
    "word": "A sign is a colored board with a word on it.",
    "sign color": "A sign is a colored board with a word on it.",
    "style": "A poster has a title above one large object. A painting has a frame.",
    "character": "A character is known by clothes and tools.",
    "landmark": "A landmark is a famous building or mountain, known by its outline.",
    "presence": "An object is in the picture if its whole shape is found there.",
}
"""What a lecture says before the answer, a skill each."""


def sqa(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """Multiple choice in ScienceQA's dress: context, options in a line, a lecture that ends in the answer."""

    def write(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
        (turn,) = settled
        paper, benchmark = "{}\nContext: N/A\n", "Context: N/A\nQuestion: {}\n"  # Table 9's order, and the test file's
        human = f"{rng.choice((paper, benchmark)).format(turn.question.text)}{in_a_line(turn)}\n"
        return [(human, f"{LECTURES[turn.question.skill]} {turn.question.sentence} The answer is {turn.answer}.")]

    return _dialogues("sqa", scenes, count, rng, lambda s, r: choices(s, 1, r), write, fewest=1)


def sharegpt4v(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """V2's mixture: short-answer and lettered questions, dense captions, and dialogues without a picture."""
    shares = {"short": 53, "letters": 10, "dense": 3, "described": 25, "described letters": 8, "small talk": 1}
    return _mixture("sharegpt4v", scenes, count, turns, rng, shares)


def llava665k(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """V1's mixture: short-answer and lettered questions, whole-sentence conversation, and dialogues without a picture."""
    shares = {"short": 53, "letters": 10, "sentences": 3, "described": 25, "described letters": 8, "small talk": 1}
    return _mixture("llava665k", scenes, count, turns, rng, shares)


def _mixture(
    source: str, scenes: Sequence[Scene], count: int, turns: int, rng: random.Random, shares: dict[str, int]
) -> list[Record]:
    total = sum(shares.values())
    counts = {part: count * share // total for part, share in shares.items()}
    counts["short"] += count - sum(counts.values())
    makers = {
        "short": lambda n: short_answers(scenes, n, turns, rng),
        "letters": lambda n: iconqa(scenes, n, max(2, turns // 2), rng),
        "sentences": lambda n: vigc(scenes, n, turns, rng),
        "dense": lambda n: sharegpt4v_pt(scenes, n, turns, rng),
        "described": lambda n: described(scenes, n, turns, rng),
        "described letters": lambda n: described_letters(scenes, n, max(2, turns // 2), rng),
        "small talk": lambda n: small_talk(n, rng),
    }
    records = [record for part, n in counts.items() if n for record in makers[part](n)]
    rng.shuffle(records)
    return [{**record, "id": f"{source}-{k:06d}"} for k, record in enumerate(records)]


RECOGNITION = (
    "existence", "attribute", "color", "background", "place", "style", "word", "sign color", "object", "character", "landmark"
)  # fmt: skip
"""What is shown and how it looks, as open and as yes/no questions. Where and how many is asked by the other sources."""


def _recognition(scene: Scene, turns: int, rng: random.Random) -> list[Slot]:
    asked = [*open_questions(scene, rng), *pairs(scene, rng)]
    return pick([q for q in asked if q.skill.removesuffix("?") in RECOGNITION], turns, rng)


def short_answers(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """Open and yes/no questions about a picture, answered by a word or a phrase."""

    def write(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
        return _suffixed(settled)

    return _dialogues("short", scenes, count, rng, lambda s, r: _recognition(s, turns, r), write, fewest=2)


def _told(write: Writer) -> Writer:
    """Writes the same turns, the scene told in words before the first: looking up an answer is learned far faster in text."""

    def told(scene: Scene, settled: list[Turn], rng: random.Random) -> list[tuple[str, str]]:
        (first, answer), *more = write(scene, settled, rng)
        return [(f"{dense_caption(scene, rng)}\n{first}", answer), *more]

    return told


def described(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """The questions of `short_answers` with words instead of a picture."""
    write = _told(lambda scene, settled, rng: _suffixed(settled))
    return _dialogues("described", scenes, count, rng, lambda s, r: _recognition(s, turns, r), write, 2, picture=False)


def described_letters(scenes: Sequence[Scene], count: int, turns: int, rng: random.Random) -> list[Record]:
    """The questions of `iconqa` with words instead of a picture."""
    write = _told(_lettered)
    return _dialogues("described", scenes, count, rng, lambda s, r: choices(s, turns, r), write, 2, picture=False)


def small_talk(count: int, rng: random.Random) -> list[Record]:
    """Small talk without a picture: categories, sums, opposites."""
    opposites = {"left": "right", "top": "bottom", "above": "below", "large": "small", "yes": "no", "open": "closed"}
    opposites |= {b: a for a, b in opposites.items()}
    records = []
    for number in range(count):
        how = rng.randrange(3)
        if how == 0:
            question = category_question(rng)
            said = (f"{question.text}\n{SHORT}", question.answer)
        elif how == 1:
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            said = (f"What is {a} plus {b}?\n{SHORT}", str(a + b))
        else:
            word = rng.choice(list(opposites))
            said = (f"What is the opposite of {word}?\n{SHORT}", opposites[word])
        records.append(_record("text", number, None, [said]))
    return records


def category_question(rng: random.Random) -> Question:
    """Which of four words names a ...: needs no picture."""
    category = rng.choice(("animal", "food", "vehicle"))
    right = rng.choice(of_category(category)).name
    wrong = [k.name for k in rng.sample(of_category(*(c for c in OPEN_CATEGORIES if c != category)), 3)]
    listed = rng.sample([right, *wrong], 4)
    article = "an" if category == "animal" else "a kind of" if category == "food" else "a"
    text = f"Which of these is {article} {category}: {', '.join(listed[:3])} or {listed[3]}?"
    return Question(
        "category", text, right, tuple(wrong), frozenset(), frozenset(), f"{_capital(right)} is the answer."
    )


SOURCES: dict[str, Callable[[Sequence[Scene], int, int, random.Random], list[Record]]] = {
    maker.__name__: maker
    for maker in (
        lcs558k, llava665k, sharegpt4v_pt, visual_dialog, textvqa, vsr, vigc, iconqa, sqa, coco, sbu, sharegpt4v
    )
}  # fmt: skip


def records(source: str, scenes: Sequence[Scene], count: int, *, turns: int = 6, seed: int = 0) -> list[Record]:
    """`count` records of a source.

    Args:
        scenes: the pictures to ask about; every suitable one serves before any serves twice.
        turns: questions in a record, for the sources that ask several.

    Raises:
        ValueError: an unknown source, no turns, no scenes, or no scene that the source can ask about.
    """
    if source not in SOURCES:
        raise ValueError(f"the pocket world has no source {source!r}; it has {', '.join(SOURCES)}")
    if turns < 1 or not scenes:
        raise ValueError(f"source {source!r}: turns is {turns} and scenes are {len(scenes)}; both must be at least 1")
    return SOURCES[source](scenes, count, turns, random.Random(f"{seed}/{source}"))
