"""Features that are kept are those that would be computed again, and nothing that they depend on may change unseen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from mvlm.data.image import PictureError, Pictures
from mvlm.strategy.features import encode_pictures


@pytest.fixture
def model(configure):
    torch.manual_seed(0)
    return instantiate(configure("model=nano").model.module, _convert_="all").eval()


def test_kept_features_are_found_by_all_they_depend_on(model, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{n}.png") for n in range(3)]
    for n, path in enumerate(paths):
        Image.new("RGB", (90, 60), (80 * n, 40, 9)).save(path)
    kept = tmp_path / "kept"

    def encode(mode: str = "letterbox", autocast: torch.dtype | None = None, some: list[str] = paths):
        before = set(kept.glob("*"))
        found = encode_pictures(
            model, some, Pictures(112, mode, (0.5,) * 3, (0.5,) * 3), autocast=autocast, kept_in=kept
        )
        return found, bool(set(kept.glob("*")) - before)

    first, new = encode()
    assert new and list(first) == paths and first[paths[0]].shape == (64, 48)
    again, new = encode()
    assert not new and all(torch.equal(first[path], again[path]) for path in paths)
    assert encode("square")[1] and encode(autocast=torch.bfloat16)[1] and encode(some=paths[:2])[1]
    Image.new("RGB", (90, 60), (1, 2, 3)).save(paths[1])
    os.utime(paths[1], ns=(1, 1))
    changed, new = encode()
    assert (
        new and not torch.equal(changed[paths[1]], first[paths[1]]) and torch.equal(changed[paths[0]], first[paths[0]])
    )
    with torch.no_grad():
        model.vision.tower.blocks[0].attn.qkv.weight.mul_(1.5)
    moved, new = encode()
    assert new and not torch.equal(moved[paths[0]], first[paths[0]])
    assert not list(kept.glob("*.[0-9]*")), "nothing half written is left"


def test_a_picture_that_cannot_be_read_is_told_every_time(model, tmp_path: Path) -> None:
    """Also where the others' features are found again; the batch it is in keeps its other pictures."""
    paths = [str(tmp_path / f"{n}.png") for n in range(4)]
    for n, path in enumerate(paths):
        Image.new("RGB", (90, 60), (60 * n, 40, 9)).save(path)
    look = Pictures(112, "letterbox", (0.5,) * 3, (0.5,) * 3)
    whole = encode_pictures(model, paths, look)
    Path(paths[1]).write_bytes(b"torn")
    Path(paths[3]).unlink()
    with pytest.raises(PictureError, match=r"1\.png: this is not a picture"):
        encode_pictures(model, paths, look)
    told: list[tuple[str, str]] = []
    for _ in range(2):
        told.clear()
        found = encode_pictures(
            model,
            paths,
            look,
            kept_in=tmp_path / "kept",
            unreadable=lambda path, error: told.append((path, error.kind)),
        )
        assert told == [(paths[1], "not a picture"), (paths[3], "missing picture")]
        assert list(found) == [paths[0], paths[2]] and all(torch.allclose(found[p], whole[p], atol=1e-5) for p in found)
    assert len(list((tmp_path / "kept").iterdir())) == 1
