"""Answers kept line by line, interrupted and gone on with; scores with controls; the average of the paper's tables."""

from __future__ import annotations

import base64
import json
import logging

import pytest

from mvlm.benchmark.base import Question
from mvlm.benchmark.evaluate import answer_all, average, evaluate, stored
from mvlm.benchmark.gqa import GQA
from mvlm.benchmark.mmbench import MMBench
from mvlm.benchmark.mme import MME, PERCEPTION
from mvlm.benchmark.pope import POPE, SPLITS
from mvlm.benchmark.sqa import SQA
from mvlm.benchmark.textvqa import TextVQA


def dump(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def six(tmp_path):
    """Four questions or so of each benchmark, in the official files."""
    root = tmp_path / "benchmarks"
    kinds = {"types": {"structural": "query"}}
    questions = {str(k): {"question": f"What {k}?", "answer": "a", "imageId": f"n{k % 3}", **kinds} for k in range(4)}
    dump(root / "gqa" / "testdev_balanced_questions.json", questions)
    problem = {"question": "Which?", "hint": "h", "choices": ["x", "y"], "answer": 1, "image": "image.png"}
    dump(root / "sqa" / "problems.json", {str(k): problem for k in range(4)})
    dump(root / "sqa" / "pid_splits.json", {"test": ["0", "1", "2", "3"]})
    record = {"question": "what?", "answers": ["x"] * 10}
    records = [record | {"question_id": k, "image_id": f"n{k}"} for k in range(4)]
    dump(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": records})
    ocr = [{"image_id": f"n{k}", "ocr_tokens": ["x", "y"]} for k in range(4)]
    dump(root / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})
    for k in range(4):
        dump(root / "gqa" / "images" / f"n{k}.jpg", f"{k} gqa")
        dump(root / "sqa" / "images" / "test" / str(k) / "image.png", f"{k} sqa")
        dump(root / "textvqa" / "train_images" / f"n{k}.jpg", f"{k} textvqa")
        dump(root / "pope" / "val2014" / f"{k}.jpg", f"{k} pope")
    lines = [{"question_id": k, "image": f"{k}.jpg", "text": "Is it?", "label": "yes"} for k in range(2)]
    for split in SPLITS:
        dump(root / "pope" / f"coco_pope_{split}.json", "\n".join(map(json.dumps, lines)))
    for category in PERCEPTION:
        dump(root / "mme" / category / "1.txt", "Is it? Please answer yes or no.\tYes\nIs it not?\tNo\n")
        dump(root / "mme" / category / "1.jpg", f"{category} mme")
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [[str(k), "Which?", "", "x", "y", "", "", "AB"[k], "c", encoded(f"{k} mmbench")] for k in range(2)]
    dump(root / "mmbench" / "mmbench_dev_20230712.tsv", "\n".join("\t".join(row) for row in [head, *rows]) + "\n")
    return [kind(root / kind.name) for kind in (GQA, SQA, TextVQA, POPE, MME, MMBench)]


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_all_six_with_both_controls(tmp_path, model, loop, six):
    folder = tmp_path / "answers"
    settings = {"controls": ["blind", "shuffled"], "max_new_tokens": 4}
    results = evaluate(model, six, folder, **settings, **loop)
    assert json.loads(json.dumps(results)) == results, "plain types"
    assert results["protocol"] == "paper"
    for view in ("none", "blind", "shuffled"):
        values = [results["benchmarks"][benchmark.name][view]["value"] for benchmark in six]
        assert results["avg"][view] == pytest.approx(sum(values) / 6)
    assert results["benchmarks"]["gqa"]["none"]["cut"] > 0, "random weights seldom stop within four words"
    assert len(list(folder.iterdir())) == 18
    # Everything is stored: scoring again asks no model, and gives the same.
    assert evaluate(None, six, folder, controls=["blind", "shuffled"]) == results
    # And nothing is opened or answered again with one.
    opened = sum(loop["pictures"].opened.values())
    assert evaluate(model, six, folder, **settings, **loop) == results
    assert sum(loop["pictures"].opened.values()) == opened


def test_two_protocols_keep_their_answers_apart(tmp_path, model, loop, six):
    folder = tmp_path / "answers"
    paper = evaluate(model, six, folder, max_new_tokens=4, **loop)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    harness = [type(one)(one.folder, "harness") for one in six]
    with pytest.raises(ValueError, match=r"have no answer in .*harness"):
        evaluate(None, harness, folder)
    results = evaluate(model, harness, folder, max_new_tokens=4, **loop)
    assert (paper["protocol"], results["protocol"]) == ("paper", "harness")
    assert {score["none"]["protocol"] for score in results["benchmarks"].values()} == {"harness"}
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in (folder / "harness").iterdir()} == {path.name for path in before}
    assert evaluate(None, six, folder, max_new_tokens=4) == paper
    assert evaluate(None, harness, folder) == results
    with pytest.raises(ValueError, match=r"no common average, and here is gqa protocol=paper, sqa protocol=harness"):
        evaluate(None, [six[0], harness[1]], folder)


