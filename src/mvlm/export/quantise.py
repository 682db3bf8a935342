"""Fewer bits for the language model's matrices, as llama.cpp's own `llama-quantize` chooses and computes them.

The blocks are made by the function of llama.cpp that makes them there (`ggml_quantize_chunk`). Which matrix gets which
type is llama.cpp's table for LLaMA, written out in `kind`. Runs on the far side of `engine.py`, without torch.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

FILE_TYPES = {"q8_0": (Q.Q8_0, 7), "q4_0": (Q.Q4_0, 2), "q4_k": (Q.Q4_K, 15)}
"""Our word -> the common type of a matrix, and llama.cpp's number for such a file (`general.file_type`). q4_k is its Q4_K_M."""

NARROWER = {Q.Q4_K: Q.Q5_0, Q.Q6_K: Q.Q8_0}
"""What takes the place of a type whose blocks of 256 do not fit a matrix' rows."""


def kind(name: str, width: int, quant: str, layers: int, tied: bool) -> Q:
    """The type of a matrix.

    Args:
        name: llama.cpp's.
        width: of a row.
        quant: a word of FILE_TYPES.
        layers: of the model.
        tied: whether the embedding is also the head.
    """
    common, _ = FILE_TYPES[quant]
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        chosen = Q.Q8_0 if common == Q.Q8_0 or width % 256 else Q.Q6_K
    elif quant == "q4_k" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        chosen = Q.Q6_K if _more_bits(int(name.split(".")[1]), layers) else common
    else:
        chosen = common
    while width % gguf.GGML_QUANT_SIZES[chosen][0]:
        if chosen not in NARROWER:
            return Q.F16
        chosen = NARROWER[chosen]
    return chosen


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def quantise(source: Path, target: Path, quant: str, lib: ctypes.CDLL, threads: int = 1) -> dict[str, int]:
    """Write `target` from the float16 file `source`. Returns how many matrices got which type."""
    reader = gguf.GGUFReader(source)
    field = {name: value for name, value in reader.fields.items() if not name.startswith("GGUF.")}
    layers = int(field["llama.block_count"].contents())
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    writer = gguf.GGUFWriter(target, field["general.architecture"].contents())
    for name, value in field.items():
        if name not in ("general.architecture", "general.file_type"):
            array = value.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, value.contents(), value.types[0], value.types[-1] if array else None)
    writer.add_file_type(FILE_TYPES[quant][1])
    planned = []
    for tensor in reader.tensors:
        width = int(tensor.shape[0])
        into = tensor.tensor_type if len(tensor.shape) == 1 else kind(tensor.name, width, quant, layers, tied)
        block, size = gguf.GGML_QUANT_SIZES[into]
        shape = [int(side) for side in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float16), tensor.n_elements // block * size, into)
        planned.append((tensor, into))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, into in planned:
        same = into == tensor.tensor_type
        writer.write_tensor_data(
            tensor.data if same else _blocks(np.asarray(tensor.data, np.float32), into, lib, threads)
        )
    writer.close()
    return dict(Counter(into.name for tensor, into in planned if len(tensor.shape) > 1))


def _blocks(rows: np.ndarray, into: Q, lib: ctypes.CDLL, threads: int = 1) -> np.ndarray:
    """(rows, width) float32 -> bytes, by llama.cpp, each thread some of the rows."""
    count, width = rows.shape
    block, size = gguf.GGML_QUANT_SIZES[into]
    out = np.empty((count, width // block * size), np.uint8)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    long = ctypes.c_int64
    rows = np.ascontiguousarray(rows)

    def some(edge: tuple[int, int]) -> int:
        begin, end = edge
        return lib.ggml_quantize_chunk(  # ctypes lets the other threads run meanwhile
            ctypes.c_int(into), rows.ctypes, out.ctypes, long(begin * width), long(end - begin), long(width),
            ctypes.c_void_p(None),
        )  # fmt: skip

    edges = [count * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(some, pairwise(edges)))
    assert made == out.nbytes, f"llama.cpp wrote {made} bytes where {out.nbytes} were expected"
    return out
