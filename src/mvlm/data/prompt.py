"""Dialogue to ids and labels by a template: `plain` and `v1` as the reference has them, `chatml` for small chat models.

A dialogue is rendered to one text together with the spans of the answers, tokenised once, and a token is labelled
when it begins inside an answer. The reference instead tokenises turn by turn, subtracts two, and drops every label of
a record whose sums disagree; where it labels, these labels are the same, and where it gives up, these are right.

Only the template writes special tokens. Their names in a question or an answer ("</s>", "<|im_end|>") are text, in
training and in prompts: nobody can close a turn that is not theirs. The reference reads them as the tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN
from mvlm.data.tokenizer import Spans, Tokenizer

IMAGE_TAG = "<image>"

HUMAN, ASSISTANT = "human", "gpt"
"""Who speaks in the `from` field of a LLaVA-format record."""


class DialogueError(ValueError):
    """A record whose fields or dialogue do not fit. `kind` says in a few words what by, to count such records."""

    def __init__(self, message: str, kind: str = "wrong type") -> None:
        super().__init__(message)
        self.kind = kind


class Piece(NamedTuple):
    """A stretch of a rendered dialogue."""

    text: str
    said: bool = False
    """By somebody in the dialogue: never a special token."""
    learned: bool = False


@dataclass(frozen=True)
class Encoded:
    """A dialogue as the model takes it: each picture is `image_tokens` ids of IMAGE_TOKEN, never labelled."""

    input_ids: list[int]
    labels: list[int]
    blanked: bool
    """No label at all is left: the sample teaches nothing."""
    truncated: bool
    """Longer than max_length, counting a picture as one id; the end was cut off."""
    unseen: bool
    """The record names a picture and no place for it is left: no `<image>` in the text, or it was cut off."""


class Template(ABC):
    """How a dialogue becomes text, and the text ids and labels."""

    name: str
    """What `template()` finds it by."""
    ends_with: str | None = None
    """The special token after an answer, where the template has one."""

    @abstractmethod
    def pieces(self, conversations: Sequence[dict[str, Any]], has_image: bool) -> list[Piece]:
        """The whole text in its stretches.

        Raises:
            DialogueError: the dialogue does not fit the template. Nothing is tokenised, so this is also a cheap check.
        """

    @abstractmethod
    def open(self, text: str) -> str:
        """One turn of the user, word for word, and the beginning of the answer to it."""

    def render(self, conversations: Sequence[dict[str, Any]], has_image: bool) -> tuple[str, Spans]:
        """The whole text and the spans of its answers.

        Raises:
            DialogueError: the dialogue does not fit the template.
        """
        pieces = self.pieces(conversations, has_image)
        return "".join(piece.text for piece in pieces), _spans(pieces, "learned")

    def encode(
        self,
        conversations: Sequence[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        image_tokens: int,
        max_length: int,
        has_image: bool,
    ) -> Encoded:
        """Ids and labels of a dialogue.

        The order is the reference's: cut to `max_length` ids while a picture still counts as one, then give the
        picture its `image_tokens` positions. So the result may be longer than `max_length`.

        Args:
            conversations: turns `{"from": "human" | "gpt", "value": text}`.
            has_image: whether the record names a picture. Only then is `<image>` a placeholder and not a text.

        Raises:
            ValueError: the dialogue does not fit the template, or the tokenizer lacks a token of it.
        """
        self._check(tokenizer)
        pieces = self.pieces(conversations, has_image)
        ids, starts = _tokenise("".join(p.text for p in pieces), _spans(pieces, "said"), tokenizer, has_image)
        labels = _labels(ids, starts, _spans(pieces, "learned"))
        truncated = len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        return Encoded(
            _widen(ids, ids, image_tokens),
            _widen(labels, ids, image_tokens),
            blanked=all(label == IGNORE_INDEX for label in labels),
            truncated=truncated,
            unseen=has_image and IMAGE_TOKEN not in ids,
        )

    def prompt(self, text: str, tokenizer: Tokenizer, *, image_tokens: int, has_image: bool) -> list[int]:
        """Ids of one question with the answer still open. With a picture, `<image>` and a line break are put first
        unless the text already has its tags (several are kept: one placeholder a picture)."""
        self._check(tokenizer)
        if has_image and IMAGE_TAG not in text:
            text = f"{IMAGE_TAG}\n{text}" if text else IMAGE_TAG
        begin = self.open("\0").index("\0")
        ids, _ = _tokenise(self.open(text), [(begin, begin + len(text))], tokenizer, has_image)
        return _widen(ids, ids, image_tokens)

    def stop_ids(self, tokenizer: Tokenizer) -> set[int]:
        """Ids that end an answer."""
        self._check(tokenizer)
        return {tokenizer.eos_id} | ({tokenizer.special_id(self.ends_with)} if self.ends_with else set())

    def _check(self, tokenizer: Tokenizer) -> None:
        if self.ends_with and tokenizer.special_id(self.ends_with) is None:
            raise ValueError(
                f"template {self.name} ends an answer with {self.ends_with}, which is no special token of this "
                "tokenizer: v1 goes with LLaMA tokenizers, chatml with those that know <|im_end|>"
            )


class Plain(Template):
    """Caption pre-training: the picture, its caption, a line break. As in the reference, the human's text is
    dropped."""

    name = "plain"

    def pieces(self, conversations: Sequence[dict[str, Any]], has_image: bool) -> list[Piece]:
        check_turns(conversations)
        misfit = "no caption of a picture"
        if len(conversations) != 2:
            raise DialogueError(
                f"template plain takes one question and one caption, not {len(conversations)} turns", misfit
            )
        if not has_image or IMAGE_TAG not in conversations[0]["value"]:
            raise DialogueError(
                f"template plain needs a picture and {IMAGE_TAG} in the first turn; one of them is missing", misfit
            )
        if conversations[1]["from"] == HUMAN:
            raise DialogueError("template plain learns the second turn, and here the human speaks it", misfit)
        caption = tag_first(conversations[1]["value"])
        return [Piece(IMAGE_TAG), Piece(caption, said=True, learned=True), Piece("\n", learned=True)]

    def open(self, text: str) -> str:
        """The text and a line break; for a bare picture only its tag, which is what the caption follows in training."""
        return text if text == IMAGE_TAG else text + "\n"

    def stop_ids(self, tokenizer: Tokenizer) -> set[int]:
        """A caption ends with its line break; it is never followed by `</s>`."""
        return super().stop_ids(tokenizer) | {tokenizer.encode("a\n")[-1]}


class V1(Template):
    """Vicuna's dialogue: a system sentence, `USER: question ASSISTANT: answer</s>`, and on without a space."""

    name = "v1"
    ends_with = "</s>"
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )

    def pieces(self, conversations: Sequence[dict[str, Any]], has_image: bool) -> list[Piece]:
        pieces = [Piece(self.system)]
        for speaker, said in turns(conversations, has_image):
            answers = speaker == ASSISTANT
            pieces.append(Piece("ASSISTANT:" if answers else "USER:"))
            if said:  # an empty turn is its name alone, without the end of an answer
                end = Piece(self.ends_with, learned=True) if answers else Piece(" ")
                pieces += [Piece(" ", learned=answers), Piece(said, said=True, learned=answers), end]
        return pieces

    def open(self, text: str) -> str:
        return f"{self.system}USER: {text} ASSISTANT:" if text else f"{self.system}USER:ASSISTANT:"


