"""The vocabulary and the chat template inside the language model's file.

llama.cpp tokenises by itself: sentencepiece (MobileLLaMA, Vicuna) from pieces and scores, byte-level BPE (SmolLM2) from
tokens, merges and the *name* of a rule that splits text into words. It cuts a prompt at its picture and tokenises both
pieces on their own, as `mvlm.data.prompt` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from mvlm.data.prompt import V1, ChatML, Template
from mvlm.data.tokenizer import FastTokenizer, SentencePieceTokenizer

USER_SAYS = (
    "{% if m.content is string %}{{ m.content | replace('__>', '__>\\n') }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text | replace('__>', '__>\\n') }}{% endif %}{% endfor %}{% endif %}"
)
"""A message's text. llama.cpp puts a marker that ends in `__>` where its picture was; our prompts have a line break there."""

TEMPLATES = {
    V1.name: (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }} {% else %}" + V1.system + "{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}USER: " + USER_SAYS + " "
        "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    ChatML.name: (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}" + USER_SAYS + "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
"""Jinja for each template of `mvlm.data.prompt` that can hold a conversation. No `<s>`: llama.cpp puts it in front itself."""

DIGITS, BYTES = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}

WORD_RULES = {
    "smollm": [DIGITS, BYTES],
    "gpt-2": [BYTES],
}
"""llama.cpp's name of a splitting rule -> what a `tokenizer.json` says for it."""


def vocabulary(words: SentencePieceTokenizer | FastTokenizer, folder: Path, size: int) -> dict[str, Any]:
    """The metadata of a tokenizer.

    Args:
        words: the tokenizer.
        folder: where it was read from.
        size: rows of the model's embedding; those without a token get a name that nothing is tokenised to.

    Raises:
        ValueError: llama.cpp has no rule for it, or it has more tokens than the model.
    """
    if words.vocab_size > size:
        raise ValueError(
            f"the tokenizer has {words.vocab_size} tokens and the model {size} rows: one is of another model"
        )
    tokens, kinds, own = _pieces(folder) if isinstance(words, SentencePieceTokenizer) else _bpe(folder)
    unused = range(len(tokens), size)
    tokens += [f"[PAD{number}]" for number in unused]
    kinds += [TokenType.UNUSED] * len(unused)
    if "tokenizer.ggml.scores" in own:
        own["tokenizer.ggml.scores"] += [np.float32(-1000)] * len(unused)
    return {
        **own,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [np.int32(kind) for kind in kinds],
        "tokenizer.ggml.eos_token_id": np.uint32(words.eos_id),
        "tokenizer.ggml.padding_token_id": np.uint32(words.pad_id),
        "tokenizer.ggml.add_bos_token": words.bos_id is not None,
        "tokenizer.ggml.add_eos_token": False,
        **({} if words.bos_id is None else {"tokenizer.ggml.bos_token_id": np.uint32(words.bos_id)}),
    }


def chat_template(talk: Template) -> dict[str, Any]:
    """The metadata by which llama.cpp's own chat writes our prompts.

    Raises:
        ValueError: the template holds no conversation.
    """
    if talk.name not in TEMPLATES:
        raise ValueError(
            f"template {talk.name} is no conversation, so llama.cpp's chat can't speak it: "
            f"export a model whose last stage was trained with {' or '.join(TEMPLATES)}"
        )
    return {"tokenizer.chat_template": TEMPLATES[talk.name]}


Vocabulary = tuple[list[str], list[TokenType], dict[str, Any]]
"""Tokens, their kinds, and what else this sort of tokenizer needs."""


def _pieces(folder: Path) -> Vocabulary:
    """A sentencepiece model and the tokens added to it."""
    model = ModelProto.FromString((folder / "tokenizer.model" if folder.is_dir() else folder).read_bytes())
    tokens = [piece.piece for piece in model.pieces]
    kinds = [TokenType(piece.type) for piece in model.pieces]  # GGUF's numbers are sentencepiece's
    scores = [piece.score for piece in model.pieces]
    added = (folder if folder.is_dir() else folder.parent) / "added_tokens.json"
    extra = json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}
    for token, i in sorted(extra.items(), key=lambda pair: pair[1]):
        if i != len(tokens):
            raise ValueError(f"{added}: {token} has the id {i} where {len(tokens)} is next: ids must follow on")
        tokens, kinds, scores = [*tokens, token], [*kinds, TokenType.USER_DEFINED], [*scores, -1000.0]
    return (
        tokens,
        kinds,
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [np.float32(score) for score in scores],
            "tokenizer.ggml.unknown_token_id": np.uint32(kinds.index(TokenType.UNKNOWN)),
            "tokenizer.ggml.add_space_prefix": True,
        },
    )


def _bpe(folder: Path) -> Vocabulary:
    """A `tokenizer.json` of byte-level BPE."""
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    model, added = told["model"], told.get("added_tokens", [])
    if model["type"] != "BPE" or model.get("byte_fallback") or told.get("normalizer"):
        raise ValueError(f"{path} is no plain byte-level BPE: give the folder of the tokenizer.model, if it has one")
    names = {i: token for token, i in model["vocab"].items()} | {one["id"]: one["content"] for one in added}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{path}: the ids of its {len(names)} tokens have gaps, and llama.cpp counts without")
    kinds = dict.fromkeys(names, TokenType.NORMAL)
    kinds |= {one["id"]: TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED for one in added}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return (
        [names[i] for i in range(len(names))],
        [kinds[i] for i in range(len(names))],
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _word_rule(path, told["pre_tokenizer"]),
            # GGUF has no empty list: a tokenizer without merges gets one that no text can meet, of a special token with itself
            "tokenizer.ggml.merges": merges or [f"{names[0]} {names[0]}"],
        },
    )


def _word_rule(path: Path, splits: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits text into words.

    Raises:
        ValueError: it has none, that is known here.
    """
    steps = splits["pretokenizers"] if splits["type"] == "Sequence" else [splits]
    for name, rule in WORD_RULES.items():
        if len(rule) == len(steps) and all(
            want.items() <= step.items() for want, step in zip(rule, steps, strict=True)
        ):
            return name
    raise ValueError(
        f"{path} splits text into words by {json.dumps(splits)}, and llama.cpp's name for that is not known here: "
        "add it to WORD_RULES in mvlm/export/tokenizer.py"
    )
