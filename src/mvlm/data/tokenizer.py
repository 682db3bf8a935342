"""Text to ids and back: the LLaMA tokenizer as the reference had it, and byte-level BPE for the pocket model.

The reference trained with the *slow* LLaMA tokenizer of transformers 4.33, which later versions no longer reproduce:
they treat the space after a special token, leading spaces and stray bytes differently. Calling sentencepiece directly
on the stretches between special tokens does reproduce it, and this file does just that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

UNDERLINE = "\u2581"
"""What sentencepiece writes for a space."""

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a serialised model: normalizer_spec (field 3) with add_dummy_prefix (field 3) off. Protocol buffers
merge by concatenation, so the rest of the model stays and no protobuf package is needed."""


Spans = Sequence[tuple[int, int]]
"""(first character, one past the last) of stretches of a text."""


class Tokenizer(Protocol):
    """What the templates need of a tokenizer."""

    bos_id: int | None
    """Id that opens a text, or None if this tokenizer opens texts with nothing."""
    eos_id: int
    pad_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens inside it parsed, nothing added in front."""
        ...

    def encode_with_starts(self, text: str, said: Spans = ()) -> tuple[list[int], list[int]]:
        """Ids, and for each the index of the character of `text` at which it begins (never decreasing).

        In the stretches `said`, ascending, a special token's name is text like any other: nobody can say a control token.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens and picture placeholders left out."""
        ...

    def special_id(self, piece: str) -> int | None:
        """Id of a special token such as `</s>`, or None if this tokenizer has none of that name."""
        ...


class SentencePieceTokenizer:
    """The slow LLaMA tokenizer, `legacy` or not, exactly.

    Args:
        path: a `tokenizer.model`, or the folder that holds it (with `added_tokens.json`, where there is one).
        legacy: True opens every stretch of text after a special token with a space of its own; False opens only the
            first one (transformers' repair of it, `"legacy": false` in `tokenizer_config.json`).

    Raises:
        ValueError: no such file, or a tokenizer without the tokens that begin and end a text.
    """

    def __init__(self, path: str | Path, legacy: bool = True) -> None:
        path = Path(path)
        model = path / "tokenizer.model" if path.is_dir() else path
        if not model.is_file():
            raise ValueError(f"no tokenizer at {model}: give a tokenizer.model or the folder that holds one")
        serialised = model.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(
                model_proto=serialised + (b"" if legacy else NO_DUMMY_PREFIX)
            )
        except RuntimeError as error:
            raise ValueError(f"{model} is not a sentencepiece model: {error}") from error
        if min(self._model.bos_id(), self._model.eos_id(), self._model.unk_id()) < 0:
            raise ValueError(f"{model} lacks <s>, </s> or <unk>; a LLaMA tokenizer has all three")
        self.legacy = legacy
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.pad_id = self._model.unk_id()  # the reference pads with <unk>
        self._specials = {self._model.id_to_piece(i): i for i in (self.pad_id, self.bos_id, self.eos_id)}
        added = model.parent / "added_tokens.json"
        if added.is_file():
            self._specials |= json.loads(added.read_text(encoding="utf-8"))
        self._names = {i: piece for piece, i in self._specials.items()}
        self.vocab_size = max(self._model.get_piece_size(), *(i + 1 for i in self._names))
        self._split = _any_of(self._specials)
        # Bytes of text behind each piece: a byte token is one byte, and a space (three bytes as an underline) is one.
        pieces = range(self._model.get_piece_size())
        self._bytes = [
            1 if self._model.is_byte(i) else len(self._model.id_to_piece(i).replace(UNDERLINE, " ").encode())
            for i in pieces
        ]
        self._unknown = self._model.id_to_piece(self.pad_id)
        self._unknown_pieces = len(self._model.encode(self._unknown))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens inside it parsed, no `<s>` added."""
        return [i for _, _, _, ids in self._parts(text) for i in ids]

    def encode_with_starts(self, text: str, said: Spans = ()) -> tuple[list[int], list[int]]:
        """Ids, and for each the index of the character at which it begins (all bytes of one at the same).

        Raises:
            ValueError: the model's normaliser changes the text's length, so its pieces cannot be laid over the text.
        """
        ids, starts = [], []
        for begin, part, special, part_ids in self._parts(text, said):
            ids += part_ids
            starts += [begin] if special else [begin + s for s in self._starts(part, part_ids, begin == 0)]
        return ids, starts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens and picture placeholders left out; stray bytes become U+FFFD."""
        text = self._model.decode([int(i) for i in ids if 0 <= i < len(self._bytes) and i not in self._names])
        # Without its dummy prefix sentencepiece keeps the first space, which the slow tokenizer drops either way.
        return text if self.legacy else text.removeprefix(" ")

    def special_id(self, piece: str) -> int | None:
        """Id of a special token, or None."""
        return self._specials.get(piece)

    def _parts(self, text: str, said: Spans = ()) -> Iterator[tuple[int, str, bool, list[int]]]:
        """Special tokens and the stretches between them: (index of the first character, text, which of the two, ids)."""
        for begin, part, special in _stretches(text, self._split, said):
            yield begin, part, special, [self._specials[part]] if special else self._encode(part, begin == 0)

    def _encode(self, part: str, first: bool) -> list[int]:
        """A stretch of text."""
        return self._model.encode(part) if self.legacy else self._encode_repaired(part, first)

    def _encode_repaired(self, part: str, first: bool) -> list[int]:
        """A stretch without `legacy`: only the first gets a space in front; the text `<unk>` guards leading spaces."""
        part = (UNDERLINE if first else "") + part.replace(UNDERLINE, " ")
        if part.startswith((UNDERLINE, " ")):
            return self._model.encode(self._unknown + part)[self._unknown_pieces :]
        return self._model.encode(part)

    def _starts(self, part: str, ids: list[int], first: bool) -> list[int]:
        """Index of the character of `part` at which each piece begins."""
        prefix = 1 if self.legacy or first else 0  # the space that was put in front belongs to the first character
        ends = list(accumulate(self._bytes[i] for i in ids))
        widths = [len(c.encode()) for c in part.replace(UNDERLINE, " ")]
        if ends[-1] != prefix + sum(widths):
            raise ValueError(
                f"the tokenizer rewrote {part[:60]!r} ({prefix + sum(widths)} bytes became {ends[-1]}): its "
                "normaliser is not the identity, so answers cannot be found in its pieces; use a LLaMA tokenizer"
            )
        character = [0] * prefix + [k for k, width in enumerate(widths) for _ in range(width)]
        return [character[begin] for begin in [0, *ends[:-1]]]


