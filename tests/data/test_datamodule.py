"""The loader of a stage: the same batches with and without workers, and the same samples after a resume."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from itertools import chain
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from mvlm.batch import IGNORE_INDEX, Batch, Skipped
from mvlm.data.byte_tokenizer import build as build_tokenizer
from mvlm.data.datamodule import Skips, StepData, worker_count
from mvlm.data.dataset import LlavaDataset, Sample
from mvlm.data.image import PictureError, Pictures
from mvlm.data.mixture import Mixture
from mvlm.data.prompt import template
from mvlm.data.tokenizer import load_tokenizer


class Numbers(Dataset):
    """Samples whose id is their index and whose text is as long as it says; every third is without a picture."""

    def __init__(self, samples):
        self.samples = samples
        self.loaded = []

    def __len__(self):
        return self.samples

    @property
    def lengths(self):
        return [-(k + 1) if k % 3 == 0 else k + 1 for k in range(self.samples)]

    def __getitem__(self, index):
        self.loaded.append(index)
        ids = [1] * (2 + index % 5)
        pixels = None if index % 3 == 0 else torch.full((3, 2, 2), float(index))
        return Sample(str(index), "numbers", ids, [IGNORE_INDEX, *ids[1:]], pixels)


def data(samples=23, global_batch=8, micro_batch=2, **options):
    return StepData(Numbers(samples), global_batch, micro_batch, **options)


@pytest.mark.parametrize("order", ["random", "grouped", "text_first"])
def test_batches_are_the_same_with_workers(order):
    alone, helped = (data(order=order, workers=workers).train_dataloader() for workers in (0, 2))
    state = torch.get_rng_state()
    for _ in range(2):  # two epochs
        left, right = list(alone), list(helped)
        assert len(left) == len(right) == len(alone) == 12
        for a, b in zip(left, right, strict=True):
            assert isinstance(a, Batch) and a.ids == b.ids and a.step_tokens == b.step_tokens
            assert torch.equal(a.input_ids, b.input_ids)
            assert (a.pixels is None) == (b.pixels is None)
            assert a.pixels is None or torch.equal(a.pixels, b.pixels)
        assert sorted(int(i) for a in left for i in a.ids) == list(range(23))
    assert torch.equal(state, torch.get_rng_state())


def test_steps():
    module = data()
    assert (module.steps, module.accumulation) == (3, 4)
    batches = list(module.train_dataloader())
    for step in range(3):
        some = batches[step * 4 : step * 4 + 4]
        assert {b.step_tokens for b in some} == {sum(b.label_tokens for b in some)}
    assert [len(b.ids) for b in batches] == [2] * 8 + [1, 2, 2, 2]  # the last 7 dealt evenly


def test_epochs_differ_and_a_peek_changes_nothing():
    loader = data().train_dataloader()
    next(iter(loader))
    first, second = [[b.ids for b in loader] for _ in range(2)]
    assert first != second
    assert first == [b.ids for b in data().train_dataloader()]


def test_devices_share_the_steps():
    alone = [b.ids for b in data(micro_batch=2).train_dataloader()]
    pair = [[b.ids for b in data(micro_batch=2, world_size=2, rank=r).train_dataloader()] for r in (0, 1)]
    assert [ids for both in zip(*pair, strict=True) for ids in both] == alone


def test_start_step_loads_nothing_before_it():
    whole = [b.ids for b in data().train_dataloader()]
    module = data(start_step=2)
    loader = module.train_dataloader()
    assert [b.ids for b in loader] == whole[8:]
    assert len(module.dataset.loaded) == 23 - 16
    assert [b.ids for b in loader] == [b.ids for b in data(start_step=3).train_dataloader()]  # the next epoch


class Killed(Exception):
    pass


class Learner(L.LightningModule):
    """Notes what it is given; where told, saves itself after a step and is killed."""

    def __init__(self, die_at=None, checkpoint=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.die_at, self.checkpoint = [], die_at, checkpoint

    def training_step(self, batch, index):
        self.seen.append(batch.ids)
        return self.weight * batch.label_tokens

    def on_train_batch_end(self, *_):
        if self.global_step == self.die_at:
            self.trainer.save_checkpoint(self.checkpoint)
            raise Killed

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, module, learner, callbacks=(), **where):
    trainer = L.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=module.accumulation,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(learner, datamodule=module, **where)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's hints about workers and about resuming inside an epoch
@pytest.mark.parametrize("die_at", [1, 3, 4])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(die_at, tmp_path):
    """3 steps an epoch: killed inside the first, between the two, and inside the second."""
    whole, half, rest = Learner(), Learner(die_at, tmp_path / "half.ckpt"), Learner()
    assert fit(tmp_path, data(), whole).global_step == 6
    assert len(whole.seen) == 24
    with pytest.raises(Killed):
        fit(tmp_path, data(), half)
    trainer = fit(tmp_path, data(), rest, ckpt_path=half.checkpoint, weights_only=False)
    assert half.seen + rest.seen == whole.seen
    assert trainer.global_step == 6


@pytest.fixture
def torn(tmp_path):
    """`torn(...)`: 40 samples, records 7, 19 and 30 with a picture that cannot be read; beside them two bad records in the file."""
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes(b"torn")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    pictures = {7: "torn.png", 19: "torn.png", 30: "torn.png"}
    records = [{"id": str(k), "image": pictures.get(k, "good.png"), "conversations": turns} for k in range(40)]
    (tmp_path / "pets.json").write_text(json.dumps([*records, {"id": "40"}, records[0] | {"image": "gone.png"}]))

    def build(policy="skip"):
        words = load_tokenizer(build_tokenizer(tmp_path))
        look = Pictures(14, "pad", (0, 0, 0), (1, 1, 1))
        exclude = [40, 41] if policy == "stop" else ()
        options = {"image_tokens": 1, "on_bad_sample": policy, "exclude": exclude}
        return Mixture([LlavaDataset(tmp_path / "pets.json", tmp_path, template("chatml"), words, look, **options)])

    return build


COUNTS = {"pets": {"missing picture": 1, "not a picture": 3, "wrong type": 1}}


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_are_counted_once_whoever_loads_them(torn, workers, tmp_path, caplog):
    """Two epochs: the same steps with and without workers, each skipped sample in its place and counted once."""
    mixture, learner = torn(), Learner()
    alone = StepData(mixture, 8, 4).train_dataloader()
    skips = Skips("finetune", mixture, limit=0.2)
    assert skips.summary()["total"] == 2, "what is bad in the file counts from the start"
    fit(tmp_path, StepData(mixture, 8, 4, workers=workers), learner, callbacks=[skips])
    assert learner.seen == [b.ids for b in chain(alone, alone)] and len({i for ids in learner.seen for i in ids}) == 40
    told = skips.summary()
    assert (told["total"], told["of"], told["limit"], told["counts"]) == (5, 42, 0.2, COUNTS)
    assert {one["record"] for one in told["first"]} == {7, 19, 30, 40, 41} and json.dumps(told)
    assert caplog.text.count("finetune: left out: source pets, record 7 (id 7): ") == 1


def test_a_resumed_run_goes_on_counting(torn, tmp_path):
    half, rest, checkpoint = Skips("s", torn(), 0.2), Skips("s", torn(), 0.2), tmp_path / "half.ckpt"
    with pytest.raises(Killed):
        fit(tmp_path, StepData(torn(), 8, 4), Learner(4, checkpoint), callbacks=[half])
    before = len(half.found)
    fit(tmp_path, StepData(torn(), 8, 4), Learner(), ckpt_path=checkpoint, weights_only=False, callbacks=[rest])
    assert 2 < before <= 5 and list(rest.found)[:before] == list(half.found) and rest.counts == COUNTS


def test_too_many_skipped_samples_stop_the_run(torn, tmp_path):
    mixture, learner = torn(), Learner()
    skips = Skips("finetune", mixture, limit=4 / 42)
    told = (
        r"finetune: 5 of 42 samples are bad, more than 4, the limit \(9\.5%\): pets 1 missing picture, 3 not a picture, 1 wrong type\. "
        r"The first: source pets, record 40 \(id 40\): no field `conversations`; source pets, record 41 .*gone\.png is missing; source pets"
    )
    with pytest.raises(ValueError, match=told):
        fit(tmp_path, StepData(mixture, 8, 4), learner, callbacks=[skips])
    assert len(learner.seen) < 20, "before the end"
    with pytest.raises(ValueError, match=r"2 of 42 samples are bad, more than 0\.042, the limit \(0\.1%\)"):
        Skips("finetune", mixture)


@pytest.mark.parametrize("workers", [0, 2])
def test_by_stop_an_unreadable_picture_ends_the_run_in_one_line(torn, workers, tmp_path):
    with pytest.raises(
        PictureError, match=r"^source pets: .*record \d+ \(id \d+\): .*torn\.png: this is not a picture\. Repair"
    ) as raised:
        fit(tmp_path, StepData(torn("stop"), 8, 4, workers=workers), Learner())
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)
    assert not multiprocessing.active_children(), "the workers have ended"


def test_devices_count_together(together):
    """Of two, each meets a sample of its own, and both the same one; so all stop in the same step, and none waits for one that has ended."""

    def counted(rank):
        skips = Skips("s", SimpleNamespace(total=4000, skipped=[]))
        trainer = SimpleNamespace(accumulate_grad_batches=2, world_size=2, is_global_zero=rank == 0)
        module = SimpleNamespace(device=torch.device("cpu"))
        for step, records in enumerate([[], [10 + rank, 5], [5]]):
            skipped = [Skipped("pets", record, "x", "empty file", "") for record in records]
            batch = SimpleNamespace(step_skipped=skipped)
            for micro in (2 * step, 2 * step + 1):
                skips.on_train_batch_end(trainer, module, None, batch, micro)
        found = list(skips.found)
        # The fourth and fifth of 4,000 are above 0.1 %, on both, though one met none.
        batch = SimpleNamespace(step_skipped=[Skipped("pets", k, "x", "", "") for k in (1, 2)] if rank else [])
        with pytest.raises(ValueError, match="5 of 4000"):
            skips.on_train_batch_end(trainer, module, None, batch, 7)
        return found

    assert together(2, counted, patience=60) == [[("pets", 10), ("pets", 5), ("pets", 11)]] * 2


def test_going_on_with_another_order_is_refused():
    state = data().state_dict()
    assert state["step"] == 0 and data(start_step=5).state_dict()["step"] == 5
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        data(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="samples was 23 and is 24"):
        data(samples=24).load_state_dict(state)
    data(micro_batch=4).load_state_dict(state)  # a random order does not depend on it


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="random, grouped or text_first, not 'sorted'"):
        data(order="sorted")
    with pytest.raises(ValueError, match="cannot be split into micro-batches of 3"):
        data(micro_batch=3)


@pytest.mark.parametrize(
    "devices, step_bytes, free, workers",
    [
        (0, 2**20, 2**40, 0),  # the processor trains, or pictures are not decoded: none that would take its cores
        (1, 2**20, 2**40, 8),  # 16 cores: at most 8
        (4, 2**20, 2**40, 3),  # 4 cores a device, one of them for the training
        (16, 2**20, 2**40, 1),
        (1, 2**20, 22 * 2**20, 5),  # 4 MB each: two steps, and as much left free
        (2, 2**20, 22 * 2**20, 2),
    ],
)
def test_workers_by_cores_and_shared_memory(devices, step_bytes, free, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert worker_count("auto", devices, step_bytes, shared=".") == workers
    assert worker_count(3, devices, step_bytes) == 3


def test_a_container_without_shared_memory_is_told(monkeypatch, caplog):
    """Docker gives 64 MB if nothing is said; 256 pictures of 336 pixels, twice, and as much left free, are 1.39 GB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 * 2**20))
    assert worker_count("auto", 1, 256 * 3 * 4 * 336**2, shared=".") == 0
    assert "1.39 GB" in caplog.text and "--shm-size" in caplog.text


@pytest.mark.parametrize("wanted", [-1, "many", 1.5, None])
def test_a_number_of_workers_is_a_number(wanted):
    with pytest.raises(ValueError, match=f"workers={wanted}"):
        worker_count(wanted, 0, 1)
