"""Training records: LLaVA's format, the paper's conversational shapes, nothing to gain without the picture."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict

import pytest

from mvlm.benchmark import mmbench, sqa
from mvlm.pocket.objects import KINDS
from mvlm.pocket.questions import LETTER, SHORT
from mvlm.pocket.scene import BACKDROPS, CELLS, COLOURS, PLAIN_STYLE, WORDS, sample_scene
from mvlm.pocket.sources import IMAGE_TAG, SOURCES, dense_caption, ocr_tokens, records, short_caption

SCENES = [sample_scene(0, number) for number in range(300)]
BY_PICTURE = {scene.picture: scene for scene in SCENES}
MADE = {source: records(source, SCENES, 150) for source in SOURCES}
SEVERAL = ("vsr", "iconqa", "vigc", "visual_dialog")


def said(record):
    values = [turn["value"] for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def offered(human):
    """The lettered options of a question, whatever its dress."""
    if "Options: " in human:
        return dict(re.findall(r"\(([A-D])\) ([^(\n]+?) ?(?=\(|\n|$)", human.split("Options: ")[1]))
    return dict(re.findall(r"\n([A-D])\. (.+)", human))


@pytest.mark.parametrize("source", SOURCES)
def test_llava_format(source):
    made = MADE[source]
    assert len(made) == 150 == len({record["id"] for record in made})
    for record in made:
        assert set(record) in ({"id", "conversations"}, {"id", "image", "conversations"})
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2) and speakers
        assert all(set(turn) == {"from", "value"} and turn["value"].strip() for turn in record["conversations"])
        texts = [turn["value"] for turn in record["conversations"]]
        tags = [text.count(IMAGE_TAG) for text in texts]
        assert tags == [int("image" in record), *[0] * (len(texts) - 1)]
        if "image" in record:
            assert texts[0].startswith(f"{IMAGE_TAG}\n") and record["image"] in BY_PICTURE


@pytest.mark.parametrize("source", SOURCES)
def test_deterministic(source):
    assert records(source, SCENES, 150) == MADE[source]
    assert records(source, SCENES, 150, seed=1) != MADE[source]


@pytest.mark.parametrize("source", SOURCES)
def test_readable_by_the_dataset_s_templates(source):
    from mvlm.data.prompt import template

    names = ("plain", "v1", "chatml") if source in ("lcs558k", "sharegpt4v_pt") else ("v1", "chatml")
    for record in MADE[source][:30]:
        for name in names:
            template(name).render(record["conversations"], "image" in record)


def test_pictures_are_shared_out():
    """Every suitable picture serves a source before any serves it twice."""
    for source in ("lcs558k", "sharegpt4v_pt", "sqa"):
        assert max(Counter(record["image"] for record in MADE[source]).values()) == 1


def test_turns():
    for source in SEVERAL:
        lengths = [len(said(record)) for record in MADE[source]]
        assert min(lengths) >= 2 and sum(lengths) / len(lengths) > 3.5
    assert max(len(said(record)) for record in records("visual_dialog", SCENES, 100, turns=12)) <= 10
    assert all(len(said(record)) <= 3 for record in records("iconqa", SCENES, 50, turns=3))


def test_shapes_of_tables_8_and_9():
    for record in MADE["iconqa"]:
        turns = said(record)
        assert (turns[0][0].endswith(f"\n{LETTER}") and LETTER not in turns[-1][0]) or len(turns) == 1
        for human, gpt in turns:
            option, letter = re.fullmatch(r"(.+)\. The answer is ([A-D])\.", gpt).groups()
            assert offered(human)[letter] == option
    in_a_line = sum("Options: (A) " in said(record)[0][0] for record in MADE["iconqa"])
    assert 50 < in_a_line < 100  # half of 150 in ScienceQA's dress
    for record in MADE["textvqa"]:
        turns = said(record)
        found = re.search(r"\nReference OCR token: (.+)\nAnswer", turns[0][0])
        assert turns[0][1] in (*found[1].split(", "), *COLOURS) and 3 <= len(found[1].split(", ")) <= 4
        assert turns[0][0].endswith(f"\n{SHORT}") and all(SHORT not in human for human, _ in turns[1:])
    for record in MADE["vsr"]:
        turns = said(record)
        assert turns[0][0].endswith(f"\n{SHORT}") and all(gpt in ("yes", "no") for _, gpt in turns)
    for record in MADE["sqa"]:
        ((human, gpt),) = said(record)
        options = offered(human)
        assert "Context: N/A\n" in human  # before the question or after it
        letter = re.search(r"The answer is ([A-D])\.$", gpt)[1]
        assert options[letter] in gpt
    for record in MADE["vigc"]:
        assert all(gpt.endswith(".") and " " in gpt for _, gpt in said(record))
    for source in ("lcs558k", "sharegpt4v_pt", "coco", "sbu", "sqa"):
        assert all(len(said(record)) == 1 for record in MADE[source])


def test_dialogues_without_a_picture():
    """A third of both mixtures tells the scene in words; every short answer but yes and no is then found in the words."""
    for source in ("sharegpt4v", "llava665k"):
        without = [record for record in MADE[source] if "image" not in record]
        told = [record for record in without if len(said(record)) > 1]
        assert (len(without), len(told)) == (50, 49)  # 25, 8 and 1 % of 150, each rounded down
        assert not any("<image>" in human for record in told for human, _ in said(record))
        for record in told:
            (first, _), *_ = said(record)
            text, *_, instruction = first.split("\n")
            assert text.endswith(".") and instruction == (LETTER if offered(first) else SHORT)
            answers = {answer for _, answer in said(record)} - {"yes", "no", PLAIN_STYLE}
            assert offered(first) or all(answer.lower() in text.lower() for answer in answers), record


def test_what_the_official_scorers_read_of_a_lettered_answer():
    """The option before its letter: ScienceQA's and MMBench's parsers find the letter in every such answer."""
    for record in MADE["iconqa"]:
        for human, gpt in said(record):
            assert sqa.parsed(gpt) == mmbench.extracted(gpt, offered(human)) == gpt[-2]


@pytest.mark.parametrize("source", ["vsr", "visual_dialog", "sharegpt4v", "llava665k"])
def test_yes_and_no_are_even(source):
    answers = Counter(
        re.split(r"\W", gpt.lower())[0] for record in MADE[source] if "image" in record for _, gpt in said(record)
    )
    assert answers["yes"] > 50 and abs(answers["yes"] - answers["no"]) <= 1


def test_letters_are_even():
    letters = defaultdict(Counter)
    for record in MADE["iconqa"]:
        for human, gpt in said(record):
            letters[len(offered(human))][gpt[-2]] += 1
    for options, counts in letters.items():
        assert len(counts) == options and max(counts.values()) - min(counts.values()) <= 1


def test_blind_guessing_gains_little():
    """The best constant answer to each question template (names, colours, cells, words and numbers blotted out) is
    right for at most 45 % of V2's short questions; half of them are yes/no, the rest have 3 to 60 answers."""
    cells = sorted(CELLS, key=len, reverse=True)
    blot = re.compile("|".join([*sorted(KINDS, key=len, reverse=True), *cells, *BACKDROPS, *WORDS, r"\d"]))
    seen = defaultdict(Counter)
    for record in records("sharegpt4v", SCENES, 1500):
        for human, gpt in said(record):
            if "image" in record and not offered(human) and len(said(record)) > 1:
                question = human.removeprefix(f"{IMAGE_TAG}\n").split("\n")[0]
                seen[blot.sub("_", question)][gpt] += 1
    frequent = {q: c for q, c in seen.items() if sum(c.values()) >= 40}  # a rare template's best answer is luck
    best = sum(max(counts.values()) for counts in frequent.values())
    assert best / sum(sum(counts.values()) for counts in frequent.values()) < 0.45


