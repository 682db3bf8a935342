"""A strategy is a table of learning rates, one line a part; `null` freezes. Here the table meets the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import inf

import torch
from torch import nn

from mvlm.strategy.sharding import piece

Rates = Mapping[str, float | None]


def claimed_rates(parts: set[str], rates: Rates) -> dict[str, float | None]:
    """The rate of each part: its own line if there is one, else the line of the part it belongs to (`vision.upper` -> `vision`).

    `vision.unused`, the tower's blocks that are never run, is frozen by nature and needs no line.

    Raises:
        ValueError: a part that no line claims, a line that claims nothing, or a rate that is none.
    """
    rate_of: dict[str, float | None] = {}
    used: set[str] = set()
    for part in sorted(parts):
        if part.endswith(".unused"):
            rate_of[part] = None
            continue
        line = next((name for name in (part, part.split(".")[0]) if name in rates), None)
        if line is None:
            raise ValueError(
                f"no learning rate claims the part {part!r}: the table has {sorted(rates)}; add a line "
                f"`{part.split('.')[0]}: <rate>`, or null to freeze it"
            )
        used.add(line)
        rate_of[part] = rate = rates[line]
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < inf):
            raise ValueError(
                f"the learning rate of {line!r} is {rate!r}: a number above 0 is wanted, or null to freeze it"
            )
    if idle := set(rates) - used:
        raise ValueError(
            f"the learning rates name {sorted(idle)}, which claim nothing: the model's parts are {sorted(parts)}"
        )
    return rate_of


def by_part(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the model, by the part that `model.part` puts it in."""
    parts: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parts[model.part(name)].append(parameter)
    return dict(parts)


def freeze_and_group(model: nn.Module, rates: Rates) -> list[dict]:
    """Turn gradients on where a rate is given, off elsewhere; the optimizer's groups, one a learning part.

    Frozen parameters are in no group, so they carry no optimizer state and no weight decay can touch them. With adapters in a
    part (parameters that peft named `lora_`), only those learn there.

    Returns:
        `{"name": part, "params": [...], "lr": rate}` for each part that learns.
    """
    parts = by_part(model)
    adapted = {model.part(name) for name, _ in model.named_parameters() if ".lora_" in name}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for part, rate in claimed_rates(set(parts), rates).items():
        learning = []
        for parameter in parts[part]:
            learns = rate is not None and (part not in adapted or ".lora_" in names[id(parameter)])
            parameter.requires_grad_(learns)
            if learns:
                learning.append(parameter)
        if learning:
            groups.append({"name": part, "params": learning, "lr": float(rate)})
    if not groups:
        raise ValueError(f"nothing learns: every rate of {dict(rates)} is null")
    return groups


def fingerprints(model: nn.Module) -> dict[str, int]:
    """A number a part that changes if any bit of its weights on this device does (a wrapping sum of their bit patterns)."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        part: int(sum(p.view(whole[p.element_size()]).sum(dtype=torch.int64) for p in map(piece, parameters)))
        for part, parameters in by_part(model).items()
    }


def verify_moved(before: Mapping[str, int], after: Mapping[str, int], learning: set[str]) -> dict[str, bool]:
    """What moved, by part. The strategy's word is checked against the weights themselves.

    Raises:
        RuntimeError: a frozen part changed, or a learning one did not.
    """
    moved = {part: before[part] != after[part] for part in before}
    wrong = [part for part, did in moved.items() if did != (part in learning)]
    if wrong:
        told = ", ".join(
            f"{p} {'changed though frozen' if moved[p] else 'did not change though it learns'}" for p in wrong
        )
        raise RuntimeError(f"the strategy was not carried out: {told}. The weights of this stage were not saved.")
    return moved
