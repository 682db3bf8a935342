"""A model in pieces, one a device, and whole again: FSDP2 (torch's `fully_shard`) and DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mvlm.model.mobilevlm import MobileVLM


def shard(model: MobileVLM, mesh: DeviceMesh, half: torch.dtype | None = None) -> None:
    """Leave each device of a mesh of one axis its piece of every parameter, in place.

    A decoder layer or a block of the tower is put together when it is run; what lies outside of them, for the whole step. Parameters
    become other objects, so an optimizer is made afterwards. All devices begin with the first one's weights, as with DDP.

    Args:
        half: type in which weights are put together and computed with; pieces, gradients and their sums stay as they are (float32).
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        sent = tensor.detach().to(mesh.device_type)
        dist.broadcast(sent, 0, group=mesh.get_group())
        tensor.data.copy_(sent)
    # Autocast casts what goes in.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
    for part in [*model.vision.tower.blocks, *model.language.model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)


def piece(parameter: Tensor) -> Tensor:
    """What of a parameter lies on this device: all of it, or its piece."""
    if isinstance(parameter, DTensor):
        return parameter.detach().to_local()
    return getattr(parameter, "ds_tensor", parameter).detach()


def whole(model: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """Every weight in one piece on the first process' CPU, one after the other; the other processes get nothing, but must call this, too.

    Under DeepSpeed what learns is read from the optimizer's float32 copy; what is frozen has been rounded to the training's precision.

    Args:
        frozen: with those that do not learn.
    """
    first, kept, seen = dist.get_rank() == 0, {}, {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not (frozen or value.requires_grad):
            continue
        if id(value) not in seen:
            together = _together(value.detach() if isinstance(value, DTensor) else value)
            seen[id(value)] = together.cpu() if first else None
        if first:
            kept[name] = seen[id(value)]
    return kept


def _together(value: Tensor) -> Tensor:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if not (hasattr(value, "ds_id") or hasattr(value, "_hp_mapping")):
        return value.detach()
    import deepspeed

    if value.requires_grad:
        return deepspeed.utils.safe_get_full_fp32_param(value)
    with deepspeed.zero.GatheredParameters([value]):  # of what is whole anyway, nothing
        return value.detach().float()


class InOnePiece(Strategy):
    """Checkpoints of a training in pieces, in the form that one device's have: gathered by the first process, cut up again by each. So
    another number of devices, and any other engine, can go on from them. The trainer's CheckpointIO writes and reads them."""

    lightning_restore_optimizer = True

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        return whole(self.lightning_module, frozen=False)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        for name, parameter in self.lightning_module.named_parameters():
            if parameter.requires_grad:
                self.fill(parameter, checkpoint["state_dict"][name])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's own `state_dict`, its moments whole; on the first process alone, but all must call this."""
        first, state = dist.get_rank() == 0, {}
        groups, learning = self._in_order(optimizer)
        for number, parameter in enumerate(learning):
            if moments := self.moments(optimizer, parameter):
                state[number] = {key: value.cpu() for key, value in moments.items()} if first else {}
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (optimizer,), (told,) = self.optimizers, checkpoint["optimizer_states"]
        _, learning = self._in_order(optimizer)
        for group, before in zip(optimizer.param_groups, told["param_groups"], strict=True):
            group.update({key: value for key, value in before.items() if key != "params"})
        self.fill_moments(optimizer, {learning[number]: moments for number, moments in told["state"].items()})

    def _in_order(self, optimizer: Optimizer) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
        """The optimizer's groups, their parameters replaced by numbers; and those parameters, which DeepSpeed's optimizer no longer names."""
        groups, learning = [], []
        for settings, group in zip(optimizer.param_groups, self.lightning_module.groups, strict=True):
            numbers = [*range(len(learning), len(learning) + len(group["params"]))]
            groups.append({key: value for key, value in settings.items() if key != "params"} | {"params": numbers})
            learning += group["params"]
        return groups, learning

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give each device its piece of a value."""
        raise NotImplementedError

    def moments(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What AdamW keeps of a parameter, whole; empty before its first step."""
        raise NotImplementedError

    def fill_moments(self, optimizer: Optimizer, told: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Give each device its piece of the moments."""
        raise NotImplementedError


class FSDP2(InOnePiece, ModelParallelStrategy):
    """Torch's `fully_shard`; the model cuts itself up (`shard`)."""

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(_cut(value, parameter))

    def moments(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {key: _together(value) for key, value in optimizer.state.get(parameter, {}).items()}

    def fill_moments(self, optimizer: Optimizer, told: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        for parameter, moments in told.items():
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key == "step" else _cut(value, parameter)
                for key, value in moments.items()
            }


def _cut(value: Tensor, like: DTensor) -> DTensor:
    """This device's piece of a value that every process has, so nothing is sent."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


class ZeRO(InOnePiece, DeepSpeedStrategy):
    """DeepSpeed's stages 2 and 3, whose optimizer steps flat float32 copies of what learns (of which each device has a piece)."""

    def fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        self._set(parameter, value)
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        self._link(optimizer)
        return super().optimizer_state(optimizer)

    def moments(self, optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = optimizer.optimizer.state.get(self._flat(optimizer)[0])
        if not flat:
            return {}
        gathered = {key: safe_get_full_optimizer_state(parameter, key) for key in flat if key != "step"}
        return {"step": flat["step"]} | gathered

    def fill_moments(self, optimizer: Any, told: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        if not told:
            return
        first = next(iter(told.values()))
        for flat in self._flat(optimizer):
            optimizer.optimizer.state[flat] = {
                key: value.to(flat.device, copy=True) if key == "step" else torch.zeros_like(flat)
                for key, value in first.items()
            }
        self._link(optimizer)
        for parameter, moments in told.items():
            for key, value in moments.items():
                if key != "step":
                    self._set(parameter, value, key)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """This device's piece of the float32 copy, or of a moment."""
        if not hasattr(parameter, "ds_id"):
            parameter.set_full_hp_param(value, key)
            return
        # Filled up at the end, which DeepSpeed's own function for a whole value leaves out.
        size = parameter.ds_tensor.numel()
        value = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        parameter._z3_optimizer.set_local_hp_param(value[size * dist.get_rank() :][:size], parameter, key)

    def _link(self, optimizer: Any) -> None:
        """Let stage 2's parameters know their moments. DeepSpeed does so once, after the first group's first step, when the others have none."""
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self, optimizer: Any) -> list[Tensor]:
        stage3 = getattr(optimizer, "fp32_partitioned_groups_flat", None)
        return stage3 if stage3 is not None else optimizer.single_partition_of_fp32_groups
