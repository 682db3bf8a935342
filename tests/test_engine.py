"""Several processes train as one: the same samples, losses, norms and weights with every engine, and each group at its own rate.

Float32 sums in another order. That changes losses of about 5 by 1e-7 of them, and norms alike: 1e-5 is asked for. Adam turns such noise in
near-zero gradients into steps of its own size, so weights are compared in the mean: apart by less than 1 % of what they moved.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo  # the optimizer asks for it; forks should find it there
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig
from torch.distributed.tensor import DTensor

from mvlm import build, engine, fit, resume
from mvlm.data.collate import collate
from mvlm.engine import Load
from mvlm.model.checkpoint import load_checkpoint, save_checkpoint
from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import count_parts, meta_model
from mvlm.run import Run
from mvlm.strategy.stage import Stage

ROOT = Path(__file__).resolve().parents[1]

SHARED = [
    "model=nano", "trainer=cpu", "trainer.precision=32-true", "logger=csv", "strategy=sharegpt4v", "data=v1", "recipe.finetune.order=random",
    "seed=2",
]  # fmt: skip
"""Tower blocks learn in the first stage, and in the second some steps have pictures on one device alone."""

ONE_STEP = ["data.finetune=[]", "recipe.pretrain.batch=8", "recipe.pretrain.base=2e-5", "recipe.warmup=0"]
"""All eight samples in one step of full rates: 1e-3 for the projector, 2e-5 for the rest."""

ON_TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]


def configuration(*words: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*SHARED, *words])


def norm(stage: Stage) -> float:
    """Of all gradients, put together."""
    grads = [p.grad for p in stage.model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
    return sum(float(g.square().sum()) for g in whole) ** 0.5


def train(folder: Path, *words: str) -> dict[str, Any]:
    """A cell's stages as train.py goes through them, and what this process saw of them."""
    cfg = configuration(f"runs={folder.parent}", f"cell={folder.name}", *words)
    L.seed_everything(0, verbose=False)
    run, files, text = Run.open(cfg), build.corpus(cfg), build.tokenizer(cfg)
    model = build.model(cfg)
    data = {stage: build.mixture(cfg, stage, files, text, model.image_tokens) for stage in build.STAGES}
    told: dict[str, Any] = {"ids": {}, "pictures": {}, "norms": {}, "deepspeed": {}}
    step, clip, end = Stage.training_step, Stage.configure_gradient_clipping, Stage.on_train_batch_end

    def recorded_step(self: Stage, batch: Any, index: int) -> Any:
        told["ids"].setdefault(self.name, []).append(batch.ids)
        told["pictures"].setdefault(self.name, []).append(batch.pixels is not None)
        return step(self, batch, index)

    def recorded_clip(self: Stage, *arguments: Any, **more: Any) -> None:
        before = norm(self)
        clip(self, *arguments, **more)
        told["norms"].setdefault(self.name, []).append((before, norm(self)))

    def recorded_end(self: Stage, *arguments: Any) -> None:
        end(self, *arguments)
        if len(self.history) > len(told["deepspeed"].setdefault(self.name, [])) and hasattr(
            self.trainer.model, "get_global_grad_norm"
        ):
            told["deepspeed"][self.name].append(float(self.trainer.model.get_global_grad_norm()))

    if os.environ["RANK"] == "0":
        save_checkpoint(model, folder / "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "training_step", recorded_step)
        patch.setattr(Stage, "configure_gradient_clipping", recorded_clip)
        patch.setattr(Stage, "on_train_batch_end", recorded_end)
        for stage in [stage for stage in build.STAGES if data[stage] and not run.finished(stage)]:
            fit.stage(cfg, run, stage, model, data, files, text)
    told["facts"] = {s: json.loads((run.folder / s / "stage.json").read_text()) for s in told["ids"]}
    return told


def weights(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """Of a saved model, loaded by one process."""
    model = build.model(configuration(*words))
    load_checkpoint(model, folder)
    return {name: value.detach() for name, value in model.named_parameters()}


def two(folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    return {"both": train(folder / "both", *words), "step": train(folder / "step", *words, *ONE_STEP)}


@pytest.fixture(scope="module")
def cells(
    together, nano_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, list]]]:
    """Two cells by one process, and by one pair of processes with DDP and with FSDP2: the folder, and what each process told."""
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVLM_CACHE", str(nano_cache))
        (one,) = together(1, lambda rank: two(folder / "plain"))

        trainers = {"ddp": "ddp", "fsdp2": "fsdp"}

        def both(rank: int) -> dict[str, Any]:
            return {kind: two(folder / kind, f"trainer={name}", *ON_TWO) for kind, name in trainers.items()}

        pair = together(2, both)
        yield folder, {"plain": [one], "ddp": [told["ddp"] for told in pair], "fsdp2": [told["fsdp2"] for told in pair]}


RATES = {"projector": 1e-3, "language": 2e-5, "vision.upper": 2e-5, "vision.lower": 0.0, "vision.unused": 0.0}
"""Of ONE_STEP."""


def largest_steps(cell: Path) -> dict[str, float]:
    """The largest change of a weight, by part."""
    model, largest = build.model(configuration()), dict.fromkeys(RATES, 0.0)
    before, after = weights(cell / "start"), weights(cell / "pretrain")
    for name, value in after.items():
        part = model.part(name)
        largest[part] = max(largest[part], float((value - before[name]).abs().max()))
    return largest


TWO = pytest.mark.parametrize("kind", ["ddp", "fsdp2"])


def compare(ours: dict, wanted: dict, rel: float = 1e-5) -> None:
    """What stage.json says of two trainings that should be one: losses, what is seen of held-out pictures, what moved."""
    assert len(ours["history"]) == len(wanted["history"]) >= 1
    for here, there in zip(ours["history"], wanted["history"], strict=True):
        assert here == pytest.approx(there, rel=rel, abs=rel)
    assert ours["moved"] == wanted["moved"]


def apart(ours: Path, wanted: Path, start: Path) -> float:
    """How far two saved models are from each other, as a share of what the second has moved."""
    there, here, before = map(weights, (wanted, ours, start))
    moved = sum((there[name] - before[name]).abs().sum() for name in before)
    assert moved > 0
    return float(sum((there[name] - here[name]).abs().sum() for name in before) / moved)


@TWO
def test_losses_are_those_of_one_process(cells, kind: str) -> None:
    _, told = cells
    for cell in ("both", "step"):
        for stage, facts in told["plain"][0][cell]["facts"].items():
            for process in told[kind]:
                there = process[cell]["facts"][stage]
                assert (there["engine"], there["devices"], facts["engine"]) == (kind, 2, "plain")
                compare(there, facts)


@TWO
def test_a_step_has_the_samples_of_one_process(cells, kind: str) -> None:
    """The global batch is kept: the processes' samples of a step are those that one process takes, each once."""
    _, told = cells
    for cell, stages in {"both": build.STAGES, "step": ["pretrain"]}.items():
        for stage in stages:
            steps = len(told["plain"][0][cell]["facts"][stage]["history"])

            def dealt(process: dict, cell: str = cell, stage: str = stage, steps: int = steps) -> list[list[str]]:
                micro = process[cell]["ids"][stage]
                each = len(micro) // steps
                return [[name for ids in micro[k : k + each] for name in ids] for k in range(0, len(micro), each)]

            wanted = [sorted(ids) for ids in dealt(told["plain"][0])]
            first, second = map(dealt, told[kind])
            assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == wanted
            assert all(first) and all(second)


@TWO
def test_a_process_without_pictures_keeps_nobody_waiting(cells, kind: str) -> None:
    """It came to an end, so it did not; here is that there were such steps, either way round, and what they learned is compared above."""
    _, told = cells
    first, second = (process["both"]["pictures"]["finetune"] for process in told[kind])
    assert {(True, False), (False, True)} & {*zip(first, second, strict=True)}


@TWO
def test_clipping_is_by_the_norm_of_all_pieces(cells, kind: str) -> None:
    """The norm of the whole gradient is one process', and 1.0, the limit, afterwards."""
    _, told = cells
    for stage in build.STAGES:
        wanted = told["plain"][0]["both"]["norms"][stage]
        for process in told[kind]:
            for (before, after), (unclipped, _) in zip(process["both"]["norms"][stage], wanted, strict=True):
                assert unclipped > 1.1, "else there was nothing to clip"
                assert before == pytest.approx(unclipped, rel=1e-4)
                assert after == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
def test_steps_follow_each_groups_own_rate(cells, kind: str) -> None:
    """Adam's first step is its rate in every weight with a gradient (up to eps), so the largest change of a part is the rate that was
    really used: of saved weights, whatever the settings say."""
    folder, _ = cells
    assert largest_steps(folder / kind / "step") == pytest.approx(RATES, rel=0.02)


@TWO
@pytest.mark.parametrize("stage", build.STAGES)
def test_saved_weights_are_those_of_one_process(cells, kind: str, stage: str) -> None:
    """Whole safetensors at the end of every stage; the second went on from the first's."""
    folder, _ = cells
    ours, wanted = (folder / where / "both" / stage for where in (kind, "plain"))
    assert apart(ours, wanted, folder / "plain" / "both" / "start") < 0.01
    assert {path.name for path in ours.iterdir()} == {path.name for path in wanted.iterdir()}
    assert (ours / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------- which engine


SEVEN = Load(
    parameters=7_000_000_000,
    learning=6_700_000_000,
    micro_batch=16,
    positions=800,
    activations=20_000_000_000,
    checkpointed=20_000_000_000,
)
"""About the 7b's second stage: 16 bytes a learning weight and 4 a frozen one make 108.4 GB."""


@pytest.mark.parametrize(
    "devices, memory, wanted",
    [
        (1, 180e9, "plain, 128 GB of the 180 GB that a device has"),
        (8, 180e9, "ddp, 128 GB of the 180 GB that a device has"),
        (4, 80e9, "fsdp2, 47.1 GB of the 80 GB that a device has, where ddp needs 128 GB"),
    ],
)
def test_memory_picks_the_engine(devices: int, memory: float, wanted: str) -> None:
    """108.4 GB and 20 of activations; in four pieces, 27.1 and 20."""
    assert engine.pick("finetune", SEVEN, devices, int(memory)) == (
        wanted.split(",")[0],
        f"finetune: {wanted}",
        False,
    )


def test_the_margin_is_kept() -> None:
    """DDP needs 128.4 GB: 90 % of 142.7 GB is a little more, of 142.6 GB a little less."""
    assert engine.pick("finetune", SEVEN, 2, int(142.7e9))[0] == "ddp"
    assert engine.pick("finetune", SEVEN, 2, int(142.6e9))[0] == "fsdp2"


def test_layers_are_computed_again_before_weights_are_cut_up() -> None:
    """8 GB instead of 20: 116.4 of 128.4 fit into 130; told how much is spared, and never where it is forbidden."""
    less = replace(SEVEN, checkpointed=8_000_000_000)
    which, told, again = engine.pick("finetune", less, 8, int(130e9))
    assert (which, again) == ("ddp", True) and told.endswith(
        "layers are computed again in the backward, else 12 GB more"
    )
    assert engine.pick("finetune", less, 8, int(130e9), [False])[::2] == ("fsdp2", False)
    assert engine.pick("finetune", less, 8, int(180e9))[2] is False


def test_what_autocast_keeps_is_counted_where_weights_are_whole() -> None:
    """10 GB beside the activations and 14 of bfloat16 copies: 152.4 GB, or 134.4 with layers computed again (copies stay); in pieces 47.1,
    since the weights are bfloat16 themselves."""
    more = replace(SEVEN, cast=10_000_000_000, copies=14_000_000_000, checkpointed=12_000_000_000)
    assert engine.pick("finetune", more, 8, int(170e9))[::2] == ("ddp", False)
    assert engine.pick("finetune", more, 8, int(169e9))[::2] == ("ddp", True)
    which, told, _ = engine.pick("finetune", more, 4, int(80e9), [False])
    assert which == "fsdp2" and "47.1 GB of the 80 GB" in told and "ddp needs 152 GB" in told


def test_a_stage_needs_what_the_plan_says_of_it(finetune) -> None:
    """By hand at nano size: the copies are 2 bytes for each parameter from the first part that learns on, and the rest is the plan's."""
    cfg, mixture = finetune("trainer.precision=bf16-mixed", "strategy=freeze_llm")
    needs = engine.load(cfg, "finetune", mixture)
    sizes = count_parts(meta_model(cfg.model.module))
    assert needs.copies == 2 * (sizes["projector"] + sizes["language"])
    language = cfg.model.module.language.config
    wide = 10 * language.hidden_size * language.num_hidden_layers * needs.positions * cfg.recipe.finetune.micro_batch
    assert needs.cast == wide
    exact, mixture = finetune("trainer.precision=32-true", "strategy=freeze_llm")
    assert (engine.load(exact, "finetune", mixture).cast, engine.load(exact, "finetune", mixture).copies) == (0, 0)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_does_not_fit_is_told_with_the_cure(devices: int) -> None:
    told = rf"into {devices} x 40 GB, of which 90% .* needs 128 GB a device, 108 GB for .* 20 GB for the activations of 16 samples of up to 800"
    with pytest.raises(ValueError, match=told):
        engine.pick("finetune", SEVEN, devices, int(40e9))


@pytest.fixture
def finetune(configure) -> Callable:
    """`finetune("strategy=lora")`: a configuration and its second stage's samples."""

    def made(*words: str) -> tuple[DictConfig, Any]:
        cfg = configure("model=nano", "data=v1", *words)
        model = build.model(cfg)
        return cfg, build.mixture(cfg, "finetune", build.corpus(cfg), build.tokenizer(cfg), model.image_tokens)

    return made


def test_a_stage_is_measured_without_its_weights(finetune) -> None:
    """Parameters by the real model; the longest of all samples, since all are in the micro-batch."""
    cfg, mixture = finetune("recipe.finetune.micro_batch=20", "trainer.precision=32-true")
    found, model = engine.load(cfg, "finetune", mixture), build.model(cfg)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.learning == found.parameters - sum(p.numel() for p in model.vision.parameters())
    encoded = [len(d.encode(d.record(place)).input_ids) for d, place in map(mixture.find, range(len(mixture)))]
    assert found.positions == max(encoded)
    half, _ = finetune("recipe.finetune.micro_batch=20", "trainer.precision=bf16-mixed")
    assert found.activations == 2 * engine.load(half, "finetune", mixture).activations
    adapted, _ = finetune("strategy=lora", "strategy.finetune.lora.r=4", "trainer.precision=32-true")
    less = engine.load(adapted, "finetune", mixture)
    assert less.learning < found.learning and less.parameters > found.parameters


def test_auto_asks_the_memory_before_anything_is_trained(finetune, tmp_path, monkeypatch, capsys) -> None:
    """`fit.check` is what train.py calls first. Memory is set between what the two engines need."""
    cfg, mixture = finetune(
        "trainer=cpu", "trainer.devices=2", f"runs={tmp_path}", "cell=a", "data.pretrain=[]", "checkpointing=false"
    )
    need = engine.load(cfg, "finetune", mixture)
    run, data, files = Run.open(cfg), {"pretrain": None, "finetune": mixture}, build.corpus(cfg)
    between = (need.states(2, "ddp") + need.states(2, "fsdp2")) / 2
    for memory, wanted in (
        (1e12, "finetune: ddp, "),
        ((between + need.activations) / engine.MARGIN, "finetune: fsdp2, "),
    ):
        monkeypatch.setattr(engine, "device_memory", lambda accelerator, here, memory=memory: int(memory))
        fit.check(cfg, data, run, files)
        assert wanted in capsys.readouterr().out.replace("\n", " ")
    cfg.val_every = 5
    with pytest.raises(ValueError, match=r"fsdp2, by trainer\.strategy=auto, keeps a piece"):
        fit.check(cfg, data, run, files)
    monkeypatch.setattr(engine, "device_memory", lambda accelerator, here: 1000)
    with pytest.raises(ValueError, match="finetune does not fit into 2 x"):
        fit.check(cfg, data, run, files)


def test_one_process_on_a_processor_is_plain_and_two_share_it(finetune) -> None:
    cfg, mixture = finetune("trainer=cpu")
    assert engine.chosen(cfg, "finetune", mixture, 1)[0] == "plain"
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert engine.device_memory("cpu", 2) == there // 2


@pytest.mark.parametrize(
    "trainer, wanted",
    [("auto", "auto"), ("cpu", "auto"), ("ddp", "ddp"), ("fsdp", "fsdp2"), ("zero2", "zero2"), ("zero3", "zero3")],
)
def test_trainers_name_their_engine(configure, trainer: str, wanted: str) -> None:
    cfg = configure(f"trainer={trainer}", "trainer.num_nodes=2")
    assert engine.name(cfg.trainer.strategy) == wanted
    assert cfg.trainer.num_nodes == 2


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.strategy is auto, ddp or fsdp2"):
        engine.name("fsdp_cpu_offload")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_parts_run_in_one_order_with_and_without_pictures(finetune) -> None:
    """ZeRO gathers weights and sums gradients in the order of use, so a device without pictures must keep to that of the others: in
    another, stage 3 waited for ever and stage 2 added up the gradients of different parts."""
    cfg, mixture = finetune()
    model, order, runs = build.model(cfg), [], []
    for name in ("projector", "language.model.embed_tokens"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        module.register_full_backward_hook(lambda *_, name=name: order.append(f"back through {name}"))
    for seen in (True, False):
        batch = collate([mixture[k] for k, words in enumerate(mixture.lengths) if (words > 0) == seen][:2])
        model(batch).total.backward()
        runs.append([*order])
        order.clear()
    assert runs[0] == runs[1] and len(runs[0]) == 4


# ---------------------------------------------------------------------------------------------- DeepSpeed


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed on the processor, which Lightning's strategy refuses: its two checks for CUDA are left out, and a compiled shortcut through
    shared memory; nothing else."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra `scale`)")

    class OnProcessors(engine.ZeRO):
        root_device = torch.device("cpu", 0)  # DeepSpeed asks for its number

        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    monkeypatch.setattr(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    monkeypatch.setattr(engine, "ZeRO", OnProcessors)
    monkeypatch.setattr(engine, "check_deepspeed", lambda: None)


ZERO3 = "trainer.strategy.config.zero_optimization.stage3_param_persistence_threshold=0"
"""Or all of so small a model would be whole on every process."""

ZEROS = pytest.mark.parametrize("words", [["trainer=zero2"], ["trainer=zero3", ZERO3]], ids=["zero2", "zero3"])


@pytest.fixture
def one_and_two(together, nano_cache, tmp_path, monkeypatch) -> Callable:
    """`one_and_two(work)`: what `work(folder, words)` returned in one process, and in each of two."""
    monkeypatch.setenv("MVLM_CACHE", str(nano_cache))

    def both(work: Callable[..., Any], *words: str, nodes: int = 1) -> tuple[Any, list[Any]]:
        (one,) = together(1, lambda rank: work(tmp_path / "one"))
        words = (*ON_TWO, *words, f"trainer.num_nodes={nodes}", f"trainer.devices={2 // nodes}")
        return one, together(2, lambda rank: work(tmp_path / "two", *words), nodes)

    return both


@pytest.mark.slow
@ZEROS
def test_deepspeed_trains_as_one_process(deepspeed, one_and_two, tmp_path, words: list[str]) -> None:
    """Losses, norms, rates and saved weights, in the optimizer's float32."""
    one, pair = one_and_two(two, *words)
    for cell, wanted in one.items():
        for stage, facts in wanted["facts"].items():
            for process in pair:
                compare(process[cell]["facts"][stage], facts)
                unclipped = [before for before, _ in wanted["norms"][stage]]
                assert process[cell]["deepspeed"][stage] == pytest.approx(unclipped, rel=1e-4)
            folders = (tmp_path / name for name in (f"two/{cell}/{stage}", f"one/{cell}/{stage}", f"one/{cell}/start"))
            assert apart(*folders) < 0.01
    assert largest_steps(tmp_path / "two" / "step") == pytest.approx(RATES, rel=0.02)


PIECES = pytest.mark.parametrize("words", [["trainer=fsdp"], ["trainer=zero3", ZERO3]], ids=["fsdp", "zero3"])


@pytest.fixture
def pieces(request, words: list[str]) -> list[str]:
    """The words, with DeepSpeed made ready if they ask for it."""
    if "zero" in words[0]:
        request.getfixturevalue("deepspeed")
    return words


@pytest.mark.slow
@PIECES
def test_adapters_in_pieces_are_merged(pieces, one_and_two, tmp_path) -> None:
    """Put together, then merged, they give what one process' do."""
    adapters = ["strategy=lora", "strategy.finetune.lora.lora_dropout=0", "data.pretrain=[]"]
    one, pair = one_and_two(lambda folder, *words: train(folder, *words, *adapters), *pieces)
    compare(pair[0]["facts"]["finetune"], one["facts"]["finetune"])
    assert apart(*(tmp_path / name for name in ("two/finetune", "one/finetune", "one/start"))) < 0.01


@pytest.mark.slow
@PIECES
def test_pieces_compute_in_bfloat16_and_learn_in_float32(pieces, one_and_two, tmp_path) -> None:
    """bfloat16 has 8 bits, 0.4 %: losses within 1 % of float32's. What has learned is saved with more bits than bfloat16 has."""
    one, pair = one_and_two(train, *pieces, "trainer.precision=bf16-mixed")
    for stage, facts in one["facts"].items():
        compare(pair[0]["facts"][stage], facts, rel=0.01)
        saved = weights(tmp_path / "two" / stage)
        learned = torch.cat([value.flatten() for name, value in saved.items() if name.startswith("projector")])
        assert (learned != learned.bfloat16().float()).float().mean() > 0.9


@pytest.mark.slow
def test_two_nodes_train_as_one_process(one_and_two) -> None:
    """A process on each, and one run folder."""
    one, pair = one_and_two(train, "trainer=fsdp", nodes=2)
    for stage, facts in one["facts"].items():
        for process in pair:
            compare(process["facts"][stage], facts)


# ------------------------------------------------------------------------------------------- devices that come and go


def killed(folder: Path, *words: str) -> Any:
    """A cell whose processes die in the third step of its second stage. Call it in forks of their own."""
    real = Stage.training_step

    def training_step(self: Stage, batch: Any, index: int) -> Any:
        if self.name == "finetune" and self.global_step == 2:
            raise RuntimeError("killed on purpose")
        return real(self, batch, index)

    Stage.training_step = training_step
    return train(folder, "checkpoint_every=1", *words)


def goes_on(together, folder: Path, whole: tuple[Path, Path], told: dict[str, Any], *words: str) -> None:
    """Two processes die; two go on, and one goes on, with twice the micro-batches a step.

    Two go on to the very weights that they would have come to: the same sums in the same order. One takes the samples of every step of a
    process that was alone from the beginning, and has losses as equal as sums over other numbers of processes round.

    Args:
        whole: the cell that one process trained, and the one that two trained, which nothing stopped.
        told: by the first of them.
        words: of two processes.
    """
    died, again = folder / "died" / "both", folder / "again" / "both"
    with pytest.raises(RuntimeError, match="killed on purpose"):
        together(2, lambda rank: killed(died, *words))
    assert [p.name for p in resume.checkpoints(died / "finetune")] == ["step-2", "step-1"]
    copytree(died, again)
    together(2, lambda rank: train(again, "checkpoint_every=1", *words))
    ours, wanted = (weights(cell / "finetune") for cell in (again, whole[1]))
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    assert not resume.checkpoints(again / "finetune")

    (rest,) = together(1, lambda rank: train(died, "checkpoint_every=1"))
    assert set(rest["ids"]) == {"finetune"}, "the first stage was finished"
    micro_batches = len(told["ids"]["finetune"]) // len(told["facts"]["finetune"]["history"])
    assert micro_batches == 2 and rest["ids"]["finetune"] == told["ids"]["finetune"][2 * micro_batches :]
    compare(rest["facts"]["finetune"], told["facts"]["finetune"])
    assert apart(died / "finetune", whole[0] / "finetune", whole[0] / "start") < 0.01


@pytest.mark.parametrize("kind, trainer", [("ddp", "ddp"), ("fsdp2", "fsdp")])
def test_a_killed_stage_goes_on(
    together, cells, nano_cache: Path, tmp_path, monkeypatch, kind: str, trainer: str
) -> None:
    monkeypatch.setenv("MVLM_CACHE", str(nano_cache))
    folder, told = cells
    whole = (folder / "plain" / "both", folder / kind / "both")
    goes_on(together, tmp_path, whole, told["plain"][0]["both"], f"trainer={trainer}", *ON_TWO)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, told",
    [
        (lambda loss: loss * math.nan, "step 2 diverged: its loss is nan.*No weight was changed by it"),
        (
            lambda loss: loss + (loss * 0).sqrt(),
            "step 2: the norm of its gradient is no number, and DeepSpeed has taken it",
        ),
    ],
    ids=["loss", "gradient"],
)
def test_a_step_of_deepspeed_that_diverges(
    deepspeed, together, nano_cache, tmp_path, monkeypatch, how, told: str
) -> None:
    """Whether its weights were spoilt is said; the checkpoint before is whole either way."""
    monkeypatch.setenv("MVLM_CACHE", str(nano_cache))
    real = MobileVLM.forward

    def forward(self: MobileVLM, batch: Any) -> Any:
        forward.calls += 1
        loss = real(self, batch)
        return loss._replace(total=how(loss.total)) if forward.calls > 1 else loss

    forward.calls = 0
    monkeypatch.setattr(MobileVLM, "forward", forward)
    words = ["trainer=zero2", *ON_TWO, "checkpoint_every=1", "recipe.pretrain.micro_batch=2", "recipe.pretrain.batch=4"]
    with pytest.raises(RuntimeError, match=f"(?s){told}"):
        together(2, lambda rank: train(tmp_path / "one", *words))
    assert [p.name for p in resume.checkpoints(tmp_path / "one" / "pretrain")] == ["step-1"]
    assert not resume.torn(tmp_path / "one" / "pretrain" / "step-1")


@pytest.mark.slow
@ZEROS
def test_a_killed_stage_of_deepspeed_goes_on(deepspeed, together, one_and_two, tmp_path, words: list[str]) -> None:
    one, _ = one_and_two(train, *words)
    goes_on(together, tmp_path, (tmp_path / "one", tmp_path / "two"), one, *words, *ON_TWO)


# ---------------------------------------------------------------------------------------------------- GPUs


@pytest.fixture(scope="module")
def on_a_processor(shell) -> dict[str, list[float]]:
    """The losses of a cell's stages in float32."""
    return losses(shell, "processor", "trainer=cpu")


def losses(shell: Callable, cell: str, *words: str) -> dict[str, list[float]]:
    shell("train.py", *SHARED, f"cell={cell}", "evaluate=false", *words)
    stages = {stage: shell.folder / "runs" / cell / stage / "stage.json" for stage in build.STAGES}
    return {stage: [step["loss"] for step in json.loads(file.read_text())["history"]] for stage, file in stages.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("trainer", ["auto", "ddp", "fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_gpus_train_as_a_processor(shell, on_a_processor, trainer: str, attention: str) -> None:
    """Two of them, where there are two. Kernels add in an order of their own, 1e-7 of a loss, and Adam makes steps of such noise: 1e-3 is
    asked for, where processors that add in one order come to 1e-5."""
    if trainer.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra `scale`)")
    words = [f"trainer={trainer}", "trainer.accelerator=gpu", f"trainer.devices={min(2, torch.cuda.device_count())}"]
    words += ["trainer.precision=32-true", f"+model.module.language.config.attn_implementation={attention}"]
    found = losses(shell, f"{trainer}-{attention}", *words)
    for stage, wanted in on_a_processor.items():
        assert found[stage] == pytest.approx(wanted, rel=1e-3), stage
