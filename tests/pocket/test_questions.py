"""Questions: true by a second computation from the scene, unambiguous, and of no use to who does not look."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict

import pytest

from mvlm.pocket.objects import KINDS
from mvlm.pocket.questions import (
    LETTERS,
    Choice,
    Pair,
    dealt,
    existence_pairs,
    open_questions,
    pairs,
    pick,
    present,
    settle,
    with_options,
)
from mvlm.pocket.scene import CELLS, sample_scene

SCENES = [sample_scene(0, number) for number in range(400)]
PLURALS = {kind.plural: name for name, kind in KINDS.items()}
NAMED = re.compile("|".join(sorted({*KINDS, *PLURALS}, key=len, reverse=True)))


def kinds_in(text: str) -> list[str]:
    return [name if name in KINDS else PLURALS[name] for name in NAMED.findall(re.sub(r'"[a-z]+"', "", text))]


def only(items):
    (item,) = items
    return item


def truth(scene, text: str) -> str | None:
    """An answer read off the scene's data by the words of the question alone, without the generator's bookkeeping."""
    kinds = kinds_in(text)
    of = {kind: [item for item in scene.items if item.kind == kind] for kind in kinds}
    yes = {True: "yes", False: "no"}
    quoted = re.search(r'"(\w+)"', text)
    cell = next(
        (c for c in sorted(CELLS, key=len, reverse=True) if f"at the {c} of" in text or f"at the {c}?" in text), None
    )
    if "background" in text:
        return scene.background.name if text.startswith("What") else yes[scene.background.name in text]
    if text.startswith(("What place", "Where was")):
        return scene.background.name
    if re.match(r"Does this (image|painting) show", text):
        return yes[scene.background.name in text]
    if text.startswith("Is this image"):
        return scene.style if "," in text else yes[scene.style in text]
    if "sign" in text or "title" in text or "word" in text:
        colour = next((s for s in scene.signs if f"{s.colour} sign" in text), None)
        if text.startswith("What color"):
            return only(s.colour for s in scene.signs if s.word == quoted[1])
        said = (colour or only(scene.signs)).word
        return yes[said == quoted[1]] if quoted else said
    if text.startswith("How many"):
        return str(len(of[kinds[0]]))
    if "exactly" in text:
        return yes[len(of[kinds[0]]) == int(re.search(r"\d", text)[0])]
    if "object is at" in text:
        return only(item.kind for item in scene.items if CELLS[item.cell] == cell)
    if text.startswith("Where is"):
        return CELLS[only(of[kinds[0]]).cell]
    if cell:
        return yes[CELLS[only(of[kinds[0]]).cell] == cell]
    if text.startswith("Which character") or text.startswith("Which landmark"):
        return only({item.kind for item in scene.items if KINDS[item.kind].category == text.split()[1]})
    if " in the image a" in text or " in the image the " in text or "landmark in the image" in text:
        return yes[bool(of[kinds[0]])]
    if text.startswith("What color"):
        return only({item.colour for item in of[kinds[0]]})
    if re.match(r"(Is|Are) there", text):
        colours = [w for w in text.split() if w in {"red", "orange", "yellow", "green", "blue", "purple"}]
        return yes[any(not colours or item.colour == colours[0] for item in of[kinds[0]])]
    if len(kinds) == 2:
        a, b = only(of[kinds[0]]), only(of[kinds[1]])
        middle = {i.kind: ((i.box[0] + i.box[2]) / 2, (i.box[1] + i.box[3]) / 2) for i in (a, b)}
        area = {i.kind: (i.box[2] - i.box[0]) * (i.box[3] - i.box[1]) for i in (a, b)}
        if text.startswith("Which is larger"):
            return max(area, key=area.get)
        (ax, ay), (bx, by) = middle[a.kind], middle[b.kind]
        rules = {
            "left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by,
            "larger": area[a.kind] > area[b.kind], "smaller": area[a.kind] < area[b.kind],
        }  # fmt: skip
        return yes[only(holds for word, holds in rules.items() if f" {word} " in text)]
    return yes[only({item.colour for item in of[kinds[0]]}) in text.split(kinds[0])[-1]]


def test_every_open_question_is_true_and_unambiguous():
    skills = Counter()
    for scene in SCENES:
        for question in open_questions(scene, random.Random(scene.id)):
            assert truth(scene, question.text) == question.answer, (question, scene)
            assert question.answer not in question.wrong and len(set(question.wrong)) == len(question.wrong)
            assert question.answer == question.answer.lower() and question.answer in question.sentence.lower()
            skills[question.skill] += 1
    assert len(skills) == 12 and min(skills.values()) > 10, skills


def test_every_pair_is_true():
    skills = Counter()
    for scene in SCENES:
        for pair in pairs(scene, random.Random(scene.id)):
            assert (pair.yes.answer, pair.no.answer) == ("yes", "no")
            for question in (pair.yes, pair.no):
                assert truth(scene, question.text) == question.answer, (question, scene)
            skills[pair.skill] += 1
    assert len(skills) == 13 and min(skills.values()) > 10, skills


def test_the_means_one():
    """ "the dog" only where there is one dog; a colour only of painted objects."""
    for scene in SCENES:
        asked = open_questions(scene, random.Random(0))
        asked += [q for pair in pairs(scene, random.Random(0)) for q in (pair.yes, pair.no)]
        for question in asked:
            if question.text.startswith(("What color are", "Are the")):  # of a group: "the fish" may be four
                continue
            for name in re.findall("the (" + "|".join(KINDS) + r")\b", question.text):
                assert scene.count(name) == 1 or KINDS[name].category in ("character", "landmark"), question
            if question.skill in ("color", "color?", "attribute"):
                assert all(item.colour for item in scene.items if item.kind == kinds_in(question.text)[0])


@pytest.mark.parametrize("negatives", ["random", "popular", "adversarial"])
def test_existence_negatives(negatives):
    popular = list(KINDS)
    for scene in SCENES[:100]:
        for pair in existence_pairs(scene, random.Random(0), negatives=negatives, popular=popular):
            shown, absent = kinds_in(pair.yes.text)[0], kinds_in(pair.no.text)[0]
            assert shown in scene.kinds and absent not in scene.kinds
            if negatives == "adversarial":
                assert KINDS[shown].category == KINDS[absent].category
            if negatives == "popular":
                assert absent in popular[:12]  # at most 5 kinds are shown and 5 already used


def test_present_has_one_right_option():
    for scene in SCENES[:100]:
        question = present(scene, random.Random(0))
        assert question.answer in scene.kinds and not set(question.wrong) & set(scene.kinds)


def test_pick_never_asks_what_is_known():
    for scene in SCENES:
        rng = random.Random(scene.id)
        known: set[str] = set()
        turns = pick([*open_questions(scene, rng), *pairs(scene, rng)], 8, rng)
        for slot in turns:
            assert not slot.asks & known, turns
            known |= slot.reveals
        texts = [slot.text if not isinstance(slot, Pair) else slot.yes.text for slot in turns]
        assert len(set(texts)) == len(texts)


def test_dealt():
    for number in (0, 1, 7, 40):
        for values in (1, 2, 4):
            counts = Counter(dealt(number, values, random.Random(0)))
            assert sum(counts.values()) == number
            assert max(counts.values(), default=0) - min((counts[v] for v in range(values)), default=0) <= 1


def test_settle_balances_yes_and_letters():
    dialogues = []
    for scene in SCENES:
        rng = random.Random(scene.id)
        lettered = [with_options(q, rng) for q in open_questions(scene, rng) if q.wrong]
        dialogues.append(pick([*pairs(scene, rng), *lettered], 8, rng))
    turns = [turn for dialogue in settle(dialogues, random.Random(1)) for turn in dialogue]
    yes_no = [turn for turn in turns if not turn.options]
    total = Counter(turn.answer for turn in yes_no)
    assert abs(total["yes"] - total["no"]) <= 1
    by_skill = defaultdict(Counter)
    for turn in yes_no:
        by_skill[turn.question.skill][turn.answer] += 1
    assert all(abs(c["yes"] - c["no"]) <= 1 for c in by_skill.values()), by_skill
    for options in (2, 3, 4):
        letters = Counter(turn.answer for turn in turns if len(turn.options) == options)
        counts = [letters[letter] for letter in LETTERS[:options]]
        assert min(counts) > 20 and max(counts) - min(counts) <= 1
    for turn in turns:
        if turn.options:
            assert turn.options[LETTERS.index(turn.answer)] == turn.question.answer
            assert len(set(turn.options)) == len(turn.options)


def test_with_options_keeps_to_the_question():
    scene = SCENES[0]
    rng = random.Random(0)
    for question in open_questions(scene, rng):
        if question.wrong:
            choice = with_options(question, rng, 2)
            assert isinstance(choice, Choice) and choice.options == 2
            assert set(choice.question.wrong) == set(question.wrong)
