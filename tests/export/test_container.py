"""GGUF files hold what was put into them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvlm.export.container import Opened, vector, weights, write

TABLE = {
    "general.architecture": "llama",
    "a.word": "naïve 🚋",
    "a.yes": True,
    "a.count": np.uint32(3),
    "a.rate": np.float32(0.25),
    "a.layers": [np.int32(2)],
    "a.words": ["one", ""],
}


def test_what_is_written_is_read(tmp_path):
    matrix, bias = torch.randn(4, 32), torch.randn(4)
    kernel = torch.randn(4, 1, 3, 3)
    write(tmp_path / "x.gguf", TABLE, [weights("m", matrix), vector("b", bias), weights("k", kernel)])
    file = Opened(tmp_path / "x.gguf")
    assert {key: file.get(key) for key in TABLE} == TABLE | {"a.layers": [2]}
    assert file.get("b.nothing") is None and "z" not in file and file.names() == ["m", "b", "k"]
    assert [(file.kind(name), file.shape(name)) for name in "mbk"] == [
        ("F16", (4, 32)),
        ("F32", (4,)),
        ("F16", (4, 1, 3, 3)),
    ]
    assert torch.equal(file.value("m"), matrix.half().float())
    assert torch.equal(file.value("b"), bias)
    assert torch.equal(file.value("k"), kernel.half().float())


def test_what_float16_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^m has a value of 7e\+04, float16 ends at 65504"):
        write(tmp_path / "x.gguf", TABLE, [weights("m", torch.tensor([[7e4, 1.0]]))])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK not a gguf file at all"])
def test_a_torn_file_is_told(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.gguf is no whole GGUF file"):
        Opened(tmp_path / "x.gguf")


def test_a_file_cut_off_is_told(tmp_path):
    write(tmp_path / "x.gguf", TABLE, [weights("m", torch.randn(64, 64))])
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"x.gguf is no whole GGUF file"):
        Opened(tmp_path / "x.gguf")
