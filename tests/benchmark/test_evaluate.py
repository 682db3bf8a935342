"""Answers kept line by line, interrupted and gone on with; scores with controls; the average of the paper's tables."""

from __future__ import annotations

import base64
import json
import logging
import re

import pytest
import torch

from mvlm.benchmark.base import Question
from mvlm.benchmark.evaluate import _progress, answer_all, average, evaluate, scored_again, stored
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
    assert results["benchmarks"]["gqa"]["none"]["precision"] == {"float32": 4}
    assert len(list(folder.iterdir())) == 18
    # Everything is stored: scoring again asks no model, and gives the same.
    assert evaluate(None, six, folder, controls=["blind", "shuffled"]) == results
    # And nothing is opened or answered again with one.
    opened = sum(loop["pictures"].opened.values())
    assert evaluate(model, six, folder, **settings, **loop) == results
    assert sum(loop["pictures"].opened.values()) == opened


def test_what_a_lower_limit_cut_off_is_asked_again(tmp_path, model, loop, six):
    """And nothing else is; without a limit it is the protocol's, and a score says which it was."""
    folder = tmp_path / "answers"
    short = evaluate(model, six[:1], folder, max_new_tokens=2, **loop)["benchmarks"]["gqa"]["none"]
    assert (short["limit"], short["cut_at"]) == (2, 2) and short["cut"] == short["short"] > 0
    lines = [json.loads(line) for line in (folder / "gqa.jsonl").read_text().splitlines()]
    assert {line["limit"] for line in lines} == {2}
    opened = sum(loop["pictures"].opened.values())
    again = evaluate(model, six[:1], folder, max_new_tokens=1, **loop)["benchmarks"]["gqa"]["none"]
    assert again == short and sum(loop["pictures"].opened.values()) == opened, "a lower one asks nothing"
    assert evaluate(None, six[:1], folder)["benchmarks"]["gqa"]["none"] == short, "nor does a score without a model"
    whole = evaluate(model, six[:1], folder, **loop)["benchmarks"]["gqa"]["none"]
    then = [json.loads(line) for line in (folder / "gqa.jsonl").read_text().splitlines()]
    assert [line["id"] for line in then] == [line["id"] for line in lines]
    assert [line["limit"] for line in then] == [2 if line["stopped"] else 128 for line in lines]
    fresh = evaluate(model, six[:1], tmp_path / "fresh", **loop)["benchmarks"]["gqa"]["none"]
    assert whole == fresh and (whole["short"], whole["limit"]) == (0, 128)
    assert scored_again(six[0], folder, ["none"]) == {"none": whole}
    with pytest.raises(ValueError, match=r"4 of 4 questions have no answer in .*gqa-blind.jsonl"):
        scored_again(six[0], folder, ["blind"])


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


def test_a_model_is_built_only_if_a_question_needs_it(tmp_path, model, loop, six):
    built = []

    def build():
        built.append(1)
        return model

    results = evaluate(build, six[:2], tmp_path / "answers", max_new_tokens=3, **loop)
    assert built == [1], "once for all benchmarks"
    assert evaluate(build, six[:2], tmp_path / "answers", max_new_tokens=3, **loop) == results
    assert built == [1], "and not at all where every answer is stored"


def test_again_answers_anew_and_deletes_nothing(tmp_path, model, loop, six, caplog):
    gqa, sqa = six[:2]
    folder = tmp_path / "answers"
    settings = loop | {"max_new_tokens": 3, "controls": ["blind"], "flips": True}
    evaluate(model, [gqa, sqa], folder, **settings)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "gqa.rank1.jsonl").write_text("left by another process\n")
    again = settings | {"decode": lambda ids: "other", "again": True}
    with caplog.at_level(logging.WARNING):
        evaluate(model, [gqa], folder, **again)
    assert f"4 files of earlier answers are kept in {folder / 'before-1'}" in caplog.text
    kept = {path.name: path.read_bytes() for path in (folder / "before-1").iterdir()}
    assert kept.pop("gqa.rank1.jsonl")
    assert kept == {name: before[name] for name in ("gqa.jsonl", "gqa-blind.jsonl", "gqa-single.jsonl")}
    assert {line["text"] for line in stored(folder / "gqa.jsonl", gqa.questions()).values()} == {"other"}
    assert (folder / "sqa.jsonl").read_bytes() == before["sqa.jsonl"], "other benchmarks' answers stay"
    evaluate(model, [gqa], folder, **again)
    assert {path.name for path in (folder / "before-2").iterdir()} == set(kept)
    assert evaluate(None, [gqa], folder)["benchmarks"]["gqa"]["none"]["items"] == 4