class ChatML(Template):
    """`<|im_start|>user`, the text, `<|im_end|>`; no system message unless the data bring one. The end is learned."""

    name = "chatml"
    ends_with = "<|im_end|>"

    def pieces(self, conversations: Sequence[dict[str, Any]], has_image: bool) -> list[Piece]:
        pieces = []
        for speaker, said in turns(conversations, has_image):
            learned = speaker == ASSISTANT and said != ""
            pieces += [
                Piece(f"<|im_start|>{'user' if speaker == HUMAN else 'assistant'}\n"),
                Piece(said, said=True, learned=learned),
                Piece(self.ends_with, learned=learned),
                Piece("\n"),
            ]
        return pieces

    def open(self, text: str) -> str:
        return f"<|im_start|>user\n{text}{self.ends_with}\n<|im_start|>assistant\n"


TEMPLATES: dict[str, type[Template]] = {t.name: t for t in (Plain, V1, ChatML)}


def template(name: str) -> Template:
    """The template of a name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"no template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]()


def tag_first(text: str) -> str:
    """A turn with an image tag, answers included, is rewritten as the reference does: its tags go, the rest is
    stripped, and one tag and a line break are put first. Other turns stay as they are.

    Raises:
        DialogueError: without its tags the text has a new one, which would be a second picture's place.
    """
    if IMAGE_TAG not in text:
        return text
    rest = text.replace(IMAGE_TAG, "").strip()
    if IMAGE_TAG in rest:
        raise DialogueError(f"there is an {IMAGE_TAG} inside an {IMAGE_TAG}", "several placeholders")
    return f"{IMAGE_TAG}\n{rest}".strip()


def turns(conversations: Sequence[dict[str, Any]], has_image: bool) -> list[tuple[str, str]]:
    """(speaker, text) of each turn, the image tag moved first where there is a picture; a leading answer is skipped.

    Raises:
        DialogueError: no turn, a speaker that is neither human nor gpt, two turns of the same one after each other, or none of the human.
    """
    check_turns(conversations)
    for number, turn in enumerate(conversations, 1):
        if turn["from"] not in (HUMAN, ASSISTANT):
            raise DialogueError(
                f"turn {number} is spoken by {turn['from'][:40]!r}, who is neither {HUMAN!r} nor {ASSISTANT!r}",
                "unknown speaker",
            )
    kept = conversations[1:] if conversations[0]["from"] == ASSISTANT else conversations
    for number, turn in enumerate(kept):
        if turn["from"] != (HUMAN, ASSISTANT)[number % 2]:
            number += 1 + len(conversations) - len(kept)
            raise DialogueError(
                f"turn {number} is a second one of {turn['from']!r} in a row; speakers must alternate",
                "speakers do not alternate",
            )
    if not kept:
        raise DialogueError("the human has no turn: an answer without a question is not learned", "no human turn")
    return [(turn["from"], tag_first(turn["value"]) if has_image else turn["value"]) for turn in kept]


def check_turns(conversations: Sequence[dict[str, Any]]) -> None:
    """Raises DialogueError unless the dialogue is a list of at least one `{"from": text, "value": text}`."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise DialogueError("`conversations` must be a list of at least one turn")
    for number, turn in enumerate(conversations, 1):
        for field in ("from", "value"):
            if not isinstance(turn, dict) or not isinstance(turn.get(field), str):
                raise DialogueError(f"turn {number} has no text in `{field}`")