def test_the_harness_crops_nothing(tmp_path, tiny, model, loop, six):
    cropped = tiny.Pixels()
    harness = [type(one)(one.folder, "harness") for one in six]
    evaluate(model, harness, tmp_path / "answers", max_new_tokens=1, cropped=cropped, **loop)
    assert not cropped.opened and b"0 sqa" in loop["pictures"].opened


def test_each_picture_is_encoded_once_for_all_views(tmp_path, model, loop, six):
    model.vision.shown = 0
    evaluate(model, six[:1], tmp_path / "answers", controls=["blind", "shuffled"], max_new_tokens=1, **loop)
    assert model.vision.shown == 3  # GQA's four questions are about three pictures


def test_pictures_the_reference_crops_get_their_own_treatment(tmp_path, tiny, model, loop, six):
    cropped = tiny.Pixels()
    evaluate(model, six, tmp_path / "answers", max_new_tokens=1, cropped=cropped, **loop)
    assert {key.split()[1] for key in cropped.opened} == {b"sqa"}
    assert b"0 sqa" not in loop["pictures"].opened


def test_the_average_of_the_paper():
    # Table 7, last row, of the paper: MME stands there in points (1302.8), and Avg is printed 64.2.
    row = {"gqa": 59.3, "sqa": 66.7, "textvqa": 52.1, "pope": 84.3, "mme": 1302.8 / 20, "mmbench": 57.7}
    assert average(row) == pytest.approx(64.2, abs=0.05)
    assert average({"gqa": 1.0}) is None


QUESTIONS = [Question(str(k), "abcdefgh"[: k + 1], f"picture {k % 3}".encode()[::-1], None) for k in range(8)]


@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_interrupted_and_gone_on_with_is_the_same(tmp_path, model, loop, caplog, control):
    settings = loop | {"control": control, "max_new_tokens": 5, "batch_size": 2}
    whole = answer_all(model, QUESTIONS, tmp_path / "whole.jsonl", title="", **settings)
    assert whole.keys() == {q.id for q in QUESTIONS}

    told = []

    def interrupted(ids):
        told.append(ids)
        if len(told) == 4:
            raise KeyboardInterrupt
        return loop["decode"](ids)

    path = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_all(model, QUESTIONS, path, title="", **(settings | {"decode": interrupted}))
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write('{"id": "7", "prom')  # the power went while a line was written
    told.clear()

    def counted(ids):
        told.append(ids)
        return loop["decode"](ids)

    with caplog.at_level(logging.WARNING):
        again = answer_all(model, QUESTIONS, path, title="", **(settings | {"decode": counted}))
    assert "part.jsonl ends within a line" in caplog.text
    assert again == whole
    assert len(told) == 5, "three of eight were there already"
    assert stored(path, QUESTIONS) == whole


def test_nothing_answered_and_no_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="8 of 8 questions have no answer in"):
        answer_all(None, QUESTIONS, tmp_path / "x.jsonl", title="")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "0", "prompt": "other words", "text": "", "stopped": true}', "not asked in these words"),
        ('{"id": "99", "prompt": "a", "text": "", "stopped": true}', "answers '99'"),
        (
            '{"id": "0", "prompt": "a", "text": "x", "stopped": true}\n'
            '{"id": "0", "prompt": "a", "text": "y", "stopped": true}',
            "line 2 answers '0' a second time",
        ),
        ('{"id": "0"}', "line 1 is no stored answer"),
        ("[1]", "line 1 is no stored answer"),
        ("broken", "line 1 is no stored answer"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        stored(path, QUESTIONS)


def test_empty_and_very_long_answers_are_stored_as_they_are(tmp_path, model, loop):
    for number, text in enumerate(("", 'line\nbreak \u2028 and "quotes" ' * 10_000)):
        path = tmp_path / f"{number}.jsonl"
        said = answer_all(model, QUESTIONS, path, title="", **(loop | {"decode": lambda ids, text=text: text}))
        assert {line["text"] for line in said.values()} == {text.strip()}
        assert stored(path, QUESTIONS) == said
