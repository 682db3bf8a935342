from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from mvlm.batch import IGNORE_INDEX, IMAGE_TOKEN, Batch
from mvlm.model.mobilevlm import MobileVLM
from mvlm.plan import (
    GPUS,
    PAPER,
    PAPER_CELL,
    Plan,
    activations,
    count_parts,
    count_samples,
    hours,
    main,
    meta_model,
    plan,
    states,
    work,
)
from mvlm.scale import LINKS, Cluster, row
from mvlm.strategy.parameters import freeze_and_group

CONF = Path(__file__).parents[1] / "conf"


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("plan", list(overrides), return_hydra_config=True)
    chosen = cfg.hydra.runtime.choices
    cfg.cell = "-".join(chosen[group] for group in ("model", "projector", "data", "strategy"))  # needs a running script
    return cfg


SHALLOW = ("text=100", "+model.module.vision.depth=6", "model.module.language.config.num_hidden_layers=3")
"""The 1.7b with a fraction of its layers, which counts in a fraction of the time."""


@cache
def planned(*overrides: str) -> Plan:
    cfg = composed(*overrides)
    return plan(cfg, cfg.devices, cfg.text)


# -- parameters, a second way


def llama(vocabulary: int, width: int, mlp: int, layers: int, keys: int, tied: bool = False) -> int:
    """Embeddings, head, and a layer: q and o, k and v, gate, up and down, two norms; a last norm."""
    layer = 2 * width**2 + 2 * width * keys + 3 * width * mlp + 2 * width
    return vocabulary * width * (1 if tied else 2) + layers * layer + width


def vit(width: int, layers: int, positions: int, clip: bool) -> int:
    """Patches of 14 x 14, positions, and a layer: qkv, o, an MLP four times as wide, biases and two norms; a last norm.

    CLIP has a class token and a norm in front, DINOv2 a bias on its patches and two layer scales.
    """
    ends = 3 * width if clip else width
    return (
        3 * 14**2 * width
        + positions * width
        + ends
        + layers * (12 * width**2 + (13 if clip else 15) * width)
        + 2 * width
    )


CLIP = vit(1024, 24, 24 * 24 + 1, clip=True)
EXPECTED = {
    "nano": (vit(48, 3, 8 * 8, clip=False), llama(259, 64, 160, 2, 32, tied=True)),
    "pocket": (vit(384, 12, 24 * 24, clip=False), llama(49152, 576, 1536, 30, 192, tied=True)),
    "1.7b": (CLIP, llama(32000, 2048, 5632, 24, 2048)),
    "3b": (CLIP, llama(32000, 2560, 6912, 32, 2560)),
    "7b": (CLIP, llama(32000, 4096, 11008, 32, 4096)),
}
PROJECTORS = {  # Table 7 at 1024 -> 2048: parameters, tokens
    "pw2": (6_295_552, 576),
    "ldpv1": (18_936_832, 144),
    "avgpool": (6_295_552, 144),
    "learnable_pe": (6_590_464, 144),
    "ldpv2": (6_316_032, 144),
}


def parts_of(counts: dict[str, int]) -> tuple[int, int]:
    return sum(n for part, n in counts.items() if part.startswith("vision")), counts["language"]


def test_nothing_is_missing_from_these_tables() -> None:
    assert options("model") == sorted(EXPECTED)
    assert set(PROJECTORS) <= set(options("projector")), "others may join, with a test of their own size"
    assert len(options("strategy")) == 4


