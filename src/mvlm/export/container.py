"""A GGUF file: metadata from one table, tensors one after the other, and both read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

HALF_MAX = 65504.0
"""The largest number of float16."""

TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    str: gguf.GGUFValueType.STRING,
    np.uint32: gguf.GGUFValueType.UINT32,
    np.int32: gguf.GGUFValueType.INT32,
    np.float32: gguf.GGUFValueType.FLOAT32,
}
"""A value's type in the file by its type in Python; a list has its first element's."""


class Stored(NamedTuple):
    """A tensor of a file."""

    name: str
    value: Tensor
    """In numpy's order of axes, the last one contiguous; GGUF counts them from the other end."""
    dtype: torch.dtype
    """float16 or float32."""

    def array(self) -> np.ndarray:
        """The values as they are written.

        Raises:
            ValueError: a value that float16 has no room for.
        """
        value = self.value.detach().cpu().float()
        if self.dtype == torch.float16 and (most := float(value.abs().max())) > HALF_MAX:
            raise ValueError(
                f"{self.name} has a value of {most:.3g}, float16 ends at {HALF_MAX:.0f}: the training ran off"
            )
        return value.to(self.dtype).contiguous().numpy()


def weights(name: str, value: Tensor) -> Stored:
    """A matrix or kernel: float16."""
    return Stored(name, value, torch.float16)


def vector(name: str, value: Tensor) -> Stored:
    """A bias, a norm, a table of positions: float32."""
    return Stored(name, value, torch.float32)


def write(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Stored]) -> None:
    """A whole file.

    Args:
        metadata: key to value, typed as in TYPES; `general.architecture` among them.
        tensors: converted one at a time, so that a large model is not held twice.
    """
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":  # the writer's own
            continue
        if isinstance(value, list):
            kind = TYPES[type(value[0])]
            plain = value if kind == gguf.GGUFValueType.STRING else [one.item() for one in value]
            writer.add_key_value(key, plain, gguf.GGUFValueType.ARRAY, kind)
        else:
            plain = value.item() if isinstance(value, np.generic) else value
            writer.add_key_value(key, plain, TYPES[type(value)])
    for name, value, dtype in tensors:
        numpy_type = np.dtype(str(dtype).removeprefix("torch."))
        writer.add_tensor_info(name, value.shape, numpy_type, value.numel() * numpy_type.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.array())
    writer.close()


class Opened:
    """A file, read without running anything of it.

    Raises:
        ValueError: it is no whole GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise ValueError(f"{path} is no whole GGUF file ({error}): write or copy it again") from error

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata in plain types."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._tensors

    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._tensors)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """In numpy's order."""
        return tuple(int(side) for side in reversed(self._tensors[tensor].shape))

    def kind(self, tensor: str) -> str:
        """The type it is stored in: F16, F32, Q4_K, ..."""
        return self._tensors[tensor].tensor_type.name

    def value(self, tensor: str) -> Tensor:
        """A tensor as float32, dequantised where it must be."""
        stored = self._tensors[tensor]
        return torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type), np.float32))
