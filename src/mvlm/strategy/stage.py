"""One stage of training as a LightningModule: the loss, the optimizer and its schedule. The model is given, not made, here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mvlm.batch import Batch
from mvlm.model.mobilevlm import MobileVLM
from mvlm.strategy.parameters import Rates, fingerprints, freeze_and_group, verify_moved
from mvlm.strategy.sharding import shard, whole


def cosine_with_warmup(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at an optimizer step: linear from zero over `warmup` steps, then a half cosine to zero.

    The first step has rate zero, as in the reference's scheduler (Table 3: cosine, warm-up ratio 0.03, rounded up).
    """
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Stage(L.LightningModule):
    """Trains a model for a number of optimizer steps.

    Args:
        model: what learns.
        rates: learning rate a part, `null` freezes (`mvlm.strategy.parameters`).
        steps: optimizer steps in all, said by the data module. (Reading Lightning's own estimate would drop the loader's
            state on a resume.)
        warmup: share of the steps.
        name: prefix of what is logged.
        held_out: a batch that is never trained on. Its loss with the true pictures and with its neighbours' is logged every
            `look_every` steps: the gap between the two is how much the model sees.
    """

    def __init__(
        self,
        model: MobileVLM,
        rates: Rates,
        *,
        steps: int,
        warmup: float = 0.03,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        name: str = "train",
        held_out: Batch | None = None,
        look_every: int = 40,
    ) -> None:
        super().__init__()
        self.model = model
        self.steps, self.warmup = steps, math.ceil(warmup * steps)
        self.adam = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self.name, self.held_out, self.look_every = name, held_out, look_every
        self.rates, self.groups = rates, freeze_and_group(model, rates)
        self.moved: dict[str, bool] = {}
        self.history: list[dict[str, float]] = []
        self.weights: dict[str, Tensor] | None = None
        """After a training in pieces: all of them, on the first process (`mvlm.strategy.sharding.whole`)."""
        self._sum = 0.0

    def configure_model(self) -> None:
        """Called when the processes know one another. Here FSDP2 cuts the model; DDP and DeepSpeed do so by themselves."""
        if self.device_mesh is None:
            return
        half = torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else None
        shard(self.model, self.device_mesh["data_parallel"], half)
        self.groups = freeze_and_group(self.model, self.rates)

    @property
    def _deepspeed(self) -> bool:
        return isinstance(self.trainer.strategy, DeepSpeedStrategy)

    def configure_optimizers(self) -> dict:
        """AdamW on the parts that learn, each at its own rate."""
        self._fused = not str(self.trainer.precision).startswith("16")  # float16's loss scaling does not go with it
        optimizer = torch.optim.AdamW(self.groups, **self.adam, fused=self._fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_with_warmup(step, self.steps, self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """By the norm over all devices' pieces. Lightning refuses a fused AdamW here, as its own unscaling would come too late; without
        scaling it need not. DeepSpeed clips by itself."""
        if self._deepspeed:
            return
        if not self._fused:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_([p for g in self.groups for p in g["params"]], gradient_clip_val)

    def on_fit_start(self) -> None:
        self._before = self._fingerprints()

    def _fingerprints(self) -> dict[str, int]:
        """Of all devices' pieces."""
        here = fingerprints(self.model)
        return dict(zip(here, self._over_devices(list(here.values())), strict=True))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The micro-batch's share of the step's loss, weighed by tokens.

        The step's loss is the mean over all labelled tokens of its micro-batches on all devices, whatever their split. Lightning
        divides by the number of micro-batches and the devices' gradients are averaged, so both are multiplied in again.
        """
        loss = self.model(batch)
        tokens, share = batch.step_tokens or loss.tokens, self.trainer.accumulate_grad_batches
        tokens, share = self._over_devices(tokens), share * self.trainer.world_size
        if tokens == 0 and not self._over_devices(len(batch.step_skipped)):
            raise ValueError(f"no token of this step is labelled, there is nothing to learn: samples {batch.ids}")
        tokens = max(tokens, 1)  # of a step whose samples all could not be read
        self._sum += float(loss.total.detach()) / tokens
        if self._deepspeed:  # it divides by the number of micro-batches once more
            share *= self.trainer.accumulate_grad_batches
        return loss.total * (share / tokens)

    def on_train_batch_end(self, outputs, batch: Batch, index: int) -> None:
        if (index + 1) % self.trainer.accumulate_grad_batches:
            return
        step, mean, self._sum = self.global_step, self._over_devices(self._sum), 0.0
        entry = {"step": step, "loss": mean}
        self.log(f"{self.name}/loss", mean, prog_bar=True, rank_zero_only=True)
        if self.held_out is not None and (step % self.look_every == 0 or step == self.steps):
            entry |= self.look()
            self.log_dict({f"{self.name}/{k}": v for k, v in entry.items() if "sight" in k}, rank_zero_only=True)
            self.log("sight", entry["sight_gap"], prog_bar=True, logger=False, rank_zero_only=True)
        self.history.append(entry)

    def _over_devices(self, number: Any) -> Any:
        """A number, or each of a list, summed over all devices."""
        if self.trainer.world_size == 1:
            return number
        everyone = torch.tensor(number, device=self.device)
        dist.all_reduce(everyone)
        return everyone.tolist()

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Loss a token on the held-out batch with the true pictures, with each other's, and the difference: zero is blind."""
        batch = self.trainer.precision_plugin.convert_input(self.held_out.to(self.device))
        source = "features" if batch.features is not None else "pixels"
        swapped = replace(batch, **{source: getattr(batch, source).roll(1, 0)})
        with self.trainer.precision_plugin.forward_context():
            true, other = (float(loss.total) / loss.tokens for loss in (self.model(batch), self.model(swapped)))
        if isinstance(self.model, FSDPModule):  # without a backward, the outer weights would stay in one piece
            self.model.reshard()
        return {"sight_true": true, "sight_shuffled": other, "sight_gap": other - true}

    def on_train_end(self) -> None:
        self.moved = verify_moved(self._before, self._fingerprints(), {g["name"] for g in self.groups})
        if self._deepspeed or isinstance(self.model, FSDPModule):
            self.weights = whole(self.model)
