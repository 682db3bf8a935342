"""The reference's three evaluation scripts, end to end: the golden checkpoints, question files, prompts and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mvlm.benchmark.answer import answers
from mvlm.benchmark.base import LETTER, Question
from mvlm.benchmark.mmbench import MMBench
from mvlm.data.image import Pictures
from mvlm.data.prompt import template
from mvlm.data.tokenizer import SentencePieceTokenizer
from mvlm.model.mobilevlm import MobileVLM
from mvlm.projector.ldpv2 import LDPv2

REFERENCE = Path(__file__).parents[1] / "reference"
RUNS = REFERENCE / "eval_runs"
EXPECTED = json.loads((RUNS / "expected.json").read_text())


class CLIP(nn.Module):
    """The golden tower as transformers builds it: what is tested here is what comes after it."""

    grid = 24

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder))
        self.width = self.tower.config.hidden_size

    def forward(self, pixels):
        return self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


@pytest.fixture(scope="module")
def released() -> MobileVLM:
    """checkpoints/ldpnetv2, loaded by hand."""
    folder = REFERENCE / "checkpoints" / "ldpnetv2"
    config = json.loads((folder / "config.json").read_text())
    wanted = LlamaConfig().to_dict().keys() & config.keys() - {"model_type", "architectures", "transformers_version"}
    language = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in wanted}))
    model = MobileVLM(CLIP(REFERENCE / "vision_tower"), LDPv2, language)
    weights = load_file(folder / "model.safetensors")
    projector = {k.removeprefix("model.mm_projector."): w for k, w in weights.items() if ".mm_projector." in k}
    tower = {k.removeprefix("model.vision_tower.vision_tower."): w for k, w in weights.items() if ".vision_tower." in k}
    used = model.vision.tower.state_dict().keys()
    if "vision_model.post_layernorm.weight" not in used:  # newer transformers drop the prefix
        tower = {k.removeprefix("vision_model."): w for k, w in tower.items()}
    model.vision.tower.load_state_dict({k: w for k, w in tower.items() if k in used})
    names = model.projector.state_dict().keys()
    model.projector.load_state_dict(dict(zip(names, in_our_order(projector, names), strict=True)))
    rest = {k: w for k, w in weights.items() if ".mm_projector." not in k and ".vision_tower." not in k}
    model.language.load_state_dict(rest)
    return model.eval()


def in_our_order(projector: dict, names) -> list[torch.Tensor]:
    """The released tensors as our names list them: told apart by their ends, the first and second PW by their order."""
    theirs = ["mlp.mlp.0", "mlp.mlp.2", "peg.peg.0"]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    assert len(layers) == 3 and layers[2] == "peg", layers
    match = dict(zip(layers, theirs, strict=True))
    return [projector[f"{match[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"] for name in names]


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
    questions = mmbench(tmp_path) if run == "mmbench" else {"loader": loader, "sqa": sqa}[run]()
    tokenizer, chat = SentencePieceTokenizer(REFERENCE / "tokenizer"), template("v1")
    processor = json.loads((REFERENCE / "vision_tower" / "preprocessor_config.json").read_text())
    said = {}

    def decode(ids):
        said[len(said)] = list(ids)
        return tokenizer.decode(ids)

    given = answers(
        released,
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
    expected = {str(line["answer_line"]["question_id"]): line for line in EXPECTED["ldpnetv2"][run]}
    assert ids == {key: line["generated_ids"] for key, line in expected.items()}
    assert texts == {key: line["answer_line"]["text"] for key, line in expected.items()}