def test_dense_captions_tell_everything():
    for scene in SCENES:
        caption = dense_caption(scene, random.Random(0))
        assert scene.background.name in caption
        for item in scene.items:
            proper = KINDS[item.kind].a.split()[0] not in ("a", "an")  # nobody says "large mount fuji"
            assert (proper or item.size in caption.lower()) and (item.colour is None or item.colour in caption)
        assert all(f'{sign.colour} sign says "{sign.word}"' in caption for sign in scene.signs)
        assert caption.endswith(".") and "  " not in caption


def test_short_captions_name_everything():
    for scene in SCENES:
        brief, coloured = short_caption(scene, colours=False), short_caption(scene, colours=True)
        assert scene.background.name in brief
        for item in scene.items:
            stem = item.kind[:-1]  # butterfly, butterflies
            assert stem in brief and (item.colour is None or item.colour in coloured)


def test_ocr_tokens_do_not_tell():
    for scene in (s for s in SCENES if s.signs):
        tokens = ocr_tokens(scene, random.Random(0))
        printed = {sign.word for sign in scene.signs}
        assert printed < set(tokens) and 3 <= len(tokens) == len(set(tokens)) <= 4


def test_errors():
    with pytest.raises(ValueError, match="no source 'coca'; it has lcs558k"):
        records("coca", SCENES, 1)
    with pytest.raises(ValueError, match="at least 1"):
        records("coco", [], 1)
    wordless = [scene for scene in SCENES if not scene.signs][:10]
    with pytest.raises(ValueError, match="none of 10 scenes can be asked"):
        records("textvqa", wordless, 5)
