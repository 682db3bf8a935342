"""Ids and labels against the reference's, and labels by a second way: what is labelled, decoded, is the answers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN
from mvlm.data.prompt import IMAGE_TAG, template
from mvlm.data.tokenizer import SentencePieceTokenizer, load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
KINDS = ["tokenizer", "tokenizer_nonlegacy"]
FILES = {("v1", k): "v1" + k.removeprefix("tokenizer") for k in KINDS} | {
    ("plain", k): "plain" + k.removeprefix("tokenizer") for k in KINDS
}

BLANKED = {
    "empty_second_answer": "the last answer is empty, so the last round has no end and the lengths disagree",
    "eos_text_in_answer": "</s> inside the answer cuts it into two rounds",
    "unk_text_in_answer": "<unk> inside the answer is counted as padding",
    "assistant_word_in_answer": "' ASSISTANT: ' inside the answer makes three parts of a round",
    "human_ends": "the last turn is the human's, a round without an answer",
}
"""Cases whose labels the reference drops by its mismatch bug and which are labelled here: name and reason."""

BLANKED_REPAIRED = {
    "multi_turn_image": "without `legacy`, USER has another piece at the start of a round than after </s>",
    "multi_turn_text_only": "as multi_turn_image",
    "image_in_second_turn": "as multi_turn_image",
}
"""The same for the tokenizer that is not `legacy`, besides those above."""

SAID = {"eos_text_in_answer": "</s>", "unk_text_in_answer": "<unk>", "bos_text_in_question": "<s>"}
"""Cases in which somebody says a special token's name. The reference puts the token in its place; here it is text."""

NOTHING_TO_LEARN = {"empty_answer"}
"""The reference blanks it, and rightly: there is no answer."""

REFUSED = {
    "text_only_with_tag_text": "the record has no picture; the reference gives it a placeholder for an all-zero one",
}
"""Cases of `plain` that raise here although the reference goes on."""


def cases(version, kind):
    return json.loads((REFERENCE / f"text/{FILES[version, kind]}.json").read_text())["cases"]


def encode(case, version, tokenizer, image_tokens=1, max_length=None):
    return template(version).encode(
        case["record"]["conversations"],
        tokenizer,
        image_tokens=image_tokens,
        max_length=max_length or case["model_max_length"],
        has_image=case["has_image"],
    )


def unlabelled_pictures(labels):
    return [IGNORE_INDEX if i == IMAGE_TOKEN else i for i in labels]


@pytest.mark.parametrize(("version", "kind"), FILES)
def test_equal_the_reference(version, kind):
    tokenizer = load_tokenizer(REFERENCE / kind)
    blanked = BLANKED | (BLANKED_REPAIRED if kind == "tokenizer_nonlegacy" else {}) if version == "v1" else {}
    compared, labelled_here, said_here = 0, set(), set()
    for case in cases(version, kind):
        name, length = case["name"], case["model_max_length"]
        if case["error"] or (version == "plain" and name in REFUSED):
            with pytest.raises(ValueError, match=r"turn|picture"):
                encode(case, version, tokenizer)
            continue
        ours = encode(case, version, tokenizer)
        if name in SAID and not (version == "plain" and name == "bos_text_in_question"):  # plain drops the question
            special = tokenizer.special_id(SAID[name])
            assert case["input_ids"].count(special) == ours.input_ids.count(special) + 1, name
            assert SAID[name] in tokenizer.decode(ours.input_ids) and not ours.blanked, name
            said_here.add(name)
            continue
        # Records with a picture are cut to the limit only when the reference collates them.
        assert ours.input_ids == case["input_ids"][:length], name
        expected = unlabelled_pictures(case["labels"][:length])
        assert ours.truncated == (len(encode(case, version, tokenizer, max_length=10**6).input_ids) > length), name
        if name in blanked:
            assert case["printed"] and set(expected) == {IGNORE_INDEX}, name
            assert not ours.blanked, name
            labelled_here.add(name)
        else:
            assert not case["printed"] or name in NOTHING_TO_LEARN, name
            assert ours.labels == expected, name
            assert ours.blanked == (set(expected) == {IGNORE_INDEX}), name
        compared += 1
    assert labelled_here == set(blanked) - set(SAID)
    assert (compared, len(said_here)) == {"v1": (25, 3), "plain": (14, 2)}[version]  # of 30; the rest raise


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers(kind):
    """Where the reference gives no labels to compare with: decoded, ours are the answers, one after the other."""
    tokenizer = load_tokenizer(REFERENCE / kind)
    for case in cases("v1", kind):
        if case["name"] not in BLANKED | BLANKED_REPAIRED:
            continue
        ours = encode(case, "v1", tokenizer)
        answers = [t["value"] for t in case["record"]["conversations"] if t["from"] == "gpt" and t["value"]]
        runs = labelled_runs(ours.labels)
        assert len(runs) == len(answers)
        for run, answer in zip(runs, answers, strict=True):
            assert run[-1] == tokenizer.eos_id
            assert tokenizer.decode(run) == answer, case["name"]


