"""The loader of a stage: the same batches with and without workers, and the same samples after a resume."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from mvlm.batch import IGNORE_INDEX, Batch
from mvlm.data.datamodule import StepData
from mvlm.data.dataset import Sample


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


def fit(folder, module, learner, **where):
    trainer = L.Trainer(
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
