"""The joined model against the official code: sequences, logits, answers, losses, gradients, a short training run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN, Batch
from mvlm.model.names import model_names

TOLERANCE = {"atol": 1e-4, "rtol": 0}  # float32 sums in another order: 9e-6 seen, on logits of up to 9


def expanded(ids: torch.Tensor, count: int, fill: int, *others: torch.Tensor) -> list[torch.Tensor]:
    """One row with each picture's single id written `count` times, and further rows filled at the same places."""
    repeats = torch.where(ids == IMAGE_TOKEN, count, 1)
    holes = (ids == IMAGE_TOKEN).repeat_interleave(repeats)
    return [ids.repeat_interleave(repeats), *(o.repeat_interleave(repeats).masked_fill(holes, fill) for o in others)]


def training_batch(released, version: str) -> Batch:
    """The official batch in our form. A record without a picture has none; theirs a blank one that nothing reads."""
    t, count = released.tensors, released.model.image_tokens
    rows = [
        expanded(ids, count, IGNORE_INDEX, labels)
        for ids, labels in zip(t[f"{version}.input_ids"], t[f"{version}.labels"], strict=True)
    ]
    masks = [expanded(ids, count, 1, ids != 0)[1] for ids in t[f"{version}.input_ids"]]
    return Batch(
        input_ids=pad_sequence([ids for ids, _ in rows], batch_first=True),
        labels=pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORE_INDEX),
        attention_mask=pad_sequence(masks, batch_first=True).bool(),
        pixels=released.pixels,
    )


def prompt_batch(released, name: str, answer: list[int]) -> Batch:
    ids = torch.cat([released.tensors[f"{name}.input_ids"], torch.tensor(answer, dtype=torch.long)])
    (ids,) = expanded(ids, released.model.image_tokens, 0)
    shown = [released.facts["images"].index(image) for image in released.facts["prompts"][name]["images"]]
    features = released.features[shown] if shown else None  # encoded once
    return Batch(ids[None], torch.full_like(ids[None], IGNORE_INDEX), torch.ones_like(ids[None]).bool(), None, features)


def test_projected_tokens(released):
    features = released.tensors.get("vision_features")
    with torch.no_grad():
        tokens = released.model.project(released.model.encode(released.pixels) if features is None else features)
    torch.testing.assert_close(tokens, released.tensors["projector_output"], **TOLERANCE)
    assert tokens.shape[1] == released.model.image_tokens == (576 if released.kind == "mlp2x_gelu" else 144)


PROMPTS = ("one_image", "one_image_short", "text_only", "two_images", "stops_early")


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_logits_and_greedy_answer(released, name):
    facts, t, model = released.facts["prompts"][name], released.tensors, released.model
    batch = prompt_batch(released, name, [])
    assert batch.input_ids.shape[1] == facts["sequence_length"]
    logits = model.logits(batch)[0]
    torch.testing.assert_close(logits[t[f"{name}.logit_positions"]], t[f"{name}.logits"], **TOLERANCE)
    answer: list[int] = []
    while len(answer) < 16 and answer[-1:] != [2]:
        answer.append(int(model.logits(prompt_batch(released, name, answer))[0, -1].argmax()))
    # the nearest runner-up stays far above the tolerance, so the answer can't turn on rounding
    assert facts["smallest_top2_gap"] > 10 * TOLERANCE["atol"]
    assert answer == facts["generated_ids"] == t[f"{name}.generated_ids"].tolist()


@pytest.mark.parametrize("version", ["v1", "plain"])
def test_training_sequences(released, version):
    batch, t = training_batch(released, version), released.tensors
    assert torch.equal(batch.labels, t[f"{version}.expanded_labels"])
    assert torch.equal(batch.attention_mask, t[f"{version}.expanded_attention_mask"].bool())
    with torch.no_grad():
        norms = released.model.inputs(batch).norm(dim=-1)
    seen = batch.attention_mask
    torch.testing.assert_close(norms[seen], t[f"{version}.expanded_embeds_norm"][seen], **TOLERANCE)