class FastTokenizer:
    """A tokenizer described by a `tokenizer.json` (byte-level BPE of today's small chat models).

    Args:
        folder: holds `tokenizer.json` and `tokenizer_config.json` (names of the special tokens, and `add_bos_token`).

    Raises:
        ValueError: a file is missing, or it names no token that ends a text.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        files = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if missing := [f.name for f in files if not f.is_file()]:
            raise ValueError(f"the tokenizer folder {folder} lacks {' and '.join(missing)}")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(files[0]))
        self._tokenizer.post_processor = None  # it may add tokens, and it moves offsets past leading spaces
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = json.loads(files[1].read_text(encoding="utf-8"))
        self.vocab_size = self._tokenizer.get_vocab_size()
        self._specials = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self._split = _any_of(self._specials)

        def named(key: str) -> int | None:
            value = config.get(key)
            return (
                self._tokenizer.token_to_id(value["content"] if isinstance(value, dict) else value) if value else None
            )

        self.bos_id = named("bos_token") if config.get("add_bos_token", False) else None
        eos = named("eos_token")
        if eos is None:
            raise ValueError(f"{files[1]} names no `eos_token` of the vocabulary: generation could not stop")
        self.eos_id = eos
        self.pad_id = eos if (pad := named("pad_token")) is None else pad

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens inside it parsed, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_starts(self, text: str, said: Spans = ()) -> tuple[list[int], list[int]]:
        """Ids, and for each the index of the character at which it begins."""
        if not any(self._split.search(text, *span) for span in said):
            return self._plain(text, 0)
        ids, starts = [], []  # a special token's name is said: the library can treat all of them as text, or none
        self._tokenizer.encode_special_tokens = True
        try:
            for begin, part, special in _stretches(text, self._split, said):
                some = ([self._specials[part]], [begin]) if special else self._plain(part, begin)
                ids, starts = ids + some[0], starts + some[1]
        finally:
            self._tokenizer.encode_special_tokens = False
        return ids, starts

    def _plain(self, text: str, at: int) -> tuple[list[int], list[int]]:
        """Ids and starts of a text that begins at a character."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [at + begin for begin, _ in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens and picture placeholders left out."""
        return self._tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)

    def special_id(self, piece: str) -> int | None:
        """Id of a special token, or None."""
        return self._specials.get(piece)


def _any_of(specials: Iterable[str]) -> re.Pattern[str]:
    """Finds special tokens; of two that begin alike the longer one. Nothing, where there is none."""
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")


def _stretches(text: str, specials: re.Pattern[str], said: Spans) -> Iterator[tuple[int, str, bool]]:
    """Special tokens outside of what is said, and all between them: (index of the first character, text, whether special)."""
    begin, outside = 0, 0
    for said_from, said_to in [*said, (len(text), len(text))]:
        for match in specials.finditer(text, outside, said_from):
            if begin < match.start():
                yield begin, text[begin : match.start()], False
            yield match.start(), match.group(), True
            begin = match.end()
        outside = said_to
    if begin < len(text):
        yield begin, text[begin:], False


def load_tokenizer(folder: str | Path) -> SentencePieceTokenizer | FastTokenizer:
    """The tokenizer of a model's folder: sentencepiece where there is a `tokenizer.model`, else the `tokenizer.json`.

    `legacy` is taken from `tokenizer_config.json`; where it is not said it is True, as it was for the reference.
    """
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        config = folder / "tokenizer_config.json"
        legacy = json.loads(config.read_text(encoding="utf-8")).get("legacy") if config.is_file() else None
        return SentencePieceTokenizer(folder, legacy=legacy is not False)
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder)
    raise ValueError(f"no tokenizer in {folder}: it holds neither tokenizer.model nor tokenizer.json")