def labelled_runs(labels):
    runs, open_run = [], False
    for i in labels:
        if i != IGNORE_INDEX:
            runs = runs if open_run else [*runs, []]
            runs[-1].append(i)
        open_run = i != IGNORE_INDEX
    return runs


@pytest.mark.parametrize(("kind", "image_tokens"), [("ldpnetv2", 144), ("ldpnet", 144), ("mlp2x_gelu", 576)])
@pytest.mark.parametrize("version", ["v1", "plain"])
def test_pictures_take_their_places(kind, image_tokens, version):
    """Labels of the reference's training batches after its model spliced the picture in; here the data makes the
    room."""
    tokenizer = load_tokenizer(REFERENCE / "tokenizer")
    batch = next(
        b
        for b in json.loads((REFERENCE / "text/batches.json").read_text())
        if b["name"] == {"v1": "v1_mixed_pad", "plain": "plain_pad"}[version]
    )
    tensors = load_file(REFERENCE / f"tensors/{kind}.safetensors")
    expected = tensors[f"{version}.expanded_labels"]
    mask = tensors[f"{version}.expanded_attention_mask"].bool()
    for row, record in enumerate(batch["records"]):
        case = {"record": record, "has_image": "image" in record, "model_max_length": batch["model_max_length"]}
        ours = encode(case, version, tokenizer, image_tokens)
        length = len(ours.labels)
        assert ours.labels == expected[row, :length].tolist()
        assert torch.all(expected[row, length:] == IGNORE_INDEX)
        assert ours.input_ids.count(IMAGE_TOKEN) == image_tokens * case["has_image"]
        assert mask[row, :length].all()


def test_prompts_equal_the_reference():
    tokenizer = load_tokenizer(REFERENCE / "tokenizer")
    prompts = json.loads((REFERENCE / "model/ldpnetv2.json").read_text())["prompts"]
    for name, case in prompts.items():
        has_image, text = bool(case["images"]), case["user_text"]
        ids = template("v1").prompt(text, tokenizer, image_tokens=1, has_image=has_image)
        assert ids == case["input_ids"], name
        if text.count(IMAGE_TAG) == 1:  # the tag is put first where a question comes without one
            bare = text.removeprefix(f"{IMAGE_TAG}\n")
            assert template("v1").prompt(bare, tokenizer, image_tokens=1, has_image=True) == ids
        wide = template("v1").prompt(text, tokenizer, image_tokens=144, has_image=has_image)
        assert len(wide) == case["sequence_length"]
    rendered = json.loads((REFERENCE / "text/prompts_and_tokens.json").read_text())["prompts"]
    for case in rendered:
        if [m[1] for m in case["messages"]][1:] == [None]:
            assert template(case["version"]).open(case["messages"][0][1]) == case["prompt"]


