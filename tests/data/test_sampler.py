"""Order of the samples against the reference's sampler; splitting and resuming by their invariants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm.data.sampler import LengthGroupedSampler, RandomOrder, StepBatches, split

REFERENCE = Path(__file__).parents[1] / "reference"
GOLDEN = json.loads((REFERENCE / "model/sampler.json").read_text())


@pytest.mark.parametrize("kind", ["by_modality", "by_length"])
def test_order_equals_the_reference(kind):
    sampler = LengthGroupedSampler(
        GOLDEN["lengths"], GOLDEN["batch_size"], GOLDEN["world_size"], GOLDEN["seed"], kind == "by_modality"
    )
    assert [sampler.order(0).tolist(), sampler.order(1).tolist()] == [
        GOLDEN[kind]["first_pass"],
        GOLDEN[kind]["second_pass"],
    ]
    assert sampler.order(0).tolist() == GOLDEN[kind]["first_pass"]  # asking again changes nothing


LENGTHS = st.lists(st.integers(-30, 30).filter(bool), min_size=1, max_size=70)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, batch=st.integers(1, 5), world=st.integers(1, 4), seed=st.integers(0, 3))
def test_a_grouped_order_is_a_permutation(lengths, batch, world, seed):
    order = LengthGroupedSampler(lengths, batch, world, seed).order(1).tolist()
    assert sorted(order) == list(range(len(lengths)))
    step = batch * world
    mixed = [k for k in range(0, len(order), step) if len({lengths[i] > 0 for i in order[k : k + step]}) == 2]
    assert len(mixed) <= 3  # only the two remainders meet, at the front and at the end; a short step may sit between


def dealt_one_by_one(lengths, indices, batch, world, generator):
    """A random order cut into steps; in each the longest sample left goes to the micro-batch with the least words and with room."""
    drawn = [indices[k] for k in torch.randperm(len(indices), generator=generator)]
    ordered = []
    for begin in range(0, len(drawn), batch * world):
        step = sorted(drawn[begin : begin + batch * world], key=lambda k: -abs(lengths[k]))
        hands = [step[k::world] for k in range(world)]
        if len(step) % world == 0:
            hands = [[] for _ in range(world)]
            for index in step:
                free = [hand for hand in hands if len(hand) < len(step) // world]
                min(free, key=lambda hand: sum(abs(lengths[k]) for k in hand)).append(index)
        ordered += [k for hand in hands for k in hand]
    return ordered


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, batch=st.integers(1, 5), world=st.integers(1, 4), seed=st.integers(0, 3))
def test_samples_are_dealt_as_one_by_one(lengths, batch, world, seed):
    """The order deals all steps at once; short lengths make for many ties, which the first micro-batch gets."""
    expected = dealt_one_by_one(lengths, range(len(lengths)), batch, world, torch.Generator().manual_seed(seed))
    assert LengthGroupedSampler(lengths, batch, world, seed, by_modality=False).order(0).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, batch=st.integers(1, 5), seed=st.integers(0, 3))
def test_text_first_moves_whole_steps_only(lengths, batch, seed):
    """The same steps as without it, those of text before those of pictures; the steps of both kinds stay at the ends."""
    plain = LengthGroupedSampler(lengths, batch, seed=seed).order(0).tolist()
    moved = LengthGroupedSampler(lengths, batch, seed=seed, text_first=True).order(0).tolist()

    def steps(order):
        return [tuple(order[k : k + batch]) for k in range(0, len(order), batch)]

    assert sorted(steps(moved)) == sorted(steps(plain))
    pure = [lengths[s[0]] > 0 for s in steps(moved) if len(s) == batch and len({lengths[i] > 0 for i in s}) == 1]
    inner = pure[1:-1] if len(pure) > 2 else []  # a remainder may by chance be of one kind
    assert inner == sorted(inner)


def test_zero_lengths_are_refused():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        LengthGroupedSampler([3, 0], 1)


def all_devices(order, global_batch, micro, world, **seek):
    """For each step, for each device, its micro-batches."""
    devices = []
    for rank in range(world):
        batches = StepBatches(order, global_batch, micro, world, rank)
        batches.seek(**seek) if seek else None
        devices.append(list(batches))
        assert len(devices[-1]) == len(batches)
    return list(zip(*devices, strict=True))


@settings(max_examples=80, deadline=None)
@given(
    samples=st.integers(1, 60),
    micro=st.integers(1, 4),
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_sample_once_and_all_devices_alike(samples, micro, world, accumulation, seed):
    order, parts = RandomOrder(samples, seed), world * accumulation
    steps = all_devices(order, micro * parts, micro, world)
    assert len(steps) == -(-samples // (micro * parts))
    for step in steps:
        assert all(len(device) == accumulation for device in step)
        assert all(1 <= len(batch) <= micro for device in step for batch in device)
    seen = [k for step in steps for device in step for batch in device for k in batch]
    left = samples % (micro * parts)
    repeated = parts - left if 0 < left < parts else 0
    assert len(seen) == samples + repeated and set(seen) == set(range(samples))


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 60), seed=st.integers(0, 5))
def test_a_step_is_the_same_however_it_is_split(samples, seed):
    order = RandomOrder(samples, seed)
    splits = [all_devices(order, 12, micro, world) for micro, world in ((12, 1), (3, 1), (3, 2), (4, 3), (2, 3))]
    contents = [[{k for device in step for batch in device for k in batch} for step in steps] for steps in splits]
    filled = samples % 12 in range(1, 7)  # fewer samples than micro-batches: the last step is filled up
    for other in contents[1:]:
        assert other[: len(other) - filled] == contents[0][: len(other) - filled]


def test_by_hand():
    """10 samples, 2 devices, micro-batches of 2, 4 at a time in order: the last step deals its 2 out one by one."""

    class InOrder:
        def __len__(self):
            return 10

        def order(self, epoch):
            return list(range(10))

    assert all_devices(InOrder(), 4, 2, 2) == [
        ([[0, 1]], [[2, 3]]),
        ([[4, 5]], [[6, 7]]),
        ([[8]], [[9]]),
    ]
    # With two micro-batches a device, 0 and 2 go to the first device, 1 and 3 to the second; the last step wraps round.
    assert all_devices(InOrder(), 8, 2, 2) == [
        ([[0, 1], [4, 5]], [[2, 3], [6, 7]]),
        ([[8], [0]], [[9], [1]]),
    ]


def test_going_on_at_a_step():
    order = RandomOrder(50, seed=3)
    first, second = StepBatches(order, 8, 4), StepBatches(order, 8, 4)
    whole = list(first)
    first.seek(first.steps)
    whole += list(first)  # two epochs of 7 steps
    assert whole[0] != whole[7]
    for step in range(14):
        second.seek(step)
        assert list(second) == whole[step : 7 if step < 7 else 14]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "advice"),
    [
        (256, 24, 1, r"take a global batch of 240 or 264, or a micro-batch of 16"),
        (128, 32, 3, r"cannot be split into micro-batches of 32 on 3 devices \(96 at once\): .*96 or 192$"),
        (4, 8, 1, r"take a global batch of 8, or a micro-batch of 4"),
        (0, 1, 1, "must be positive"),
    ],
)
def test_what_cannot_be_split_is_said_with_a_cure(batch, micro, world, advice):
    with pytest.raises(ValueError, match=advice):
        split(batch, micro, world)


def test_wrong_arguments_are_said():
    with pytest.raises(ValueError, match="no sample"):
        StepBatches(RandomOrder(0), 4, 2)
    with pytest.raises(ValueError, match="rank=2 is none of 2 devices"):
        StepBatches(RandomOrder(9), 4, 2, 2, 2)
    with pytest.raises(ValueError, match="not -1"):
        StepBatches(RandomOrder(9), 4, 2).seek(-1)
