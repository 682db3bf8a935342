"""Batches against the reference's collator, and the token counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN, Skipped
from mvlm.data.collate import collate, collate_step
from mvlm.data.dataset import LlavaDataset, Sample
from mvlm.data.image import Pictures
from mvlm.data.prompt import template
from mvlm.data.tokenizer import load_tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
BATCHES = {b["name"]: b for b in json.loads((REFERENCE / "text/batches.json").read_text())}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_equal_the_reference(name, tmp_path):
    expected = BATCHES[name]
    (tmp_path / "data.json").write_text(json.dumps(expected["records"]))
    dataset = LlavaDataset(
        tmp_path / "data.json",
        REFERENCE / "images",
        template(expected["version"]),
        load_tokenizer(REFERENCE / "tokenizer"),
        Pictures(336, expected["image_aspect_ratio"], **CLIP),
        image_tokens=1,
        max_length=expected["model_max_length"],
    )
    batch = collate(list(dataset), pad_id=0)
    labels = torch.tensor(expected["labels"])
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert torch.equal(batch.labels, labels.masked_fill(labels == IMAGE_TOKEN, IGNORE_INDEX))
    # No text of these records has an <unk>, the one case in which the reference's mask differs.
    assert batch.attention_mask.int().tolist() == expected["attention_mask"]
    # A text-only record brings no picture here; the reference stacks a zero picture that its text never uses.
    placeholders = int((batch.input_ids == IMAGE_TOKEN).sum())
    assert (0 if batch.pixels is None else len(batch.pixels)) == placeholders


def sample(name, labelled, length, **fields):
    return Sample(name, "s", [5] * length, [IGNORE_INDEX] * (length - labelled) + [5] * labelled, **fields)


def test_step_tokens_are_those_of_all_micro_batches():
    batches = collate_step([[sample("a", 2, 4), sample("b", 3, 6)], [sample("c", 5, 5)]])
    # c is labelled from its first position on, which nothing predicts: 2 + 3 + 4.
    assert [b.step_tokens for b in batches] == [9, 9]
    assert sum(b.label_tokens for b in batches) == 9
    assert [b.ids for b in batches] == [["a", "b"], ["c"]]
    assert batches[0].input_ids.shape == (2, 6) and batches[0].attention_mask[0].tolist() == [True] * 4 + [False] * 2
    assert (batches[0].input_ids[0, 4:] == 0).all() and (batches[0].labels[0, 4:] == IGNORE_INDEX).all()
    assert collate([sample("a", 1, 2), sample("b", 1, 3)], pad_id=7).input_ids[0, 2] == 7


def test_pictures_stand_in_the_order_of_the_samples():
    pictures = [torch.full((3, 2, 2), float(k)) for k in range(2)]
    batch = collate([sample("a", 1, 3, pixels=pictures[0]), sample("t", 1, 2), sample("b", 1, 3, pixels=pictures[1])])
    assert torch.equal(batch.pixels, torch.stack(pictures)) and batch.features is None
    batch = collate([sample("a", 1, 3, features=torch.ones(4, 8))])
    assert batch.features.shape == (1, 4, 8) and batch.pixels is None


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
    with pytest.raises(ValueError, match="1 pictures come as pixels and 1 as features"):
        collate([sample("a", 1, 3, pixels=torch.ones(3, 2, 2)), sample("b", 1, 3, features=torch.ones(4, 8))])


def test_a_step_knows_what_was_skipped():
    """In every micro-batch of it; a micro-batch of nothing else is one token wide and teaches nothing."""
    skipped = Skipped("pets", 3, "x", "empty file", "why")
    blank = Sample("x", "pets", [9], [IGNORE_INDEX], skipped=skipped)
    good = Sample("y", "pets", [1, 2], [IGNORE_INDEX, 2])
    alone, both = collate_step([[blank], [good, blank]])
    assert alone.step_skipped == both.step_skipped == [skipped, skipped]
    assert alone.input_ids.shape == (1, 1) and alone.step_tokens == both.step_tokens == 1
    assert both.to("cpu").step_skipped == [skipped, skipped]


def test_a_loader_pins_a_batch(monkeypatch):
    """By torch's own function, that looks for a method; there is no GPU here, so pinning itself is a copy that is remembered."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda one: pinned.append(one) or one.clone())
    batch = collate(
        [Sample("a", "made", [1, IMAGE_TOKEN, 5], [IGNORE_INDEX, IGNORE_INDEX, 5], pixels=torch.rand(3, 4, 4))]
    )
    given = pin_memory(batch)
    assert {id(one) for one in pinned} == {
        id(getattr(batch, n)) for n in ("input_ids", "labels", "attention_mask", "pixels")
    }
    assert torch.equal(given.pixels, batch.pixels) and given.pixels is not batch.pixels and given.ids == ["a"]
