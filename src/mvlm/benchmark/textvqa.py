"""TextVQA, validation (5,000 questions): reading text in pictures, with the words an OCR system saw in the prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mvlm.benchmark.base import SHORT, Benchmark, Question, Score, mean_score, other_layout, read_json

ANSWERS = 10
"""People asked for each question."""

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _one_apostrophe_short() -> Iterator[tuple[str, str]]:
    """Every spelling of the above with one apostrophe forgotten, and what was meant."""
    for meant in _CONTRACTED.split():
        for place, sign in enumerate(meant):
            if sign == "'":
                yield meant[:place] + meant[place + 1 :], meant
    yield "somebody'd", "somebodyd"  # the official table has this one the wrong way round


_MEANT = dict(_one_apostrophe_short())


def normalized(answer: str) -> str:
    """An answer as EvalAI compares it: signs, articles, number words and contractions evened out, quirks included."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for sign in ';/[]"{}()=+\\_-><@`!':
        # Next to a space anywhere in the text, the sign vanishes everywhere; else each becomes a space.
        beside = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside else " ")
    # The official code hands re.UNICODE over as the count: only the first 32 periods not before a digit go.
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=int(re.UNICODE))
    words = [_NUMBERS.get(word, word) for word in cleaned.split()]
    return " ".join(_MEANT.get(word, word) for word in words if word not in _ARTICLES)


def soft_score(answer: str, people: Sequence[str]) -> float:
    """Mean over the people left out one at a time of min(1, agreeing others / 3).

    Args:
        people: the ANSWERS answers given.
    """
    agree = Counter(map(normalized, people))[normalized(answer)]
    left_out = agree * min(1, (agree - 1) / 3) + (len(people) - agree) * min(1, agree / 3)
    return left_out / len(people)


def prompt(question: str, ocr_tokens: Sequence[str]) -> str:
    """The question, what the OCR system read, and the sentence that asks for a short answer."""
    return f"{question}\nReference OCR token: {', '.join(ocr_tokens)}{SHORT}"


def harness_prompt(question: str) -> str:
    """The question without OCR tokens, its first letter a capital and all others small, names included."""
    return question.capitalize() + SHORT


class TextVQA(Benchmark):
    """Soft accuracy against ten answers. Harness: task `textvqa_val`, scored alike but asked without OCR tokens.

    The harness' task sets no limit on the answer's length; 1024 is what its LLaVA adapter fills in. Where a picture is asked the same
    words twice, each question is scored by its own ten answers; LLaVA's script, which finds answers by picture and words, takes the
    last one's for both.

    Args:
        folder: holds TextVQA_0.5.1_val.json, TextVQA_Rosetta_OCR_v0.2_val.json and train_images/<image_id>.jpg.
    """

    name = "textvqa"
    source = "TextVQA (textvqa.org/dataset: questions, Rosetta OCR tokens and train_val_images)"
    limits: ClassVar = {"paper": 128, "harness": 1024}
    versions: ClassVar = {"0.5.1, validation": {"questions": 5_000}}

    def read(self) -> Iterator[Question]:
        path = self.folder / "TextVQA_0.5.1_val.json"
        records, paper = read_json(path, self.source), self.protocol == "paper"
        tokens = self._ocr_tokens(self.folder / "TextVQA_Rosetta_OCR_v0.2_val.json") if paper else {}
        try:
            for record in records["data"]:
                text, image = record["question"], record["image_id"]
                yield Question(
                    id=str(record["question_id"]),
                    text=prompt(text, tokens[image]) if paper else harness_prompt(text),
                    image=self.folder / "train_images" / f"{image}.jpg",
                    truth=_ten(record["answers"]),
                )
        except (KeyError, TypeError, ValueError) as error:
            expected = "{data: [{question_id, question, image_id, answers}]}, its pictures all in the OCR file,"
            raise other_layout(path, expected, self.source, error) from error

    def _ocr_tokens(self, path: Path) -> dict[str, list[str]]:
        seen = read_json(path, self.source)
        try:
            return {record["image_id"]: record["ocr_tokens"] for record in seen["data"]}
        except (KeyError, TypeError) as error:
            raise other_layout(path, "{data: [{image_id, ocr_tokens}]}", self.source, error) from error

    def marked(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Score:
        marks = {q.id: soft_score(predictions[q.id], q.truth) for q in questions}
        return mean_score(marks, [q.image for q in questions], len(questions), {})


def _ten(answers: list[str]) -> list[str]:
    if len(answers) != ANSWERS:
        raise ValueError(f"{len(answers)} answers where {ANSWERS} people were asked")
    return answers