@pytest.mark.parametrize("name", ["plain", "v1", "chatml"])
def test_a_prompt_is_how_training_begins(name, fast_folder):
    """The ids before the first label of a sample are the ids of its prompt."""
    tokenizer = load_tokenizer(fast_folder if name == "chatml" else REFERENCE / "tokenizer")
    question = "" if name == "plain" else "What is it?"
    dialogue = [{"from": "human", "value": f"{IMAGE_TAG}\n{question}"}, {"from": "gpt", "value": "a boat."}]
    ours = template(name).encode(dialogue, tokenizer, image_tokens=3, max_length=2048, has_image=True)
    prompt = template(name).prompt(question, tokenizer, image_tokens=3, has_image=True)
    first = next(k for k, label in enumerate(ours.labels) if label != IGNORE_INDEX)
    assert ours.input_ids[:first] == prompt
    learned = ours.labels[first:]
    assert learned[-1] in template(name).stop_ids(tokenizer) or name == "chatml"
    assert tokenizer.decode([i for i in learned if i != IGNORE_INDEX]).strip() == "a boat."


def test_chatml(fast_folder):
    tokenizer = load_tokenizer(fast_folder)
    dialogue = [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": " a boat"},
        {"from": "human", "value": "And there?"},
        {"from": "gpt", "value": "a lake"},
    ]
    chatml = template("chatml")
    ours = chatml.encode(dialogue, tokenizer, image_tokens=2, max_length=2048, has_image=True)
    shown = tokenizer._tokenizer.decode([i for i in ours.input_ids if i >= 0], skip_special_tokens=False)
    assert shown == (
        "<|im_start|>user\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n a boat<|im_end|>\n"
        "<|im_start|>user\nAnd there?<|im_end|>\n<|im_start|>assistant\na lake<|im_end|>\n"
    )
    runs = labelled_runs(ours.labels)
    assert [tokenizer.decode(r) for r in runs] == [" a boat", "a lake"]
    assert all(r[-1] == tokenizer.special_id("<|im_end|>") for r in runs)
    assert chatml.stop_ids(tokenizer) == {tokenizer.special_id("<|im_end|>")}


def test_what_is_wrong_is_said(fast_folder):
    llama, fast = load_tokenizer(REFERENCE / "tokenizer"), load_tokenizer(fast_folder)
    one = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    how = {"image_tokens": 1, "max_length": 99, "has_image": False}
    with pytest.raises(ValueError, match="no template 'v2'; there are plain, v1, chatml"):
        template("v2")
    with pytest.raises(ValueError, match=r"v1 ends an answer with </s>"):
        template("v1").encode(one, fast, **how)
    with pytest.raises(ValueError, match=r"chatml ends an answer with <\|im_end\|>"):
        template("chatml").encode(one, llama, **how)
    with pytest.raises(ValueError, match="at least one turn"):
        template("v1").encode([], llama, **how)
    with pytest.raises(ValueError, match="turn 2 has no text in `value`"):
        template("v1").encode([one[0], {"from": "gpt", "value": None}], llama, **how)
    with pytest.raises(ValueError, match="turn 2 is spoken by 'tool'"):
        template("v1").encode([one[0], {"from": "tool", "value": ""}], llama, **how)
    with pytest.raises(ValueError, match="turn 3 is a second one of 'gpt' in a row"):
        template("v1").encode([*one, one[1]], llama, **how)
    with pytest.raises(ValueError, match="not 3 turns"):
        template("plain").encode([*one, one[1]], llama, **how)


PIECES = st.sampled_from(
    [
        IMAGE_TAG,
        "</s>",
        "<s>",
        "<unk>",
        " ASSISTANT: ",
        "USER:",
        "\n",
        " ",
        "\u2581",
        "é🚋",
        "the boat",
        "<|im_end|>",
        "<|im_start|>",
    ]
)
TURN = st.fixed_dictionaries(
    {
        "from": st.sampled_from(["human", "gpt", "human", "gpt", "system"]),
        "value": st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=5).map("".join),
    }
)
DIALOGUE = st.one_of(
    st.lists(TURN, max_size=5),
    st.lists(TURN, min_size=2, max_size=6).map(
        lambda ts: [t | {"from": ("human", "gpt")[k % 2]} for k, t in enumerate(ts)]  # mostly well-formed ones
    ),
)


