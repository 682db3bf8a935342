"""A model in pieces, one a device, and whole again: FSDP2 (torch's `fully_shard`) and DeepSpeed's ZeRO."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

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


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every weight in one piece on the first process' CPU, one after the other; the other processes get nothing, but must call this, too.

    Under DeepSpeed what learns is read from the optimizer's float32 copy; what is frozen has been rounded to the training's precision.
    """
    first, kept, seen = dist.get_rank() == 0, {}, {}
    for name, value in model.state_dict(keep_vars=True).items():
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
