"""TextVQA's files, prompts and score; the golden predictions were scored by the reference's own evaluator, and by
lmms-eval: every `lmms_eval_score` is matched, since the rule is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm.benchmark.textvqa import TextVQA, normalized, soft_score

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "metrics" / "textvqa.json").read_text())


def write(folder: Path, cases: list[dict], tokens: list[str], protocol: str = "paper") -> TextVQA:
    data = [{"question_id": c["id"], "image_id": "p1", **{k: c[k] for k in ("question", "answers")}} for c in cases]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    ocr = {"data": [{"image_id": "p1", "ocr_tokens": tokens}]}
    (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(ocr))
    (folder / "train_images").mkdir(exist_ok=True)
    (folder / "train_images" / "p1.jpg").touch()
    return TextVQA(folder, protocol)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["id"]))
def test_every_golden_answer_is_normalized_and_scored_alike(case):
    assert normalized(case["prediction"]) == case["normalized_prediction"]
    # Ten terms added in another order: the last bits may differ.
    assert soft_score(case["prediction"], case["answers"]) == pytest.approx(case["score"], abs=1e-12)
    assert soft_score(case["prediction"], case["answers"]) == pytest.approx(case["lmms_eval_score"], abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["normalizer"], ids=lambda case: case["text"][:20])
def test_the_golden_normalizer(case):
    assert normalized(case["text"]) == case["normalized"]


def test_the_soft_score_by_its_definition():
    for agree in range(11):
        people = ["stop"] * agree + [f"other {k}" for k in range(10 - agree)]
        left_out = [sum(answer == "stop" for answer in people[:k] + people[k + 1 :]) for k in range(10)]
        assert soft_score("Stop!", people) == pytest.approx(sum(min(1, n / 3) for n in left_out) / 10)


@pytest.mark.parametrize("protocol", ["paper", "harness"])
def test_the_golden_accuracy(tmp_path, protocol):
    benchmark = write(tmp_path, GOLDEN["cases"], [], protocol)
    score = benchmark.score({str(c["id"]): c["prediction"] for c in GOLDEN["cases"]})
    # No case is scored otherwise by lmms-eval (differences.json counts 0), so one figure holds for both.
    assert score.protocol == protocol
    assert score.value == pytest.approx(100 * GOLDEN["accuracy"], abs=1e-9)
    assert score.items == GOLDEN["count"]


def test_the_prompt(tmp_path):
    asked = write(tmp_path, GOLDEN["cases"][:1], ["DAKOTA", "DIGITAL"]).questions()[0]
    assert asked.text == (
        "what is written on sign 0?\nReference OCR token: DAKOTA, DIGITAL\n"
        "Answer the question using a single word or phrase."
    )
    assert write(tmp_path, GOLDEN["cases"][:1], []).questions()[0].text.split("\n")[1] == "Reference OCR token: "


def test_the_prompt_of_the_harness_has_no_tokens_and_small_letters(tmp_path):
    case = GOLDEN["cases"][0] | {"question": "what does the NASA sign say?"}
    benchmark = write(tmp_path, [case], ["NASA"], "harness")
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()  # not even read
    assert benchmark.questions()[0].text == (
        "What does the nasa sign say?\nAnswer the question using a single word or phrase."
    )
    assert benchmark.max_new_tokens == 1024  # the task names none, the harness' LLaVA adapter takes this


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"TextVQA_0\.5\.1_val\.json is missing.*TextVQA"):
        TextVQA(tmp_path).questions()
    case = GOLDEN["cases"][0]
    with pytest.raises(ValueError, match="9 answers where 10"):
        write(tmp_path, [case | {"answers": case["answers"][:9]}], []).questions()
    with pytest.raises(ValueError, match=rf"question id '{case['id']}' comes more than once"):
        write(tmp_path, [case, case], []).questions()
    benchmark = write(tmp_path, [case], [])
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text('{"data": [{"image_id": "p2", "ocr_tokens": []}]}')
    with pytest.raises(ValueError, match=r"laid out otherwise.*p1"):
        benchmark.questions()
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text('{"data": [{"image_id": "p1"}]}')
    with pytest.raises(ValueError, match=r"OCR_v0\.2_val\.json is laid out otherwise.*ocr_tokens"):
        benchmark.questions()


def test_empty_and_very_long_answers_are_no_error():
    # An answer of spaces and articles is an empty one, which ten people may have given.
    for answer, people, mark in (
        ("", "stop", 0),
        ("   ", "stop", 0),
        (" the ", "", 1),
        ("a the stop. " * 900, "stop", 0),
        ("'" * 10_000, "stop", 0),
    ):
        assert soft_score(answer, [people] * 10) == mark