@pytest.fixture(scope="module")
def tokenizers(fast_folder):
    llama = {legacy: SentencePieceTokenizer(REFERENCE / "tokenizer", legacy) for legacy in (True, False)}
    return {("chatml", legacy): load_tokenizer(fast_folder) for legacy in llama} | {
        (name, legacy): one for legacy, one in llama.items() for name in ("plain", "v1")
    }


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    dialogue=DIALOGUE,
    name=st.sampled_from(["plain", "v1", "chatml"]),
    has_image=st.booleans(),
    legacy=st.booleans(),
    cut=st.sampled_from([7, 10_000]),
)
def test_any_dialogue(tokenizers, dialogue, name, has_image, legacy, cut):
    """No error but ValueError; a label is its own id; what is labelled is the answers and their ends, whole, and nothing else."""
    tokenizer = tokenizers[name, legacy]
    how = {"image_tokens": 2, "max_length": cut, "has_image": has_image}
    try:
        text, spans = template(name).render(dialogue, has_image)
        ours = template(name).encode(dialogue, tokenizer, **how)
    except ValueError:
        return
    assert len(ours.input_ids) == len(ours.labels)
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(ours.input_ids, ours.labels, strict=True))
    assert IMAGE_TOKEN not in ours.labels
    assert ours.blanked == (set(ours.labels) <= {IGNORE_INDEX})
    # Swapping every answer for nothing leaves nothing labelled: so no label ever stood on a human turn.
    if name != "plain":
        silent = [t | {"value": ""} if t["from"] == "gpt" else t for t in dialogue]
        assert template(name).encode(silent, tokenizer, **how).blanked
    outside = "".join(c for k, c in enumerate(text) if not any(a <= k < b for a, b in spans))
    for turn in dialogue:
        if name != "plain" and turn["from"] == "human" and IMAGE_TAG not in turn["value"]:
            assert turn["value"] in outside
    if ours.truncated:
        return
    tagged = [IMAGE_TAG in turn["value"] for turn in dialogue[1 if dialogue[0]["from"] == "gpt" else 0 :]]
    if name != "plain":
        assert ours.input_ids.count(IMAGE_TOKEN) == 2 * sum(tagged) * has_image
    check_answers(name, dialogue, has_image, ours, tokenizer)


def check_answers(name, dialogue, has_image, ours, tokenizer):
    """The labelled ids, cut at the ends of answers, are the answers. Nobody can say an end, so their number is right, too."""
    learned = [label for label in ours.labels if label != IGNORE_INDEX]
    specials = [i for i in ours.input_ids if i >= 0 and i in set(tokenizer._specials.values())]
    if name == "plain":
        answers, groups = [dialogue[1]["value"]], [learned]
        assert specials == [tokenizer.bos_id]
    else:
        end, spoken = tokenizer.special_id(template(name).ends_with), dialogue[dialogue[0]["from"] == "gpt" :]
        answers = [turn["value"] for turn in spoken if turn["from"] == "gpt" and turn["value"]]
        cuts = [-1, *(k for k, label in enumerate(learned) if label == end)]
        groups = [learned[a + 1 : b] for a, b in pairwise(cuts)]
        assert cuts[-1] == len(learned) - 1 and len(groups) == len(answers)
        # v1: one that opens, an end an answer; chatml: a beginning and an end a turn
        assert len(specials) == (1 + len(answers) if name == "v1" else 2 * len(spoken))
    for group, answer in zip(groups, answers, strict=True):
        found = tokenizer.decode(group)
        if IMAGE_TAG in answer and has_image:  # `legacy` opens the text after the picture with a space of its own
            answer = answer.replace(IMAGE_TAG, "")
            found, answer = ("".join(text.replace("\u2581", " ").split()) for text in (found, answer))
        # A space at the beginning may be part of the token before (chatml) or of the first piece (LLaMA).
        answer = answer if name == "chatml" else answer.replace("\u2581", " ")
        assert found.strip() == answer.strip() and len(answer.rstrip()) <= len(found) + (
            len(answer) - len(answer.lstrip())
        )