def test_flips_are_counted_and_told(tmp_path, tiny, loop, six):
    """None in float32. An answer changed by hand is found, so the count counts."""
    folder, settings = tmp_path / "answers", loop | {"max_new_tokens": 6, "flips": True}
    results = evaluate(tiny.model(), six[:2], folder, **settings)
    assert results["flips"] == {
        name: {"flipped": 0, "items": 4, "precision": {"float32": 8}} for name in ("gqa", "sqa")
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "gqa-single.jsonl").read_text().splitlines()]
    lines[2]["text"] += " otherwise"
    (folder / "gqa-single.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = evaluate(None, six[:2], folder, flips=True)
    assert again["flips"]["gqa"]["flipped"] == 1 and again["flips"]["sqa"]["flipped"] == 0
    assert again["benchmarks"] == results["benchmarks"], "the score is that of the batched answers"
    half = evaluate(tiny.model().to(torch.bfloat16), six[:1], tmp_path / "half", **settings | {"features": {}})
    assert half["flips"]["gqa"]["precision"] == {"bfloat16": 8}


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_leave_the_files_of_one(tmp_path, tiny, loop, six, together, count):
    settings = {"controls": ["blind", "shuffled"], "max_new_tokens": 4, "batch_size": 3}
    alone = evaluate(tiny.model(), six, tmp_path / "alone", **settings, **loop)

    def work(rank: int):
        pictures, model = tiny.Pixels(), tiny.model()
        results = evaluate(model, six, tmp_path / "shared", **settings, **loop | {"pictures": pictures, "features": {}})
        assert set(pictures.opened.values()) == {1}, "each picture once for all views"
        return results, sorted(pictures.opened)

    told = together(count, work, patience=60)
    assert [results for results, _ in told] == [alone] * count
    opened = [picture for _, pictures in told for picture in pictures]
    assert len(opened) == len(set(opened)) == len(loop["pictures"].opened), "and by one process only"
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert len(files) == 18
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == files


def test_a_failing_process_stops_all_and_loses_nothing(tmp_path, tiny, loop, together):
    """Two processes, one meets an unreadable picture: it tells so, the other ends too, and one process goes on from both parts."""
    path, settings = tmp_path / "x.jsonl", loop | {"max_new_tokens": 3, "batch_size": 1}
    questions = [*QUESTIONS, Question("8", "torn", b"torn", None)]  # the fourth picture: dealt to the second process

    def broken(picture):
        if picture.getvalue() == b"torn":
            raise ValueError("it is torn")
        return loop["pictures"](picture)

    def work(rank: int):
        return len(answer_all(tiny.model(), questions, path, title="", **settings | {"pictures": broken}))

    first, second = together(2, work, ok=False, patience=60)
    assert "ValueError" in second and "question 8" in second
    # Told by name, or by the connection that went, whichever is noticed first.
    assert re.search(r"^RuntimeError: ", first, re.M) and ("ank 1" in first or "closed by peer" in first), first
    done = {file.name: len(file.read_text().splitlines()) for file in tmp_path.glob("x*.jsonl")}
    assert done["x.jsonl"] == 5, "all questions on the first and the third picture"
    asked = []

    def counted(ids):
        asked.append(ids)
        return loop["decode"](ids)

    told = answer_all(tiny.model(), questions, path, title="", **settings | {"decode": counted})
    assert len(asked) == 9 - sum(done.values()), "nothing is asked twice"
    assert list(told) == [q.id for q in questions]
    assert [file.name for file in tmp_path.glob("x*.jsonl")] == ["x.jsonl"]
    whole = answer_all(tiny.model(), questions, tmp_path / "whole.jsonl", title="", **settings)
    assert whole == told


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
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
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


@pytest.mark.parametrize("every, told", [(0.0, ["1/19", "2/19", "3/19", "3/19"]), (60.0, ["3/19"])])
def test_a_log_file_is_told_how_far_it_is(monkeypatch, capsys, every: float, told: list[str]) -> None:
    """Nothing is drawn over there: a state every so many seconds, and the last one."""
    monkeypatch.setattr("mvlm.benchmark.evaluate.EVERY", every)
    with _progress(disable=False) as progress:
        task = progress.add_task("gqa none", total=19)
        for _ in range(3):
            progress.advance(task)
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"^gqa none .* (\d+/19) ", line)[1] for line in lines] == told
