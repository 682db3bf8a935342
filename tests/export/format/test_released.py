"""The folder is the run's model, wherever it is carried; its card says what is known and no more."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from mvlm import build, score
from mvlm.chat import CLIP_MEAN, Chat
from mvlm.data.image import Pictures
from mvlm.data.prompt import template
from mvlm.export import handover
from mvlm.export.format import released
from mvlm.export.gate import pictures
from mvlm.run import file_hash

from ..conftest import REFERENCE, names


@pytest.fixture
def handed(configure, run_of, tmp_path):
    """(run, its folder, the same carried away from the run)"""
    run = run_of("recipe.finetune.pictures=pad")  # neither llama.cpp's way nor CLIP's colours
    out = handover.export(configure(f"run={run.folder}", "format=released", page="export"))
    shutil.copytree(out, tmp_path / "elsewhere")
    return run, out, tmp_path / "elsewhere"


def test_a_run_becomes_a_released_checkpoint(handed, configure):
    run, out, elsewhere = handed
    assert out == run.folder / "released"
    files = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names(out) == {*files, "manifest.json", "README.md"}
    about = json.loads((out / "manifest.json").read_text())
    assert {name: file["sha256"] for name, file in about["files"].items()} == {
        name: file_hash(out / name) for name in files
    }
    assert about["files"]["model.safetensors"]["sha256"] == file_hash(run.folder / "finetune" / "model.safetensors")
    assert (out / "model.safetensors").stat().st_ino != (run.folder / "finetune" / "model.safetensors").stat().st_ino
    assert about["proven"] and about["parity"]["faults"] == []

    ours, theirs = Chat.open(run.folder), Chat.open(elsewhere)
    assert (
        theirs.talk.name == "chatml" and theirs.pictures.mode == "pad" and repr(theirs.pictures) == repr(ours.pictures)
    )
    for chat in (ours, theirs):
        chat.look(Path(REFERENCE / "images" / "img1.png"))
    assert "".join(ours.stream("What?")) == "".join(theirs.stream("What?")) != ""
    # A folder in the released format stays one, and export.py's other formats take it.
    with pytest.raises(ValueError, match="is in the released format already"):
        handover.export(configure(f"run={elsewhere}", "format=released", page="export"))
    handover.export(configure(f"run={elsewhere}", "gate=false", page="export"))
    assert names(elsewhere / "gguf") == {"f16"}


def test_transformers_reads_the_language_model(handed):
    """As the card says."""
    run, _, elsewhere = handed
    theirs = LlamaForCausalLM.from_pretrained(elsewhere).state_dict()
    ours = build.trained(run).language.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_it_is_the_folder_that_is_opened_and_not_the_run_around_it(handed, monkeypatch):
    run, out, _ = handed
    monkeypatch.setattr(build, "trained", lambda run: pytest.fail("the run was opened"))
    Chat.open(out)
    monkeypatch.undo()
    assert Chat.open(run.folder / "finetune").talk.name == "chatml", "a stage still stands for its run"


def test_a_released_mobilevlm_is_opened_as_ever(monkeypatch):
    monkeypatch.chdir(REFERENCE)
    chat = Chat.open(REFERENCE / "checkpoints" / "ldpnetv2")
    assert chat.talk.name == "v1" and chat.pictures.mode == "pad"
    assert chat.pictures.mean.tolist() == pytest.approx(CLIP_MEAN)


def other_weight(chat: Chat) -> None:
    chat.model.language.model.norm.weight.data[0] += 1e-6


def other_epsilon(chat: Chat) -> None:
    for part in chat.model.language.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = 1e-3


def other_heads(chat: Chat) -> None:
    for block in chat.model.vision.tower.blocks:
        block.attn.num_heads, block.attn.head_dim = 2, block.attn.head_dim * 2
        block.attn.scale = block.attn.head_dim**-0.5


def other_mode(chat: Chat) -> None:
    chat.pictures = Pictures(chat.pictures.size, "square", chat.pictures.mean, chat.pictures.std)


def other_template(chat: Chat) -> None:
    chat.talk = template("plain")


@pytest.mark.parametrize(
    "change, told",
    [
        (other_weight, "1 tensors differ, language.model.norm.weight first"),
        (other_epsilon, "log-probability differs by"),
        (other_heads, "log-probability differs by"),
        (other_mode, "a picture becomes other pixels"),
        (other_template, "a question becomes other ids: template plain instead of chatml"),
    ],
)
def test_what_differs_does_not_pass(run_of, change, told):
    chat = Chat.open(run_of().folder)
    other = copy.copy(chat)
    other.model = copy.deepcopy(chat.model)
    assert released.compare(chat, other)["faults"] == []
    change(other)
    assert any(told in fault for fault in released.compare(chat, other)["faults"])


def test_a_torn_copy_leaves_no_name(configure, run_of, monkeypatch):
    true = shutil.copyfile

    def torn(source, target):
        true(source, target)
        if target.suffix == ".safetensors":
            with open(target, "r+b") as file:
                file.seek(-4, 2)
                file.write(b"\0\0\0\0")

    run = run_of()
    monkeypatch.setattr(shutil, "copyfile", torn)
    with pytest.raises(ValueError, match="opened anew, is not the run's model:\n  1 tensors differ"):
        handover.export(configure(f"run={run.folder}", "format=released", page="export"))
    assert names(run.folder) == {"config.yaml", "finetune", "released.failed"}


def front(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_is_known(handed):
    _, out, _ = handed
    card = (out / "README.md").read_text()
    assert front(card) == {
        "library_name": "mvlm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mobilevlm", "ldpnetv2"],
    }
    assert "## Scores\n\nNot measured." in card and "python chat.py run=<this folder>" in card
    assert "generated" not in card, "no source of it is known"
    assert "Started from: vision random weights; language random weights" in card
    assert "mode `pad`" in card and "vision frozen, projector" in card


@pytest.fixture
def card_of(handed, configure):
    """`card_of("model=1.7b", samples)`: the card of such a run, of so many samples by source."""
    about = json.loads((handed[1] / "manifest.json").read_text())

    def card(word: str, samples: dict[str, int]) -> str:
        stages = {"finetune": {"samples": samples, "steps": 2, "precision": "bf16-mixed"}}
        run = SimpleNamespace(config=configure(word), results=lambda protocol: {})
        return released.card(about | {"stages": stages}, run)

    return card


def test_the_card_of_a_run_on_real_data(card_of):
    """Base models and data are named where the configuration has public names; an own file is no set of the hub's."""
    card = card_of("model=1.7b", {"sqa": 3, "mine.json": 1})
    assert front(card)["base_model"] == ["openai/clip-vit-large-patch14-336", "mtgv/MobileLLaMA-1.4B-Chat"]
    assert front(card)["datasets"] == ["sqa"]
    assert "generated" not in card and "language `mtgv/MobileLLaMA-1.4B-Chat`" in card
    assert "| finetune | 4 | 128 | 2 | bf16-mixed | vision frozen, projector 4e-05, language 4e-05 |" in card


