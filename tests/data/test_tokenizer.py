"""The tokenizer against the ids that the reference's slow tokenizer gave, and against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm.batch import IMAGE_TOKEN
from mvlm.data.tokenizer import FastTokenizer, SentencePieceTokenizer, load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TOKENS = json.loads((REFERENCE / "text/prompts_and_tokens.json").read_text())["tokens"]
KINDS = ["tokenizer", "tokenizer_nonlegacy"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_reference(kind):
    tokenizer = load_tokenizer(REFERENCE / kind)
    assert tokenizer.legacy == (kind == "tokenizer")
    for case in TOKENS[kind]["plain_call"]:
        assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == case["input_ids"], case["text"]
    for case in TOKENS[kind]["tokenizer_image_token"]:
        ids = [tokenizer.bos_id]
        for k, part in enumerate(case["text"].split("<image>")):
            ids += [IMAGE_TOKEN] * (k > 0) + tokenizer.encode(part)
        assert ids == case["input_ids"], case["text"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_equals_the_reference(kind):
    tokenizer = load_tokenizer(REFERENCE / kind)
    for case in TOKENS[kind]["decode_skip_special"]:
        assert tokenizer.decode(case["ids"]) == case["text"], case["ids"]


TEXT = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(["</s>", "<s>", "<unk>", " ", "  ", "\u2581", "\n", "é🚋"])),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("legacy", [True, False])
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_starts_lie_over_the_text(legacy, text):
    """Cutting the text at the starts and encoding nothing else: each special token begins where it stands, and none
    goes back."""
    tokenizer = SentencePieceTokenizer(REFERENCE / "tokenizer", legacy=legacy)
    ids, starts = tokenizer.encode_with_starts(text)
    assert ids == tokenizer.encode(text)
    assert starts == sorted(starts)
    assert all(0 <= s < len(text) for s in starts)
    for i, start in zip(ids, starts, strict=True):
        if i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id):
            assert text.startswith(("<s>", "</s>", "<unk>"), start)


def test_starts_of_a_known_text():
    tokenizer = SentencePieceTokenizer(REFERENCE / "tokenizer")
    ids, starts = tokenizer.encode_with_starts("The ï</s> re")
    # pieces: "▁The", "▁", the two bytes of ï, "</s>", then "▁" (put in front) and "▁re"
    assert (ids, starts) == ([280, 331, 198, 178, 2, 331, 324], [0, 3, 4, 4, 5, 9, 9])


def test_fast_tokenizer(fast_folder):
    tokenizer = load_tokenizer(fast_folder)
    assert isinstance(tokenizer, FastTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, 0)
    text = "<|im_start|>user\n hello <|im_end|>"
    ids, starts = tokenizer.encode_with_starts(text)
    assert ids[0] == tokenizer.special_id("<|im_start|>") and ids[-1] == tokenizer.special_id("<|im_end|>")
    assert starts[-1] == text.index("<|im_end|>")
    assert text.index(" hello") in starts  # not trimmed past the space
    assert tokenizer.decode([IMAGE_TOKEN, *ids]) == "user\n hello "


def test_what_is_wrong_is_said(tmp_path, fast_folder):
    with pytest.raises(ValueError, match=r"neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        SentencePieceTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a sentencepiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast/tokenizer.json").write_text((fast_folder / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match=r"lacks tokenizer_config.json"):
        FastTokenizer(tmp_path / "fast")
    (tmp_path / "fast/tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="eos_token"):
        FastTokenizer(tmp_path / "fast")
