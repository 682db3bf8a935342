"""The gate: true files pass it, and whatever is wrong with one does not."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from io import BytesIO

import pytest
import tokenizers
import torch
from PIL import Image

from mvlm.data.tokenizer import load_tokenizer
from mvlm.export import engine as far
from mvlm.export import gate
from mvlm.export.container import Stored
from mvlm.export.gate import Answer, drift, shared, tanh_gelu

from .conftest import changed, fitted, llama, small
from .test_vision import CONTROLS

CHAT = "tokenizer.chat_template"


def test_the_pictures_are_always_the_same():
    """Their pixels, for how they are packed is Pillow's matter."""
    sizes = [Image.open(BytesIO(file)).size for file in gate.pictures(96)]
    assert sizes == [(96, 96), (160, 96), (57, 115)]
    assert [Image.open(BytesIO(f)).tobytes() for f in gate.pictures(96)] == [
        Image.open(BytesIO(f)).tobytes() for f in gate.pictures(96)
    ]


@pytest.mark.parametrize("which", ["bench", "pieces_bench"])
def test_true_files_pass(engine, request, tmp_path, which):
    """Byte-level BPE with chatml; sentencepiece with the reference's template."""
    bench = request.getfixturevalue(which)
    held = bench.gate()
    parity = held.check(*bench.write(tmp_path))
    assert parity.passed, parity.faults
    assert parity.file.questions == 7 and len(parity.file.partings) == len(parity.ties)
    assert parity.file.logprob < gate.LOGPROB / 2
    json.dumps(parity.as_dict())


def test_the_end_of_an_answer_is_among_its_ids(engine, bench, tmp_path):
    """`agreement` relies on it: an answer that llama.cpp ended is as long as ours up to and with the same last id."""
    talker = llama()
    with torch.no_grad():
        talker.lm_head.weight[2] *= 3  # the end is the likeliest word every now and then
    ends = bench.with_model(small(language=talker))
    said = list(far.Engine().ask(*ends.write(tmp_path), [ask for ask, _ in ends.gate().asked], limit=12))
    ended = [one for one in said if one.stopped]
    assert len(ended) > 0 and all(one.ids[-1] in (0, 2) for one in ended)
    assert all(one.ids[-1] not in (0, 2) and len(one.ids) == 12 for one in said if not one.stopped)


def test_a_quantised_file_is_held_against_its_own_weights(engine, bench, tmp_path):
    own = bench.with_model(small(language=llama()))
    language, mmproj = own.write(tmp_path)
    held = own.gate()
    whole = held.check(language, mmproj)
    far.Engine().quantise(language, tmp_path / "q4.gguf", "q4_0")
    less = held.check(tmp_path / "q4.gguf", mmproj, "q4_0")
    assert whole.passed and less.passed, less.faults
    assert less.run.first_logprob > 2 * less.file.first_logprob, "4 bits change this model, and that is told"
    assert less.run.tokens < whole.run.tokens == whole.file.tokens


def neighbours_apart(rows: torch.Tensor) -> torch.Tensor:
    """The rows of queries as transformers has them."""
    return rows.unflatten(0, (4, -1, 2)).transpose(1, 2).reshape(rows.shape)


def gate_for_up(tensors: list[Stored]) -> list[Stored]:
    other = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
    return [t._replace(name=re.sub("ffn_gate|ffn_up", lambda found: other[found[0]], t.name)) for t in tensors]


LANGUAGE_CONTROLS = {
    "queries not turned": {"language_tensors": changed("attn_q.weight", neighbours_apart)},
    "another base of rotation": {
        "language_table": lambda t: t | {"llama.rope.freq_base": t["llama.rope.freq_base"] * 2}
    },
    "no line break after the picture": {"language_table": lambda t: t | {CHAT: t[CHAT].replace("'__>\\n'", "'__>'")}},
    "gate and up changed": {"language_tensors": gate_for_up},
}


@pytest.mark.parametrize("name", LANGUAGE_CONTROLS)
def test_a_spoilt_language_model_does_not_pass(engine, bench, tmp_path, name):
    parity = bench.gate().check(*bench.write(tmp_path, **LANGUAGE_CONTROLS[name]))
    assert not parity.passed
    assert max(parity.embedding) < gate.EMBEDDING, "the pictures are not to blame"
    assert any(("chat writes" if "line break" in name else "log-prob") in fault for fault in parity.faults)


def test_another_rule_for_words_does_not_pass(engine, bench, bytes_folder, trained_bpe, tmp_path):
    """A tokenizer that splits digits, written as one that does not: seen before any answer is."""
    bpe = trained_bpe("12 boats, 12 or 20 to 12, the picture, the picture", 300)
    shutil.copytree(bytes_folder, tmp_path / "words")
    split = tokenizers.pre_tokenizers
    bpe.pre_tokenizer = split.Sequence([split.Digits(True), split.ByteLevel(add_prefix_space=False)])
    bpe.save(str(tmp_path / "words" / "tokenizer.json"))
    words = load_tokenizer(tmp_path / "words")
    own = replace(bench, model=small(language=llama(words.vocab_size)), words=words, words_folder=tmp_path / "words")
    assert own.gate().check(*own.write(tmp_path)).passed
    parity = own.gate().check(*own.write(tmp_path, language_table=lambda t: t | {"tokenizer.ggml.pre": "gpt-2"}))
    assert any("tokenises the prompt to" in fault for fault in parity.faults)


SEEN = ("class token stored", "one block short", "unfolded layer scale", "transposed PEG", "transposed positions")