def test_the_card_tells_own_files_from_generated_ones(card_of):
    both = card_of("model=nano", {"sqa": 3, "mine.jsonl": 1})
    assert "datasets" not in front(both) and "**The data are generated**" in both
    assert "nothing of the sets themselves. `mine.jsonl`: the owner's." in both
    assert "generated" not in card_of("model=nano", {"mine.jsonl": 1})


def test_scores_with_their_controls(scored):
    run = scored("a", lambda question, view: view == "none", ("blind", "shuffled"))
    told = "\n".join(released._scores(run))
    assert "Protocol paper, on **generated pocket benchmarks**" in told and "must not be put beside the paper's" in told
    for name, cells in score.rows(run.results()).items():
        assert (
            f"| {name} | {cells['none']} | {cells['blind']} | {cells['shuffled']} | {cells.get('items', '')} |" in told
        )
    assert "| benchmark | true picture | no picture | another picture | questions |" in told
    assert "has not learned to see" not in told
    blind = "\n".join(released._scores(scored("b", lambda question, view: True, ("blind",))))
    assert "has not learned to see" in blind
    assert "The controls were not measured" in "\n".join(released._scores(scored("c", lambda question, view: True)))


def test_scores_on_real_files_are_not_called_generated(scored):
    run = scored("a", lambda question, view: True)
    path = run.folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"generated": False}))
    told = "\n".join(released._scores(run))
    assert "generated" not in told and "no published version" in told


@pytest.mark.parametrize("word", ["quant=q4_k", "gate=false"])
def test_keys_of_another_format_are_refused(configure, tmp_path, word):
    with pytest.raises(ValueError, match="says nothing to format=released: leave it out"):
        handover.export(configure(f"run={tmp_path}", "format=released", word, page="export"))


def test_the_picture_that_is_compared_is_one_that_modes_fit_differently():
    looks = [Pictures(96, mode, (0.5,) * 3, (0.2,) * 3)(pictures(96)[1]) for mode in ("pad", "square", "letterbox")]
    assert not any(torch.equal(a, b) for a, b in zip(looks, [*looks[1:], looks[0]], strict=True))
