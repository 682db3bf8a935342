"""One stage of training as a LightningModule: the loss, the optimizer and its schedule. The model is given, not made, here."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mvlm.batch import Batch
from mvlm.model.cpu import quicken
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


SPIKE, RISE = 4.0, 2.0
"""A step's loss is a spike if it is above so many times the median of the last steps, and so many nats above it, too."""

LOOKED_BACK = 32
"""Steps of that median."""

IN_A_ROW = 5
"""Steps that may be skipped one after the other; then the run stops all the same."""


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
        seed: what a micro-batch draws by lot (dropout) depends on this, its step and its place alone, so that a run that goes on after
            a kill draws the same.
        on_divergence: what becomes of a step whose loss or gradient is no number, or whose loss is a spike: `stop` before it changes any
            weight, or `skip` it and count it. Either leaves a file to replay it.
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
        seed: int = 0,
        on_divergence: Literal["stop", "skip"] = "stop",
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
        self.seed, self.on_divergence = seed, on_divergence
        self.skipped: list[dict[str, Any]] = []
        """Steps that diverged and were skipped: step, loss, reason."""
        self.seconds = 0.0
        """Of training before the checkpoint that this went on from."""
        self._before: dict[str, int] | None = None
        self._sum, self._mean, self._ids = 0.0, 0.0, []

    strict_loading = False  # a checkpoint holds what learns, and `on_load_checkpoint` looks whether all of it is there

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen, add what this module counts."""
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint["stage"] = {
            "history": self.history,
            "skipped": self.skipped,
            "before": self._before,
            "cut": self._cut,
            "accumulation": self.trainer.accumulate_grad_batches,
            "seconds": self.seconds + time.monotonic() - self._began,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting; micro-batches are counted anew where the number of devices has changed.

        Raises:
            ValueError: other parameters learn here.
        """
        learns = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        if missing := learns - set(checkpoint["state_dict"]):
            raise ValueError(
                f"the checkpoint lacks {len(missing)} of {len(learns)} tensors that learn, e.g. {min(missing)}: it is of another "
                "strategy; remove it to begin the stage anew"
            )
        kept = checkpoint["stage"]
        self.history, self.skipped = kept["history"], kept["skipped"]
        self._before = kept["before"] if kept["cut"] == self._cut else self._fingerprints()
        self.seconds = kept["seconds"]
        now, then = self.trainer.accumulate_grad_batches, kept["accumulation"]
        for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
            if isinstance(counts, dict):  # the batch that was about to begin is `ready`, not yet `completed`
                ahead = counts["ready"] - counts["completed"]
                done = counts["completed"] // then * now
                counts |= dict.fromkeys(("completed", "started", "processed"), done) | {"ready": done + ahead}

    def on_train_start(self) -> None:
        self._began = time.monotonic()
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = (
            self.global_step
        )  # a resumed run's loggers count from there

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
        groups = [{**group} for group in self.groups]  # DeepSpeed puts other parameters into its own
        optimizer = torch.optim.AdamW(groups, **self.adam, fused=self._fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine_with_warmup(step, self.steps, self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """By the norm over all devices' pieces; a step that diverged is found here, before it changes a weight. Lightning refuses a fused
        AdamW here, as its own unscaling would come too late; without scaling it need not. DeepSpeed, which comes here after each
        micro-batch, clips by itself."""
        if self._deepspeed:
            return
        norm = 0.0
        if not self._fused:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            learning = [p for g in self.groups for p in g["params"]]
            gradients = [p.grad for p in learning if p.grad is not None]
            norm = float(total := torch.nn.utils.get_total_norm(gradients))
            # Torch's own function multiplies every gradient, by one too.
            if gradient_clip_val and norm > gradient_clip_val:
                torch.nn.utils.clip_grads_with_norm_(learning, gradient_clip_val, total)
        if self._given_up(norm):
            optimizer.zero_grad(set_to_none=True)  # AdamW leaves alone what has no gradient, its moments, too
        self._ids = []

    def _given_up(self, norm: float = 0.0) -> bool:
        """Sum up a step's loss over all devices; whether it, or the gradient's norm, says that the step must not be taken."""
        self._mean, self._sum = self._over_devices(self._sum), 0.0
        if reason := self._diverged(self._mean, norm):
            self._give_up(reason)
        return bool(reason)

    def _diverged(self, loss: float, norm: float) -> str:
        """Why a step must not be taken; empty if it may."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"its loss is {loss:g} and the norm of its gradient {norm:g}"
        past = [entry["loss"] for entry in self.history[-LOOKED_BACK:]]
        if len(past) == LOOKED_BACK and loss > max(SPIKE * (middle := statistics.median(past)), middle + RISE):
            return f"its loss is {loss:.3g}, where the {LOOKED_BACK} steps before have {middle:.3g} in the middle"
        return ""

    def _give_up(self, reason: str) -> None:
        """Leave a file by which the step can be looked at; then stop, or count it.

        Raises:
            ValueError: with `stop`, or if one step after the other diverges.
        """
        step, ids = self.global_step + 1, self._ids
        if self.trainer.world_size > 1:
            everyone: list[list[str]] = [[]] * self.trainer.world_size
            dist.all_gather_object(everyone, ids)
            ids = [one for some in everyone for one in some]
        file = Path(self.trainer.default_root_dir) / self.name / f"diverged-{step}.json"
        told = {
            "stage": self.name,
            "step": step,
            "reason": reason,
            "loss": self._mean,
            "ids": ids,
            "losses": self.history[-LOOKED_BACK:],
        }
        if self.trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(told, indent=2) + "\n")
        self.skipped.append({"step": step, "loss": self._mean, "reason": reason})
        in_a_row = [one["step"] for one in self.skipped[-IN_A_ROW:]] == [*range(step - IN_A_ROW + 1, step + 1)]
        if self.on_divergence == "stop" or in_a_row or self._deepspeed:
            raise ValueError(
                f"{self.name}, step {step} diverged: {reason}. No weight was changed by it. Its samples: {', '.join(ids[:8])}"
                f"{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}. `python doctor.py replay={file}` shows the loss of each. Repair "
                "the data, take lower rates, or leave such steps out with on_divergence=skip"
                + " (not under DeepSpeed, which takes every step)" * self._deepspeed
                + f" (they were: {IN_A_ROW} in a row are too many)" * in_a_row
            )

    def on_fit_start(self) -> None:
        if self.device.type == "cpu" and self.trainer.world_size == 1:
            quicken(self.model)
        self._before = self._before or self._fingerprints()

    @property
    def _cut(self) -> list:
        """How the weights lie: nothing where each device has all of them."""
        in_pieces = self._deepspeed or isinstance(self.model, FSDPModule)
        return [type(self.trainer.strategy).__name__, self.trainer.world_size] if in_pieces else []

    def _fingerprints(self) -> dict[str, int]:
        """Of all devices' pieces; of the whole where there are none."""
        here = fingerprints(self.model)
        if not self._cut:
            return here
        return dict(zip(here, self._over_devices(list(here.values())), strict=True))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The micro-batch's share of the step's loss, weighed by tokens.

        The step's loss is the mean over all labelled tokens of its micro-batches on all devices, whatever their split. Lightning
        divides by the number of micro-batches and the devices' gradients are averaged, so both are multiplied in again.
        """
        torch.manual_seed(hash((self.seed, self.global_step, index, self.global_rank)) % 2**63)
        self._ids += batch.ids
        loss = self.model(batch)
        tokens, share = batch.step_tokens or loss.tokens, self.trainer.accumulate_grad_batches
        tokens, share = self._over_devices(tokens), share * self.trainer.world_size
        if tokens == 0 and not self._over_devices(len(batch.step_skipped)):
            raise ValueError(f"no token of this step is labelled, there is nothing to learn: samples {batch.ids}")
        tokens = max(tokens, 1)  # of a step whose samples all could not be read
        self._sum += float(loss.total.detach()) / tokens
        if self._deepspeed:
            # It divides by the number of micro-batches once more, and takes the step with the last one's backward.
            share *= self.trainer.accumulate_grad_batches
            if (index + 1) % self.trainer.accumulate_grad_batches == 0:
                self._given_up()
        return loss.total * (share / tokens)

    def on_train_batch_end(self, outputs, batch: Batch, index: int) -> None:
        if (index + 1) % self.trainer.accumulate_grad_batches:
            return
        if self._deepspeed:
            self._ids, norm = [], float(self.trainer.model.get_global_grad_norm() or 0.0)
            if not 0 <= norm < math.inf:  # it says -1 for what is none
                raise ValueError(
                    f"{self.name}, step {self.global_step}: the norm of its gradient is no number, and DeepSpeed has taken it. The same command "
                    "goes on from the checkpoint before. Take lower rates, or trainer=fsdp, which looks at a step's gradient before it is taken"
                )
        step, mean = self.global_step, self._mean
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
        if self._cut:
            self.weights = whole(self.model)
