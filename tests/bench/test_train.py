"""The training bench: both ways see the same, and what is called useful is what a hand counts."""

from __future__ import annotations

import pytest
import torch

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN
from mvlm.bench import train
from mvlm.data.collate import collate
from mvlm.plan import meta_model
from mvlm.strategy.parameters import freeze_and_group


@pytest.fixture
def cfg(configure):
    return configure(
        "target=train", "model=nano", "projector=pw2", "rounds=1", "steps=2", "micro_batch=2", page="bench"
    )


@pytest.fixture
def data(cfg, tmp_path):
    return train.Dialogues(tmp_path, 5, 64, 259, train.build.pictures(cfg, "finetune"))


def test_dialogues_are_always_the_same(data, cfg, tmp_path):
    again = train.Dialogues(tmp_path, 5, 16, 259, train.build.pictures(cfg, "finetune"))
    assert again.texts == data.texts and len(set(data.lengths)) > 1
    one = data[0]
    assert one.input_ids.count(IMAGE_TOKEN) == 64 and len(one.labels) == len(one.input_ids) == 65 + data.lengths[0]
    learned = [label for label in one.labels if label != IGNORE_INDEX]
    assert learned == data.texts[0][-len(learned) :] and len(learned) == data.lengths[0] // 2


def test_useful_is_what_a_hand_counts(cfg):
    """nano: a tower of 48 in 3 blocks of which 2 run, 8x8 patches of 14 px; a LLaMA of 64 in 2 layers with 4 heads of 16 and 2 key heads."""
    net = meta_model(cfg.model.module)
    freeze_and_group(net, {"vision": None, "projector": 1e-3, "language": 1e-3})
    words = 10
    length, patches = 64 + 1 + words, 64
    tower = 2 * patches * (3 * 14 * 14 * 48) + 2 * (2 * patches * (4 * 48 * 48 + 2 * 48 * 192) + 4 * patches**2 * 48)
    projector = (
        2 * patches * (48 * 64) * 2 + 2 * patches * (64 * 64) * 3
    )  # nothing before the first layer wants a gradient
    layer = 2 * length * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) + 4 * 64 * length * (length + 1) // 2
    unread = (
        2 * (length - words // 2) * 3 * 64 * 160
    )  # by the head, so the last layer's feed-forward half need not be there
    head = 2 * (words // 2) * 64 * 259
    assert train.needed(net, words) == tower + projector + 3 * (2 * layer - unread + head)
    once, never = (train.useful(cfg, [[5] * words], encoded)[0] for encoded in (1.0, 0.0))
    assert once == train.needed(net, words) and once - never == tower


def test_kept_features_are_those_of_the_tower(cfg, data) -> None:
    """Both kinds of sample show a model the same."""
    model = train.build.model(cfg)
    data.features = train.encode_pictures(model, map(str, data.pictures), data.look)
    kept = collate([data[0], data[1]])
    data.features = None
    batch = collate([data[0], data[1]])
    assert kept.pixels is None and torch.equal(model.encode(batch.pixels), kept.features)


def test_the_peer_is_given_the_same(data, cfg):
    """The same ids, labels and pictures; its placeholder is the id behind the last word."""
    batch, theirs = collate([data[0], data[1]]), train.for_the_peer([data[0], data[1]], 259)
    pictures = batch.input_ids == IMAGE_TOKEN
    assert torch.equal(theirs["input_ids"] == 259, pictures)
    assert torch.equal(theirs["input_ids"][~pictures], batch.input_ids[~pictures])
    assert torch.equal(theirs["labels"], batch.labels) and torch.equal(theirs["pixel_values"], batch.pixels)
    assert torch.equal(theirs["attention_mask"].bool(), batch.attention_mask)


@pytest.mark.slow  # trains both
@pytest.mark.parametrize(
    "projector, tokens, kept, attention", [("pw2", 64, "false", "sdpa"), ("ldpv2", 16, "true", "grouped")]
)
def test_both_ways_train(configure, projector, tokens, kept, attention, capsys):
    words = ["target=train", "model=nano", f"projector={projector}", "rounds=1", "steps=2", "precision=float32"]
    words += [f"keep_features={kept}", f"+model.module.language.config.attn_implementation={attention}"]
    measured = train.run(configure(*words, page="bench"))
    ours, peer = measured["ways"].values()
    assert ours["image_tokens"] == tokens and peer["image_tokens"] == 64
    assert (ours["flops_per_sample"] == peer["flops_per_sample"]) == (projector == "pw2")
    assert 0 <= ours["waited"] < 1
    assert (ours["padding"] == 0) == (attention == "grouped") and 0 < peer["padding"] < 1
    assert measured["ratio"] == pytest.approx(ours["samples_per_second"] / peer["samples_per_second"], rel=0.01)
    assert "ratio of samples/s" in capsys.readouterr().out
