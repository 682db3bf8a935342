"""The loop against the plainest way to answer: one question, no cache, no padding, the whole prompt at every step."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import pytest
import torch

from mvlm.benchmark.answer import _shown, answers
from mvlm.benchmark.base import Question

LIMIT = 12


def make_questions(folder, pictures: int = 5) -> list[Question]:
    """Forty questions of lengths 1 to 30 on five pictures (one asked once, one kept in memory) and on none."""
    files: list = [folder / f"{name}.jpg" for name in range(pictures - 1)]
    for number, file in enumerate(files):
        file.write_bytes(f"picture {number}".encode()[::-1])
    files += [b"a picture in memory", None]
    sizes = torch.Generator().manual_seed(1)
    questions = []
    for number in range(40):
        length = int(torch.randint(1, 31, (1,), generator=sizes))
        letters = torch.randint(97, 123, (length,), generator=sizes).tolist()
        image = files[0] if number == 0 else files[1 + number % (len(files) - 1)]
        questions.append(Question(str(number), "".join(map(chr, letters)), image, None))
    return questions


@torch.no_grad()
def plainly(tiny, model, question: Question) -> tuple[str, bool]:
    """Greedy by definition."""
    ids = tiny.encode_prompt(question.text, question.image is not None)
    tokens = None
    if question.image is not None:
        file = BytesIO(question.image) if isinstance(question.image, bytes) else question.image
        tokens = model.project(model.encode(tiny.Pixels()(file)[None]))
    said: list[int] = []
    while len(said) < LIMIT:
        embedded = model.embed(torch.tensor([ids + said]), tokens)
        best = int(model.language(inputs_embeds=embedded, use_cache=False).logits[0, -1].argmax())
        if best in tiny.stops:
            return tiny.decode(said), True
        said.append(best)
    return tiny.decode(said), False


def taken(generator) -> dict[str, tuple[str, bool]]:
    return {question.id: (text, stopped) for question, text, stopped in generator}


@pytest.mark.parametrize("attention, captured", [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_batched_answers_are_those_of_one_at_a_time(tmp_path, tiny, loop, attention, captured, monkeypatch):
    if captured:  # the step of always the same shape that a GPU replays, here run as it is
        monkeypatch.setattr("mvlm.model.decode.captures", lambda *some: True)
    model, questions = tiny.model(attention), make_questions(tmp_path)
    expected = {q.id: plainly(tiny, model, q) for q in questions}
    # The test says something only if answers differ, and some stop early while others are cut off.
    assert len({text for text, _ in expected.values()}) > 30
    assert {stopped for _, stopped in expected.values()} == {True, False}
    assert len({len(text.split()) for text, stopped in expected.values() if stopped}) > 2
    for batch_size in (1, 3, 16, 64):
        assert taken(answers(model, questions, **loop, batch_size=batch_size, max_new_tokens=LIMIT)) == expected


def test_a_picture_is_opened_and_encoded_once_for_all_its_questions(tmp_path, model, loop):
    questions = make_questions(tmp_path)
    model.vision.shown = 0
    widths = []
    model.language.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    first = taken(answers(model, questions, **loop, max_new_tokens=1, batch_size=50))
    assert loop["pictures"].opened == {key: 1 for key in loop["pictures"].opened}
    assert len(loop["pictures"].opened) == model.vision.shown == 5
    heads = [rows for rows, columns in widths if columns == 2 + 4]  # two ids and the picture's four
    assert heads == [5], "each head is read once, all in one batch"
    # Both groups (with and without a picture) then take one pass over their tails.
    assert len(widths) == 3
    assert first.keys() == {q.id for q in questions}


def test_features_are_kept_between_calls(tmp_path, model, loop):
    questions, features = make_questions(tmp_path), {}
    model.vision.shown = 0
    expected = taken(answers(model, questions, **loop, features=features))
    assert model.vision.shown == len(features) == 5
    assert taken(answers(model, questions, **loop, features=features)) == expected
    shuffled = taken(answers(model, questions, **loop, features=features, control="shuffled"))
    assert model.vision.shown == 5, "neither the second call nor another control encodes anything"
    assert all(kept.device.type == "cpu" and kept.shape == (4, 6) for kept in features.values())
    assert shuffled != expected


def test_a_full_features_dictionary_is_no_error(tmp_path, model, loop, monkeypatch):
    monkeypatch.setattr("mvlm.benchmark.answer.CACHE_BYTES", 2 * 4 * 6 * 4)  # two pictures of 4 x 6 floats
    questions, features = make_questions(tmp_path), {}
    expected = taken(answers(model, questions, **loop))
    assert taken(answers(model, questions, **loop, features=features)) == expected
    assert len(features) == 2


def test_blind_leaves_the_picture_out_altogether(tmp_path, tiny, model, loop):
    questions = make_questions(tmp_path)
    said = taken(answers(model, questions, **loop, control="blind", max_new_tokens=LIMIT))
    assert not loop["pictures"].opened
    assert said == {q.id: plainly(tiny, model, replace(q, image=None)) for q in questions}


def test_shuffled_shows_another_picture_always_the_same(tmp_path, tiny, model, loop):
    questions = make_questions(tmp_path)
    twin = tmp_path / "twin.jpg"  # another file of the same content must not stand in for its twin
    twin.write_bytes(questions[0].image.read_bytes())
    questions.append(Question("twin", "x", twin, None))
    shown = {}
    stand_ins = dict(zip((q.id for q in questions), _shown(questions, "shuffled"), strict=True))
    for q in questions:
        content = [p.read_bytes() if hasattr(p, "read_bytes") else p for p in (q.image, stand_ins[q.id])]
        assert content[0] != content[1] or content == [None, None]
        shown.setdefault(content[0], set()).add(content[1])
    assert all(len(others) == 1 for others in shown.values()), "one stand-in a picture"
    pictures = set(shown) - {None}
    assert {next(iter(shown[p])) for p in pictures} == pictures, "every picture stands in for one"
    said = taken(answers(model, questions, **loop, control="shuffled", max_new_tokens=LIMIT))
    assert said == {q.id: plainly(tiny, model, replace(q, image=stand_ins[q.id])) for q in questions}
    again = taken(answers(model, questions, **loop, control="shuffled", max_new_tokens=LIMIT, skip={"0", "3"}))
    assert again == {key: value for key, value in said.items() if key not in ("0", "3")}


def test_a_single_picture_cannot_be_shuffled(tmp_path, model, loop):
    questions = [Question("1", "a", b"one", None), Question("2", "b", b"one", None)]
    with pytest.raises(ValueError, match="two different pictures"):
        list(answers(model, questions, **loop, control="shuffled"))


def test_unknown_words_are_refused(model, loop):
    with pytest.raises(ValueError, match="none, blind or shuffled, not 'blnd'"):
        list(answers(model, [], **loop, control="blnd"))
    with pytest.raises(ValueError, match="bfloat16 or float16, not 'bf16'"):
        list(answers(model, [], **loop, precision="bf16"))


def test_an_unreadable_picture_is_named_by_its_question(model, loop):
    def broken(file):
        raise ValueError("truncated")

    with pytest.raises(ValueError, match=r"question q7 .*truncated"):
        list(answers(model, [Question("q7", "a", b"half a picture", None)], **(loop | {"pictures": broken})))


def test_half_precision_runs_and_the_mode_comes_back(tmp_path, model, loop):
    model.train()
    questions = make_questions(tmp_path)
    features = {}
    said = taken(answers(model, questions, **loop, precision="bfloat16", max_new_tokens=3, features=features))
    assert said.keys() == {q.id for q in questions}
    assert model.training
    # Weights that are halves themselves take features that were kept in another precision.
    said = taken(answers(model.to(torch.bfloat16), questions, **loop, max_new_tokens=3, features=features))
    assert said.keys() == {q.id for q in questions}