@pytest.mark.parametrize("model", EXPECTED)
def test_every_combination_builds_and_every_parameter_is_claimed(model: str) -> None:
    strategies = {name: composed(f"model={model}", f"strategy={name}").strategy for name in options("strategy")}
    first = meta_model(composed(f"model={model}").model.module)
    assert all(p.is_meta for p in first.parameters())
    for projector in options("projector"):
        cfg = composed(f"model={model}", f"projector={projector}")
        with torch.device("meta"):  # tower and language model are the same for all, and slow to build
            net = MobileVLM(first.vision, instantiate(cfg.projector), first.language)
        counts = count_parts(net)
        assert parts_of(counts) == EXPECTED[model]
        patches = net.vision.grid**2
        if projector in PROJECTORS:
            assert net.image_tokens == (patches if projector == "pw2" else patches // 4)
        for name, stage in product(strategies, ("pretrain", "finetune")):
            freeze_and_group(net, OmegaConf.to_container(strategies[name][stage].rates, resolve=True))
            learning = count_parts(net, learning=True)
            assert learning["projector"] == counts["projector"]
            assert "vision.lower" not in learning and "vision.unused" not in learning
            assert ("vision.upper" in learning) == (name == "sharegpt4v" and stage == "pretrain")
            frozen = stage == "pretrain" and name in ("freeze_llm", "lora")
            assert learning.get("language", 0) == (0 if frozen else counts["language"])


@pytest.mark.parametrize("projector", PROJECTORS)
def test_projectors_have_table_7s_sizes(projector: str) -> None:
    net = instantiate(composed("model=1.7b", f"projector={projector}").projector)(1024, 2048)
    counted = sum(p.numel() for p in net.parameters()), net(torch.zeros(1, 576, 1024)).shape[1]
    assert counted == PROJECTORS[projector]


def test_adapters_beside_every_linear_layer_of_a_llama() -> None:
    made = planned("strategy=lora", *SHALLOW)
    # 3 layers, rank 128; four square matrices and three of the MLP, each with in + out columns of that rank
    adapters = 3 * 128 * (4 * 2 * 2048 + 3 * (2048 + 5632))
    assert made.stages["finetune"].learning["language"] == adapters
    assert made.stages["finetune"].parameters - sum(made.parameters.values()) == adapters


# -- FLOPs, a second way


def by_hand(text: int, learns: bool) -> dict[str, int]:
    """The shallow 1.7b with ldpv2, two FLOPs a multiply-add of every matrix product."""
    n, dv, d, m, mlp, vocabulary = 576, 1024, 2048, 144, 5632, 32000
    t = m + text
    tower = 2 * n * 3 * 14**2 * dv + 5 * (2 * (n + 1) * 12 * dv**2 + 4 * (n + 1) ** 2 * dv)  # the last block isn't run
    pw1, pw2, peg = 2 * n * dv * d, 2 * m * d * d, 2 * m * 9 * d
    linear, attention = 3 * 2 * t * (4 * d**2 + 3 * d * mlp) + 2 * text * d * vocabulary, 3 * 4 * t**2 * d
    # A product's backward is one product for its input and one for its weight. Frozen weights need none, nor does the
    # first layer's input, which comes from a frozen tower. Both factors of attention's products are activations.
    backward = pw1 + 2 * (pw2 + peg) + (2 if learns else 1) * linear + 2 * attention
    return {"vision": tower, "projector": pw1 + pw2 + peg, "language": linear + attention, "backward": backward}


@pytest.mark.parametrize("strategy", ["unfreeze_llm", "freeze_llm"])
def test_flops_by_hand(strategy: str) -> None:
    for name, stage in planned(f"strategy={strategy}", *SHALLOW).stages.items():
        assert vars(stage.work) == by_hand(100, learns=strategy == "unfreeze_llm" or name == "finetune")


def test_upper_half_of_the_tower_costs_its_backward() -> None:
    frozen, half = (planned(f"strategy={s}", *SHALLOW).stages["pretrain"].work for s in ("unfreeze_llm", "sharegpt4v"))
    n, d, dv = 576, 2048, 1024
    blocks = 2 * 2 * (2 * (n + 1) * 12 * dv**2 + 4 * (n + 1) ** 2 * dv)  # 3 and 4 of 0 to 5, the last being idle
    first_input = 2 * n * dv * d  # the projector's first layer now has to tell the tower what to change
    assert half.backward - frozen.backward == blocks + first_input
    assert half.vision == frozen.vision


def test_a_real_step_does_what_was_planned() -> None:
    cfg = composed("model=nano", "projector=avgpool", "text=50")  # no convolution, whose backward torch miscounts
    promised = plan(cfg, cfg.devices, cfg.text).stages["finetune"].work
    net = instantiate(cfg.model.module)
    freeze_and_group(net, OmegaConf.to_container(cfg.strategy.finetune.rates, resolve=True))
    ids = torch.cat([torch.full((1, net.image_tokens), IMAGE_TOKEN), torch.randint(259, (1, 50))], dim=1)
    labels = torch.where(ids == IMAGE_TOKEN, IGNORE_INDEX, ids)
    with FlopCounterMode(display=False) as counter:
        net(Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), torch.randn(1, 3, 112, 112))).total.backward()
    # A fused attention kernel may compute its scores again in the backward, once in each of the two layers of width 64.
    again = 2 * 2 * ids.shape[1] ** 2 * 64
    # Of the last layer the plan counts all; in the picture's places its three products of 64 x 160 are not computed.
    spared = 3 * 2 * 3 * net.image_tokens * 64 * 160
    assert counter.get_total_flops() + spared - promised.total in (0, again)


# -- memory


def test_states_by_hand() -> None:
    # 100 parameters, 60 of which learn, on 4 devices: bytes of weights, gradients, optimizer
    assert states(100, 60, 4, zero=0) == (200, 120, 720)
    assert states(100, 60, 4, zero=1) == (200, 120, 180)
    assert states(100, 60, 4, zero=2) == (200, 30, 180)
    assert states(100, 60, 4, zero=3) == (50, 30, 180)
    assert all(states(100, 60, 1, zero) == (200, 120, 720) for zero in range(4))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_activations_are_what_torch_keeps(trained: bool, autocast: bool) -> None:
    """Measured on two real stacks of layers, of which the difference is a layer: in bfloat16, and in float32 under autocast."""
    from transformers import LlamaConfig, LlamaModel

    positions, measured, told = 61, [], []
    for layers in (2, 4):
        config = LlamaConfig(
            vocab_size=10, hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation="sdpa",
        )  # fmt: skip
        half = torch.float32 if autocast else torch.bfloat16
        net = LlamaModel(config).to(half).requires_grad_(trained)
        weights, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

        def pack(tensor: torch.Tensor, weights: set = weights, kept: dict = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        given = torch.randn(1, positions, 128, dtype=half, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False),
        ):
            net(inputs_embeds=given, use_cache=False)
        measured.append(sum(size for size, _ in kept.values()))
        made = activations(config, positions, 0, trained)
        copies = 2 * sum(p.numel() for p in net.layers.parameters() if p.dim() == 2)
        told.append(made.kept + (made.cast + copies if autocast else 0))
    # What is left out: of each of two norms and four heads a number in float32 a position.
    assert (measured[1] - measured[0]) - (told[1] - told[0]) == 2 * positions * 4 * (2 + 4)


