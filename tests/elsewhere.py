"""A device that is no processor, on a machine that has none: it computes like the processor, and refuses tensors that lie elsewhere.

    python tests/elsewhere.py train.py model=nano trainer.accelerator=elsewhere ...

What is forgotten on the processor fails here as it would on a GPU: one operation never takes tensors of both. (Of no dimension they may, as
there.) Kernels, types, streams and speed of a GPU are not tried. Torch calls this a Python backend for PrivateUse1; autocast
leaves all types as they are on it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"


class Backend(backend_registration._DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
PLACE = torch.device(NAME, 0)
MOVES = ("aten::_to_copy", "aten::copy_")


class Elsewhere(Tensor):
    """Says that it lies there; `values` are on the processor."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype, device=PLACE
        )  # fmt: skip

    def __init__(self, values: Tensor) -> None:
        self.values_here = values

    def __repr__(self, **how: Any) -> str:
        return f"{NAME}: {self.values_here}"

    def tolist(self) -> Any:
        return self.values_here.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


def computed(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the operation gives on the processor, there if its arguments are, or if `device` says so.

    Raises:
        RuntimeError: some of its tensors lie there, some here.
    """
    if operation._can_decompose():  # made of others; under inference_mode torch asks for it whole
        with Operations():
            return operation.decompose(*args, **kwargs)
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = [one for one in tensors if isinstance(one, Elsewhere)]
    here = [one for one in tensors if not isinstance(one, Elsewhere) and one.dim()]
    name = operation._schema.name
    if there and here and name not in MOVES:
        shapes = [[tuple(one.shape) for one in some] for some in (there, here)]
        raise RuntimeError(f"{operation}: {shapes[0]} lie on the device, {shapes[1]} on the processor")
    if name == "aten::copy_":
        away = isinstance(args[0], Elsewhere)
    else:
        away = bool(there) if kwargs.get("device") is None else kwargs["device"].type == PLACE.type
    result = operation(*tree_map(_to_here, args), **tree_map(_to_here, kwargs))
    if not away:
        return result
    result = tree_map(lambda one: Elsewhere(one) if isinstance(one, Tensor) else one, result)
    return return_and_correct_aliasing(operation, args, kwargs, result)


def _to_here(one: Any) -> Any:
    if isinstance(one, Elsewhere):
        return one.values_here
    return torch.device("cpu") if isinstance(one, torch.device) and one.type == PLACE.type else one


class Operations(TorchDispatchMode):
    """Operations that are given no tensor but a device, and those that move a tensor there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


class Literals(TorchFunctionMode):
    """`torch.tensor(..., device=...)` copies without an operation that could be seen, so it is made here and then moved."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and "device" in kwargs and torch.device(kwargs["device"]).type == PLACE.type:
            place = kwargs.pop("device")
            return function(*args, **kwargs).to(place)
        return function(*args, **kwargs)


class OneDevice(Accelerator):
    """Lightning's `trainer.accelerator=elsewhere`."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: torch.device) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [PLACE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


if __name__ == "__main__":
    from mvlm import build

    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    AcceleratorRegistry.register(NAME, OneDevice, description=__doc__)
    torch.__future__.set_swap_module_params_on_conversion(
        True
    )  # a parameter that is moved stays the same object, as with a GPU
    # Lightning puts models of accelerators that it does not know on the processor.
    _AcceleratorConnector._choose_strategy = lambda connector: SingleDeviceStrategy(PLACE)
    build.device = lambda wanted="auto": PLACE if wanted == "auto" else torch.device(wanted)
    script, sys.argv = sys.argv[1], sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    with Operations(), Literals():
        runpy.run_path(script, run_name="__main__")