@pytest.mark.parametrize("version", ["v1", "plain"])
def test_loss_and_gradients(released, version):
    """Norms within 1e-3, far above the 6e-7 seen: other processors sum a convolution's gradient in another order."""
    model, facts = copy.deepcopy(released.model), released.facts["train"][version]
    batch = training_batch(released, version)
    loss = model(batch)
    assert loss.tokens == batch.label_tokens == sum(example["label_tokens"] for example in facts["per_example"])
    assert float(loss.total.detach()) / loss.tokens == pytest.approx(facts["loss"], abs=1e-5)

    (loss.total / loss.tokens).backward()
    parameters = dict(model.named_parameters())
    norms, without = {}, set()
    for place in model_names(model):
        grad = parameters[place.ours].grad
        if grad is None:
            without |= set(place.theirs)
        else:
            norms[place.theirs[0]] = float(grad.double().norm())
    assert norms == pytest.approx(facts["grad_norm"], rel=1e-3)
    assert all(any(name.startswith(listed) for listed in facts["no_grad"]) for name in without)
    assert without == {name for p in model_names(model) if p.ours.startswith("vision.") for name in p.theirs}


@torch.no_grad()
def test_rows_alone_lose_what_they_lose_together(released):
    """No neighbour and no padding leaks into a row: batches of one, unpadded, give the official per-row sums."""
    batch, facts = training_batch(released, "v1"), released.facts["train"]["v1"]["per_example"]
    pictures = iter(released.pixels)
    for row, example in enumerate(facts):
        length = int(batch.attention_mask[row].sum())
        ids = batch.input_ids[row : row + 1, :length]
        pixels = next(pictures)[None] if (ids == IMAGE_TOKEN).any() else None
        loss = released.model(Batch(ids, batch.labels[row : row + 1, :length], torch.ones_like(ids).bool(), pixels))
        # absolute and on sums of up to 1,200, so 1e-3 is about 1e-6 of the value
        assert (
            float(loss.total) == pytest.approx(example["nll_sum"], abs=1e-3) and loss.tokens == example["label_tokens"]
        )


def test_training_run(released):
    """Ten steps with the official rates, schedule and optimizer: same losses, and every parameter goes as far."""
    model, facts = copy.deepcopy(released.model), released.facts["train_steps"]
    settings, batch = facts["settings"], training_batch(released, "v1")
    start = copy.deepcopy(model.state_dict())
    rates = {model.language: settings["learning_rate"], model.projector: settings["mm_projector_lr"]}
    adam = {"betas": settings["betas"], "eps": settings["eps"], "weight_decay": settings["weight_decay"]}
    optimizer = torch.optim.AdamW([{"params": part.parameters(), "lr": rate} for part, rate in rates.items()], **adam)
    steps, warmup = settings["total"], math.ceil(settings["warmup_ratio"] * settings["total"])
    for step, wanted in enumerate(facts["steps"]):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (step / warmup if step < warmup else cosine)
        groups = [optimizer.param_groups[0]["lr"]] * 2 + [optimizer.param_groups[1]["lr"]] * 2
        assert groups == pytest.approx(wanted["lr"], rel=1e-9)
        optimizer.zero_grad()
        loss = model(batch)
        assert float(loss.total.detach()) / loss.tokens == pytest.approx(wanted["loss"], rel=1e-3)
        (loss.total / loss.tokens).backward()
        optimizer.step()
    end = model.state_dict()
    moved = {
        place.theirs[0]: float((end[place.ours] - start[place.ours]).double().norm())
        for place in model_names(model)
        if not place.ours.startswith("vision.")
    }
    assert moved == pytest.approx(facts["moved_l2"], rel=1e-3)  # Adam turns rounding of tiny gradients into whole steps
    assert all(torch.equal(end[name], start[name]) for name in end if name.startswith("vision."))


def test_after_the_last_attention_only_what_is_read_is_computed(released):
    """Loss and gradients are those of the logits at all positions, where a hook sees the last feed-forward half given labelled ones alone."""
    model, batch = copy.deepcopy(released.model), training_batch(released, "v1")
    learning = [p for p in model.parameters() if p.requires_grad]
    wanted = cross_entropy(model.logits(batch)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    gradients, given = torch.autograd.grad(wanted, learning, allow_unused=True), []
    for layer in model.language.model.layers[-2:]:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].shape[:2].numel()))
    loss = model(batch)
    assert given == [batch.attention_mask.numel(), loss.tokens] and loss.tokens < batch.attention_mask.sum()
    torch.testing.assert_close(loss.total, wanted, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss.total, learning, allow_unused=True), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # As another kind of decoder, whose layers know nothing of this.
    model.language.model.layers[-1].__class__ = LlamaDecoderLayer
    torch.testing.assert_close(model(batch).total, wanted, rtol=1e-6, atol=0)