@pytest.mark.parametrize("name", SEEN)
def test_the_answers_tell_too(engine, bench, tmp_path, name):
    """A fault of tower or projector shows in what is said, not in embeddings alone. (Another GELU changes embeddings by half a
    percent, which only they show.)"""
    parity = bench.gate().check(*bench.write(tmp_path, **CONTROLS[name]))
    assert any("parts at token" in fault or "log-prob" in fault for fault in parity.faults)


def test_pictures_that_llama_cpp_would_fit_otherwise_are_given_fitted(engine, bench, tmp_path):
    """A model trained on padded pictures: as they are, wide ones would differ; fitted first, none does."""
    padded = replace(bench, look=fitted(mode="pad"))
    files = padded.write(tmp_path)
    assert padded.gate().check_embeddings(*files).passed
    raw = padded.gate()
    raw.files = gate.pictures(96)
    raw.seen = gate.embeddings(padded.model, padded.look, raw.files)
    parity = raw.check_embeddings(*files)
    assert parity.embedding[0] < gate.EMBEDDING and min(parity.embedding[1:]) > gate.RESIZED


def test_one_gelu_while_it_is_asked_for():
    model = small()
    acts = [model.projector.act, *(block.mlp.act for block in model.vision.tower.blocks)]
    assert {act.approximate for act in acts} == {"none"}
    with tanh_gelu(model):
        assert {m.approximate for m in model.modules() if isinstance(m, torch.nn.GELU)} == {"tanh"}
    assert [model.projector.act, *(block.mlp.act for block in model.vision.tower.blocks)] == acts


def test_our_answers_are_those_of_generate(bench):
    """The second way to compute it."""
    ask, number = bench.gate().asked[0]
    seen = bench.gate().seen[number]
    ids = bench.talk.prompt(ask.question, bench.words, image_tokens=144, has_image=True)
    ours = gate.answer(bench.model, ids, seen, {2}, 12)
    embedded = bench.model.embed(torch.tensor([ids]), seen[None])
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    said = bench.model.language.generate(
        inputs_embeds=embedded, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    assert ours.ids == said[0].tolist()


def test_where_answers_part():
    assert [shared([1, 2, 3], there) for there in ([1, 2, 3], [1, 2], [1, 5, 3], [])] == [3, 2, 1, 0]
    our = Answer([0, 1], torch.tensor([[-0.5, -1.0], [-2.0, -0.1]]))
    said = far.Said([0, 0], False, [{0: -0.6, 1: -1.0}, {1: -0.4}], [], "")
    assert drift(our, said, 1) == pytest.approx([0.1, 0.3])
    assert drift(our, said, 0) == pytest.approx([0.1]), "after the parting the two answer different texts"
    assert drift(our, said._replace(top=[None, None]), 1) == [0, 0]


def test_near_ties_are_told_and_clear_ones_are_faults(bench):
    held = bench.gate()
    both = [Answer([1], torch.tensor([[-1.0, -1.0 + lead]])) for lead in (0.01, 1.0)]
    said = [far.Said([0], False, [{0: -1.0}], [], "")] * 2
    parity = gate.Parity("f16", [], [], "none", file=held.agreement(both, said))
    held._judge(parity)
    assert parity.ties == ["question 1 parts at token 1, where PyTorch leads by 0.010"]
    assert len(parity.faults) == 1 and parity.faults[0].startswith(
        "question 2 parts at token 1, where PyTorch leads by 1.000"
    )


def test_past_a_tie_the_answers_are_compared_to_their_ends(bench):
    """llama.cpp takes the second of two equal ids, and after it what PyTorch says then: no fault. Or something else: a fault."""
    held = bench.gate()
    ours = [held._answer(question) for question in range(2)]
    second = [int(our.logprobs[1].topk(2).indices[1]) for our in ours]
    ours = [Answer(our.ids, our.logprobs.clone()) for our in ours]
    for our, other in zip(ours, second, strict=True):  # made equal
        our.logprobs[1, other] = our.logprobs[1].max()
    then = [
        held._answer(number, [our.ids[0], other]) for number, (our, other) in enumerate(zip(ours, second, strict=True))
    ]
    assert all(after.ids[:2] == [our.ids[0], other] for after, our, other in zip(then, ours, second, strict=True))
    worst = int(then[1].logprobs[2].argmin())
    told = [then[0].ids, [*then[1].ids[:2], worst, *then[1].ids[3:]]]
    said = [far.Said(ids, False, [None] * len(ids), [], "") for ids in told]
    found = held.agreement(ours, said, past_ties=True)
    assert [(p.question, p.step, p.tie) for p in found.partings] == [(0, 1, True), (1, 1, True), (1, 2, False)]
    assert len(held.agreement(ours, said).partings) == 2, "a quantised file's answers are compared up to their parting"
    assert found.as_dict()["same"] == 0


def test_not_a_number_does_not_pass(bench):
    """Comparisons with it are false, so the bounds are asked the other way round."""
    assert gate._too_far([float("nan"), 0.0]) and gate._too_far([float("inf")])
    parity = gate.Parity("f16", [], [], "none", file=gate.Agreement(1, [], 1.0, float("nan"), float("nan")))
    bench.gate()._judge(parity)
    assert not parity.passed
    our, said = Answer([0, 0], torch.full((2, 2), -0.5)), far.Said([0, 0], False, [{0: -0.5}, {0: math.nan}], [], "")
    for order in (said.top, said.top[::-1]):
        found = bench.gate().agreement([our], [said._replace(top=order)])
        assert math.isnan(found.logprob)
