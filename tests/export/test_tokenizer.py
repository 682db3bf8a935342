"""The vocabulary as llama.cpp wants it, and a chat template that writes the prompts of `mvlm.data.prompt`."""

from __future__ import annotations

import json
import shutil

import jinja2
import pytest
import tokenizers
from gguf import TokenType
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from mvlm.data.prompt import IMAGE_TAG, Plain, template
from mvlm.data.tokenizer import load_tokenizer
from mvlm.export import tokenizer
from mvlm.export.engine import MARKER

from .conftest import REFERENCE


def rendered(name: str, messages: list[dict]) -> str:
    return jinja2.Template(tokenizer.TEMPLATES[name]).render(messages=messages, add_generation_prompt=True)


def as_text(question: str, picture: bool) -> str:
    """As llama.cpp's server hands a message to the template: the picture is a marker, joined without a line break."""
    return (MARKER if picture else "") + question


def as_parts(question: str, picture: bool) -> list[dict]:
    """As other programs on llama.cpp do."""
    return [{"type": "text", "text": text} for text in ([MARKER] if picture else []) + [question]]


@pytest.mark.parametrize("content", [as_text, as_parts])
@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("name", ["v1", "chatml"])
def test_the_chat_writes_our_prompts(name, picture, content):
    talk = template(name)
    question = "Which?\nA. a __ b\n B. 'c'"
    ours = talk.open(f"{IMAGE_TAG}\n{question}" if picture else question).replace(IMAGE_TAG, MARKER)
    assert rendered(name, [{"role": "user", "content": content(question, picture)}]) == ours


@pytest.mark.parametrize("name", ["v1", "chatml"])
def test_a_conversation_goes_on_as_it_was_trained(name):
    """The template's own rendering of three turns, up to where the next answer begins."""
    said = [("human", f"{IMAGE_TAG}\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")]
    whole, spans = template(name).render([{"from": who, "value": text} for who, text in said], has_image=True)
    messages = [
        {"role": "user", "content": as_text("What?", True)},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    assert rendered(name, messages) == whole[: spans[-1][0]].replace(IMAGE_TAG, MARKER)


def test_a_template_without_conversation_is_refused():
    with pytest.raises(ValueError, match=r"template plain is no conversation.*trained with v1 or chatml"):
        tokenizer.chat_template(Plain())


def test_pieces_with_scores_and_kinds():
    folder = REFERENCE / "tokenizer"
    words = load_tokenizer(folder)
    table = tokenizer.vocabulary(words, folder, words.vocab_size + 2)
    kinds, tokens = table["tokenizer.ggml.token_type"], table["tokenizer.ggml.tokens"]
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and tokens[-2:] == ["[PAD384]", "[PAD385]"]
    assert kinds[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert kinds[-3:] == [TokenType.NORMAL, TokenType.UNUSED, TokenType.UNUSED]
    assert len(table["tokenizer.ggml.scores"]) == len(tokens) == len(kinds) == 386
    assert table["tokenizer.ggml.add_bos_token"] and table["tokenizer.ggml.bos_token_id"] == 1


def test_added_pieces_follow_on(tmp_path):
    shutil.copytree(REFERENCE / "tokenizer", tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text(json.dumps({"<b>": 385, "<a>": 384}))
    words = load_tokenizer(tmp_path / "t")
    table = tokenizer.vocabulary(words, tmp_path / "t", 386)
    assert table["tokenizer.ggml.tokens"][-2:] == ["<a>", "<b>"]
    assert table["tokenizer.ggml.token_type"][-1] == TokenType.USER_DEFINED
    (tmp_path / "t" / "added_tokens.json").write_text(json.dumps({"<b>": 386}))
    with pytest.raises(ValueError, match=r"<b> has the id 386 where 384 is next"):
        tokenizer.vocabulary(load_tokenizer(tmp_path / "t"), tmp_path / "t", 387)


def test_pieces_that_are_never_split_stay_whole(tmp_path):
    """sentencepiece's user-defined symbols; llama.cpp would split them if they were common ones."""
    folder = tmp_path / "t"
    shutil.copytree(REFERENCE / "tokenizer", folder)
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.pieces[300].piece, model.pieces[300].type = "<box>", ModelProto.SentencePiece.USER_DEFINED
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    words = load_tokenizer(folder)
    assert 300 in words.encode("Where is the <box> here?"), "as Python's sentencepiece reads it"
    table = tokenizer.vocabulary(words, folder, words.vocab_size)
    assert table["tokenizer.ggml.tokens"][300] == "<box>"
    assert table["tokenizer.ggml.token_type"][300] == TokenType.USER_DEFINED


def test_bytes_and_specials(bytes_folder):
    table = tokenizer.vocabulary(load_tokenizer(bytes_folder), bytes_folder, 259)
    assert table["tokenizer.ggml.token_type"] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 256
    assert table["tokenizer.ggml.pre"] == "gpt-2" and table["tokenizer.ggml.eos_token_id"] == 2
    assert not table["tokenizer.ggml.add_bos_token"] and "tokenizer.ggml.bos_token_id" not in table


def test_more_tokens_than_rows_is_refused(bytes_folder):
    with pytest.raises(ValueError, match=r"the tokenizer has 259 tokens and the model 200 rows"):
        tokenizer.vocabulary(load_tokenizer(bytes_folder), bytes_folder, 200)


@pytest.mark.parametrize(
    "splits, told",
    [
        (
            [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)],
            "smollm",
        ),
        ([tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([tokenizers.pre_tokenizers.Digits(False), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
        ([tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
    ],
)
def test_the_rule_for_words_has_llama_cpps_name(bytes_folder, tmp_path, splits, told):
    shutil.copytree(bytes_folder, tmp_path / "t")
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    file.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits) if len(splits) > 1 else splits[0]
    file.save(str(tmp_path / "t" / "tokenizer.json"))
    words = load_tokenizer(tmp_path / "t")
    if told:
        assert tokenizer.vocabulary(words, tmp_path / "t", 259)["tokenizer.ggml.pre"] == told
    else:
        with pytest.raises(ValueError, match=r"splits text into words by .*add it to WORD_RULES"):
            tokenizer.vocabulary(words, tmp_path / "t", 259)


def test_another_kind_of_bpe_is_refused(bytes_folder, tmp_path):
    shutil.copytree(bytes_folder, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["byte_fallback"] = True
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"is no plain byte-level BPE"):
        tokenizer.vocabulary(load_tokenizer(tmp_path / "t"), tmp_path / "t", 259)