def test_text_alone_still_reaches_the_projector(released):
    """Every projector parameter gets a gradient, of zero, and the loss is that of the language model by itself."""
    model = copy.deepcopy(released.model)
    batch = training_batch(released, "v1")
    text = Batch(batch.input_ids[1:2], batch.labels[1:2], batch.attention_mask[1:2])
    loss = model(text)
    loss.total.backward()
    for name, parameter in model.projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert all(p.grad is not None for p in model.language.parameters())
    length = int(text.attention_mask.sum())
    alone = model.language(input_ids=text.input_ids[:, :length], labels=text.labels[:, :length])
    assert float(loss.total.detach()) / loss.tokens == pytest.approx(float(alone.loss.detach()), rel=1e-6)


def test_nothing_labelled_is_a_loss_of_zero(ldpnetv2):
    batch = training_batch(ldpnetv2, "plain")
    batch.labels = torch.full_like(batch.labels, IGNORE_INDEX)
    loss = ldpnetv2.model(batch)
    assert float(loss.total.detach()) == 0 and loss.tokens == 0 and loss.total.requires_grad


def test_features_stand_in_for_pixels(released):
    batch = training_batch(released, "plain")
    kept = Batch(batch.input_ids, batch.labels, batch.attention_mask, features=released.model.encode(batch.pixels))
    assert torch.equal(released.model(batch).total, released.model(kept).total)


@torch.no_grad()
def test_padding_on_the_left_changes_no_logit(ldpnetv2):
    batch = prompt_batch(ldpnetv2, "one_image", [])
    length, pad = batch.input_ids.shape[1], 5
    left = Batch(
        torch.nn.functional.pad(batch.input_ids, (pad, 0)),
        torch.nn.functional.pad(batch.labels, (pad, 0), value=IGNORE_INDEX),
        torch.nn.functional.pad(batch.attention_mask, (pad, 0)),
        features=batch.features,
    )
    logits = ldpnetv2.model.logits(left)[:, pad:]
    assert logits.shape[1] == length
    # rotary positions are shifted by `pad`: equal in exact arithmetic, rounded elsewhere
    torch.testing.assert_close(logits, ldpnetv2.model.logits(batch), **TOLERANCE)


def test_pictures_fill_placeholders_in_order(ldpnetv2):
    model, count = ldpnetv2.model, ldpnetv2.model.image_tokens
    ids = torch.tensor([[5] + [IMAGE_TOKEN] * count + [6], [IMAGE_TOKEN] * count + [7, 8]])
    tokens = torch.randn(2, count, 64)
    embedded = model.embed(ids, tokens)
    assert torch.equal(embedded[0, 1:-1], tokens[0]) and torch.equal(embedded[1, :-2], tokens[1])
    words = model.language.get_input_embeddings()
    assert torch.equal(embedded[0, [0, -1]], words(torch.tensor([5, 6])))


@pytest.mark.parametrize(("holes", "pictures"), [(143, 1), (145, 1), (288, 1), (144, 2), (144, 0), (0, 1)])
def test_placeholders_and_pictures_must_agree(ldpnetv2, holes, pictures):
    ids = torch.tensor([[1] + [IMAGE_TOKEN] * holes + [2]])
    tokens = torch.zeros(pictures, 144, 64) if pictures else None
    with pytest.raises(ValueError, match=rf"{holes} image placeholders.* {144 * pictures} tokens.*image_tokens=144"):
        ldpnetv2.model.embed(ids, tokens)


def test_parts_cover_every_parameter(ldpnetv2):
    parts = {ldpnetv2.model.part(name) for name, _ in ldpnetv2.model.named_parameters()}
    assert parts == {"vision.lower", "vision.upper", "vision.unused", "projector", "language"}


def test_the_tower_keeps_a_graph_only_if_it_trains(ldpnetv2):
    model = copy.deepcopy(ldpnetv2.model)
    assert not model.encode(ldpnetv2.pixels[:1]).requires_grad
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part(name) == "vision.upper")
    model.encode(ldpnetv2.pixels[:1]).sum().backward()
    assert {model.part(n) for n, p in model.named_parameters() if p.grad is not None} == {"vision.upper"}
