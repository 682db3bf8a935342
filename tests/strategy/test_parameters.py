"""The table of learning rates meets the model: every parameter is claimed once, frozen ones carry nothing, and what moved is checked."""

from __future__ import annotations

import pytest
import torch

from mvlm import build
from mvlm.strategy.parameters import by_part, claimed_rates, fingerprints, freeze_and_group, verify_moved

PARTS = {"vision.lower", "vision.upper", "vision.unused", "projector", "language"}


def test_a_part_takes_its_own_line_before_its_rooms() -> None:
    rates = claimed_rates(PARTS, {"vision": None, "vision.upper": 2e-5, "projector": 1e-3, "language": 2e-5})
    assert rates == {
        "vision.lower": None,
        "vision.upper": 2e-5,
        "vision.unused": None,
        "projector": 1e-3,
        "language": 2e-5,
    }


def test_an_unclaimed_part_is_an_error() -> None:
    with pytest.raises(ValueError, match="no learning rate claims the part 'language'"):
        claimed_rates(PARTS, {"vision": None, "projector": 1e-3})


def test_a_line_that_claims_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\['projektor'\], which claim nothing"):
        claimed_rates(PARTS, {"vision": None, "projector": 1e-3, "language": None, "projektor": 1.0})


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan"), float("inf"), "fast", True])
def test_a_rate_that_teaches_nothing_is_an_error(rate) -> None:
    with pytest.raises(ValueError, match=r"rate of 'projector' is .* a number above 0 is wanted, or null"):
        claimed_rates({"projector", "language"}, {"projector": rate, "language": None})


def test_all_frozen_is_an_error(configure) -> None:
    with pytest.raises(ValueError, match="nothing learns"):
        freeze_and_group(build.model(configure("model=nano")), {"vision": None, "projector": None, "language": None})


@pytest.mark.parametrize("strategy", ["freeze_llm", "unfreeze_llm", "sharegpt4v", "lora"])
@pytest.mark.parametrize("stage", build.STAGES)
def test_table_1(configure, strategy: str, stage: str) -> None:
    """Table 1's ticks and crosses, read off the parameters themselves."""
    learns = {
        "freeze_llm": ({"projector"}, {"projector", "language"}),
        "unfreeze_llm": ({"projector", "language"}, {"projector", "language"}),
        "sharegpt4v": ({"vision.upper", "projector", "language"}, {"projector", "language"}),
        "lora": ({"projector"}, {"projector", "language"}),
    }[strategy][build.STAGES.index(stage)]
    cfg = configure("model=nano", f"strategy={strategy}")
    model = build.model(cfg)
    groups = freeze_and_group(model, cfg.strategy[stage].rates)
    assert {g["name"] for g in groups} == learns
    grouped = {id(p) for g in groups for p in g["params"]}
    for part, parameters in by_part(model).items():
        assert all(p.requires_grad == (part in learns) == (id(p) in grouped) for p in parameters), part


def test_every_parameter_is_in_one_part(configure) -> None:
    model = build.model(configure("model=nano"))
    parts = by_part(model)
    assert set(parts) == PARTS
    assert sum(len(p) for p in parts.values()) == len(list(model.parameters()))


def test_the_tables_rates_are_the_papers(configure) -> None:
    """Table 3, and the reference's scripts for V1's rate and LoRA's."""
    cfg = configure("model=1.7b")
    assert (cfg.recipe.pretrain.batch, cfg.recipe.finetune.batch) == (256, 128)
    assert dict(cfg.strategy.pretrain.rates) == {"vision": None, "projector": 1e-3, "language": 2e-5}
    assert dict(cfg.strategy.finetune.rates) == {"vision": None, "projector": 4e-5, "language": 4e-5}
    assert (cfg.recipe.optimizer.weight_decay, cfg.recipe.warmup, cfg.recipe.clip) == (0, 0.03, None)
    for model, rate in (("1.7b", 2e-5), ("3b", 4e-5), ("7b", 2e-5)):
        assert configure(f"model={model}", "strategy=freeze_llm").strategy.finetune.rates.language == rate
    assert configure("model=3b", "recipe=paper", "strategy=freeze_llm").strategy.finetune.rates.language == 2e-5


def test_a_single_changed_bit_shows(configure) -> None:
    model = build.model(configure("model=nano"))
    before = fingerprints(model)
    weight = next(model.projector.parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    after = fingerprints(model)
    assert {part for part in before if before[part] != after[part]} == {"projector"}
    assert verify_moved(before, after, {"projector"})["projector"]
    with pytest.raises(RuntimeError, match="language did not change though it learns, projector changed though frozen"):
        verify_moved(before, after, {"language"})