# -- samples, steps, hours


def test_the_papers_steps() -> None:
    steps = {name: stage.steps for name, stage in planned().stages.items()}
    assert steps == {"pretrain": math.ceil(1_246_000 / 256), "finetune": math.ceil(2_429_000 / 128)}
    assert {name: round(n, -3) for name, n in steps.items()} == {"pretrain": 5000, "finetune": 19000}  # Table 3


def test_the_papers_hours_are_a_tenth_of_the_peak() -> None:
    # 5 h and 9 h on 8 A100 of 312 TFLOP/s (section 4.1), at the assumed 350 positions a sample
    took = {"pretrain": 5, "finetune": 9}
    shares = {name: hours(stage.flops, 8, 312, 1) / took[name] for name, stage in planned().stages.items()}
    assert shares == pytest.approx({"pretrain": 0.086, "finetune": 0.094}, abs=0.001)


def test_both_stages_of_the_papers_run_have_one_mfu() -> None:
    """5 and 9 hours on 8 A100, with ZeRO-2 and ZeRO-3 (Table 3, section 4.1): the mfu that gives each, communication included."""
    eight = Cluster("a100", *GPUS["a100"], *LINKS["a100"], mfu=0.35, node=8, fill=0.9, reached=0.78, overlap=0.5)
    made, solved = planned(), {}
    for (name, (_, took)), engine in zip(PAPER.items(), ("zero2", "zero3"), strict=True):
        stage = made.stages[name]
        low, high = 0.01, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            one = row(made, stage, replace(eight, mfu=middle), 8, engine, stage.batch // 8, 2048, True)
            low, high = (middle, high) if one.hours > took else (low, middle)
        solved[name] = low
    assert solved == pytest.approx({"pretrain": 0.086, "finetune": 0.094}, abs=0.001)
    # The first stage's mfu foretells the second's 9 hours within a tenth: both assume 350 positions a sample.
    stage = made.stages["finetune"]
    foretold = row(made, stage, replace(eight, mfu=solved["pretrain"]), 8, "zero3", 16, 2048, True).hours
    assert foretold == pytest.approx(9, rel=0.1)


def test_hours() -> None:
    assert hours(36 * 10**17, devices=2, peak=1000, mfu=0.5) == 1  # 3600 s at 10^15 FLOP/s


def test_own_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{}, {}, {}]")
    own = str(tmp_path / "a.json")
    assert count_samples([own, "x"], {"samples": {"x": 4}}) == 7
    with pytest.raises(ValueError, match="no count for y; it has x"):
        count_samples(["y"], {"samples": {"x": 4}})
    with pytest.raises(ValueError, match="no count for y; it has x"):
        count_samples(["y"], {"samples": {"x": 4}, "sources": {"y": {"file": "y.json"}}})
    made = planned("model=nano", "data=custom", f"data.finetune=[{own}]")
    assert list(made.stages) == ["finetune"] and made.stages["finetune"].samples == 3
    with pytest.raises(ValueError, match="both stages are empty"):
        planned("model=nano", "data=custom")


def test_it_prints_the_papers_own_numbers_for_the_papers_own_cell(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed("model=nano", "gpu=h100")
    main(cfg)
    shown = capsys.readouterr().out
    assert "227,392" in shown and "16 tokens" in shown and "8 x h100" in shown and "its steps" not in shown
    cfg.cell = PAPER_CELL
    main(cfg)
    shown = capsys.readouterr().out
    assert "its steps" in shown and "5,000" in shown and "19,000" in shown
    with pytest.raises(ValueError, match=r"gpu=v100: known are a100, h100, h200"):
        main(composed("gpu=v100"))


def test_every_stage_of_every_strategy_is_planned() -> None:
    for strategy, data in product(options("strategy"), ("v1", "v2")):
        made = planned("model=nano", f"strategy={strategy}", f"data={data}")
        assert list(made.stages) == ["pretrain", "finetune"]
        assert all(stage.work.backward > 0 and stage.steps > 0 for stage in made.stages.values())


def test_work_leaves_no_weight_behind() -> None:
    net = meta_model(composed("model=nano").model.module)
    work(net, 5)
    assert all(p.is_meta for p in net.parameters())
