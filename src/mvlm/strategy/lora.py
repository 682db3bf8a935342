"""Low-rank adapters in the language model (peft), merged when the stage ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel


def attach(language: nn.Module, *, r: int, lora_alpha: int, lora_dropout: float) -> LoraModel:
    """Put adapters beside every linear layer of the language model but its head, in place (the reference's `finetune.lora`).

    The module keeps its class and attributes, so the joined model needs not know. `merge_and_unload()` on what is returned adds
    the adapters to the weights and takes them out again.
    """
    from peft import LoraConfig  # half a second, which a run without adapters need not wait for
    from peft.tuners.lora import LoraModel

    linear = {n.rsplit(".", 1)[-1] for n, m in language.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    adapters = LoraConfig(
        r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=sorted(linear), bias="none"
    )
    return LoraModel(language, {"default": adapters}, "default")
