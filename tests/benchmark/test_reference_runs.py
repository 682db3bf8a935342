"""The reference's three evaluation scripts, end to end: the golden checkpoints, question files, prompts and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm.benchmark.answer import answers
from mvlm.benchmark.base import LETTER, Question
from mvlm.benchmark.mmbench import MMBench
from mvlm.data.image import Pictures
from mvlm.data.prompt import template
from mvlm.data.tokenizer import SentencePieceTokenizer
from mvlm.model.checkpoint import from_released
from mvlm.model.mobilevlm import MobileVLM

REFERENCE = Path(__file__).parents[1] / "reference"
RUNS = REFERENCE / "eval_runs"
EXPECTED = json.loads((RUNS / "expected.json").read_text())


@pytest.fixture(scope="module", params=["ldpnetv2", "ldpnet"])
def released(request) -> tuple[str, MobileVLM]:
    return request.param, from_released(REFERENCE / "checkpoints" / request.param, vision=REFERENCE / "vision_tower")


def loader() -> list[Question]:
    lines = [json.loads(line) for line in (RUNS / "loader.jsonl").read_text().splitlines()]
    return [Question(str(x["question_id"]), x["text"], REFERENCE / "images" / x["image"], None) for x in lines]


def sqa() -> list[Question]:
    questions = []
    for item in json.loads((RUNS / "sqa.json").read_text()):
        text = item["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
        image = REFERENCE / "images" / item["image"] if "image" in item else None
        questions.append(Question(item["id"], text, image, None))
    return questions


def mmbench(folder: Path) -> list[Question]:
    (folder / "mmbench_dev_20230712.tsv").write_bytes((RUNS / "mmbench.tsv").read_bytes())
    return MMBench(folder).questions()


@pytest.mark.parametrize(("run", "mode"), [("loader", "pad"), ("sqa", "square"), ("mmbench", "pad")])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_greedy_answers_are_the_references(released, tmp_path, run, mode, batch_size):
    name, model = released
    questions = mmbench(tmp_path) if run == "mmbench" else {"loader": loader, "sqa": sqa}[run]()
    tokenizer, chat = SentencePieceTokenizer(REFERENCE / "tokenizer"), template("v1")
    processor = json.loads((REFERENCE / "vision_tower" / "preprocessor_config.json").read_text())
    said = {}

    def decode(ids):
        said[len(said)] = list(ids)
        return tokenizer.decode(ids)

    given = answers(
        model,
        questions,
        encode_prompt=lambda text, seen: chat.prompt(text, tokenizer, image_tokens=144, has_image=seen),
        decode=decode,
        pictures=Pictures(336, mode, processor["image_mean"], processor["image_std"]),
        stop_ids=chat.stop_ids(tokenizer),
        batch_size=batch_size,
        max_new_tokens=EXPECTED["max_new_tokens"],
    )
    texts, ids = {}, {}
    for number, answer in enumerate(given):
        texts[answer.question.id], ids[answer.question.id] = answer.text, said[number] + [2] * answer.stopped
    # Exact: the nearest race between the two best logits in these runs is 4e-4 apart, and ours agree to about 1e-5.
    expected = {str(line["answer_line"]["question_id"]): line for line in EXPECTED[name][run]}
    assert ids == {key: line["generated_ids"] for key, line in expected.items()}
    assert texts == {key: line["answer_line"]["text"] for key, line in expected.items()}