def _spans(pieces: Sequence[Piece], which: str) -> list[tuple[int, int]]:
    """Spans of the pieces that have a mark, neighbours as one."""
    spans: list[tuple[int, int]] = []
    for piece, end in zip(pieces, accumulate(len(piece.text) for piece in pieces), strict=True):
        if getattr(piece, which) and piece.text:
            begin = end - len(piece.text)
            if spans and spans[-1][1] == begin:
                begin = spans.pop()[0]
            spans.append((begin, end))
    return spans


def _tokenise(text: str, said: Spans, tokenizer: Tokenizer, has_image: bool) -> tuple[list[int], list[int]]:
    """Ids of a text and where each begins; with a picture the text is cut at its tags first, as the reference does."""
    ids, starts, begin = [], [], 0
    if tokenizer.bos_id is not None:
        ids, starts = [tokenizer.bos_id], [-1]
    for number, part in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
        if number:
            ids.append(IMAGE_TOKEN)
            starts.append(begin - len(IMAGE_TAG))
        inside = [(max(a - begin, 0), min(b - begin, len(part))) for a, b in said]
        part_ids, part_starts = tokenizer.encode_with_starts(part, [(a, b) for a, b in inside if a < b])
        ids += part_ids
        starts += [begin + s for s in part_starts]
        begin += len(part) + len(IMAGE_TAG)
    return ids, starts


def _labels(ids: list[int], starts: list[int], spans: Spans) -> list[int]:
    """The ids that begin inside a span, IGNORE_INDEX elsewhere and at pictures."""
    labels, later = [IGNORE_INDEX] * len(ids), 0
    for k, start in enumerate(starts):
        while later < len(spans) and start >= spans[later][1]:
            later += 1
        if later < len(spans) and start >= spans[later][0] and ids[k] != IMAGE_TOKEN:
            labels[k] = ids[k]
    return labels


def _widen(values: list[int], ids: list[int], image_tokens: int) -> list[int]:
    """Each value once, those at a picture `image_tokens` times."""
    return [v for v, i in zip(values, ids, strict=True) for _ in range(image_tokens if i == IMAGE_TOKEN else 1)]
