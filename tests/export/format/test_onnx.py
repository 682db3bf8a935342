"""The ONNX file computes what PyTorch computes, for every projector and both kinds of tower; another one gets no name."""

from __future__ import annotations

import copy
import json
import re
import shutil
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mvlm import build
from mvlm.export import handover
from mvlm.export.format import onnx as ours
from mvlm.run import file_hash

from ..conftest import REFERENCE, fitted, names, small

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).parents[3]
PROJECTORS = sorted(path.stem for path in (ROOT / "conf" / "projector").glob("*.yaml"))
SIZES = {"patch_size": 14, "image_size": 112}
"""Eight patches a side: quick."""
CLIP = {"name": "vit_large_patch14_clip_quickgelu_336", "class_token": True, "mlp_ratio": 4, **SIZES}


def seeing(projector: str = "ldpv2", **tower) -> ours.Seeing:
    made = OmegaConf.load(ROOT / "conf" / "projector" / f"{projector}.yaml")
    made = OmegaConf.merge({"model": {"grid": 8}}, {"projector": made})
    model = small(instantiate(made.projector), **(SIZES | tower))
    return ours.Seeing(model.vision, model.projector).eval()


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 112, 112, generator=torch.Generator().manual_seed(0))


def test_a_run_becomes_a_file(configure, run_of):
    run = run_of()
    out = handover.export(configure(f"run={run.folder}", "format=onnx", page="export"))
    assert out == run.folder / "onnx" and names(out) == {"vision.onnx", "manifest.json", "README.md"}
    about, file = json.loads((out / "manifest.json").read_text()), out / "vision.onnx"
    assert about["files"]["vision.onnx"]["sha256"] == file_hash(file)
    assert about["proven"] and len(about["parity"]["batch"]) == 3 and about["pictures"]["mean"] == [0.485, 0.456, 0.406]
    assert about["prompt"]["before the picture"] == "<|im_start|>user\n" and about["tokens"] == [144, 64]
    # By the user's own hands, with a number of pictures that was never tried.
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    seen = np.random.default_rng(0).standard_normal((5, 3, 96, 96), np.float32)
    (tokens,) = session.run(None, {"pixels": seen})
    needed = ours.check(handover.Source.open(run.folder), None)
    model = build.trained(run)
    with torch.inference_mode():
        expected = model.project(model.encode(torch.from_numpy(seen))).numpy()
    np.testing.assert_allclose(tokens, expected, atol=1e-5 * np.abs(expected).max())  # see `ROUNDING`
    assert 0.7 * needed < file.stat().st_size < needed + handover.SMALL
    card = (out / "README.md").read_text()
    assert '"pixels": pixels' in card and "(I, 144, 64)" in card and "trtexec" in card
    assert "mode `letterbox`" in card and "(122, 116, 104)" in card and "[0.485, 0.456, 0.406]" in card
    assert "<|im_start|>user\n<image>\n{question}<|im_end|>" in card and "144 image tokens" in card


QUICK = ("resampler",)
"""Tested always: its attention is what an export may take for one of a fixed batch. ldpv2 is tested above."""


@pytest.mark.parametrize(
    "projector", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in PROJECTORS]
)
def test_every_projector(tmp_path, projector):
    model = seeing(projector)
    ours.convert(tmp_path / "vision.onnx", model, 112)
    parity = ours.compare(tmp_path / "vision.onnx", model, pixels())
    assert parity["faults"] == [] and max(parity["bound"]) < 2e-5, parity


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[ours.Seeing, Path]:
    """A CLIP tower with its class token and quick-GELU, and its file."""
    model, file = seeing(**CLIP), tmp_path_factory.mktemp("clip") / "vision.onnx"
    ours.convert(file, model, 112)
    return model, file


def test_a_clip_tower(clip):
    model, file = clip
    assert model.vision.tower.cls_token is not None
    parity = ours.compare(file, model, pixels())
    assert parity["faults"] == [], parity
    assert len(ours.parity_rows(parity)) == 3


def test_the_file_takes_any_number_and_tells_nothing_of_this_machine(clip):
    _, file = clip
    shape = onnx.load(file).graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in shape] == ["pictures", 3, 112, 112]
    for path in (ROOT, Path(torch.__file__).parent, file.parent):
        assert str(path).encode() not in file.read_bytes()


def scaled(model: onnx.ModelProto, name: str, by: float) -> None:
    (value,) = (v for v in model.graph.initializer if v.name.endswith(name))
    value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value) * np.float32(by), value.name))


def fixed(model: onnx.ModelProto) -> None:
    """What an export gives that took the example's number of pictures for the only one."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def cut(model: onnx.ModelProto) -> None:
    del model.graph.node[5]


@pytest.mark.parametrize(
    "spoil, told",
    [
        (partial(scaled, name="blocks.1.mlp.fc2.bias", by=1.001), r"picture 1, alone, are .* from PyTorch's"),
        (partial(scaled, name="peg.weight", by=float("nan")), r"picture 3, batch, are nan"),
        (fixed, r"Got: 3 Expected: 1"),
        (cut, r"."),
    ],
)
def test_what_is_wrong_does_not_pass(clip, tmp_path, spoil, told):
    model, file = clip
    spoilt = onnx.load(file)
    spoil(spoilt)
    onnx.save(spoilt, tmp_path / "vision.onnx")
    faults = ours.compare(tmp_path / "vision.onnx", model, pixels())["faults"]
    assert any(re.search(told, fault) for fault in faults), faults


def test_a_failed_check_leaves_no_name(configure, run_of, monkeypatch):
    true = ours.convert

    def other(file, model, size):
        changed = copy.deepcopy(model)
        changed.projector.pw1.weight.data[0, 0] += 0.01
        true(file, changed, size)

    run = run_of()
    monkeypatch.setattr(ours, "convert", other)
    with pytest.raises(ValueError, match=r"vision.onnx does not compute what PyTorch does"):
        handover.export(configure(f"run={run.folder}", "format=onnx", page="export"))
    assert names(run.folder) == {"config.yaml", "finetune", "onnx.failed"}
    assert names(run.folder / "onnx.failed") == {"vision.onnx", "parity.json"}


def test_without_the_runtime_nothing_is_called_proven(configure, run_of, monkeypatch):
    true, run = ours.version, run_of()

    def missing(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(ours, "version", missing)
    with pytest.raises(ValueError, match=r"format=onnx needs onnxruntime: .* or write the file unproven"):
        handover.export(configure(f"run={run.folder}", "format=onnx", page="export"))
    monkeypatch.setattr(ours, "ONE_FILE", 0)  # a model too large for one file, too
    out = handover.export(configure(f"run={run.folder}", "format=onnx", "gate=false", page="export"))
    files = {"vision.unproven.onnx", "vision.unproven.onnx.data"}
    assert names(out) == {*files, "manifest.json", "README.md"}
    about, card = json.loads((out / "manifest.json").read_text()), (out / "README.md").read_text()
    assert not about["proven"] and about["parity"] is None and set(about["files"]) == files
    assert "this file was never run" in card and "the weights are in `vision.unproven.onnx.data`" in card
    # but it is right, with its weights beside it
    source = handover.Source.open(run.folder)
    model = ours.Seeing(source.chat.model.vision, source.chat.model.projector).eval()
    monkeypatch.undo()
    seen = torch.stack([fitted()(picture) for picture in ours.pictures(96)])
    assert ours.compare(out / "vision.unproven.onnx", model, seen)["faults"] == []


@pytest.mark.slow  # as a CLIP tower above, with its own ways
def test_a_released_checkpoint(configure, tmp_path, monkeypatch):
    shutil.copytree(REFERENCE / "checkpoints" / "ldpnetv2", tmp_path / "theirs")
    monkeypatch.chdir(REFERENCE)  # where `mm_vision_tower` leads
    out = handover.export(configure(f"run={tmp_path / 'theirs'}", "format=onnx", page="export"))
    assert out == tmp_path / "theirs" / "onnx"
    about, card = json.loads((out / "manifest.json").read_text()), (out / "README.md").read_text()
    assert about["pictures"]["mode"] == "pad" and about["prompt"]["first id"] == 1
    assert "Filled up to a square with the mean colour" in card and "before all comes id 1" in card


@pytest.mark.parametrize("word", ["quant=q4_k", "scores=true", "gpu_layers=99"])
def test_keys_of_another_format_are_refused(configure, tmp_path, word):
    with pytest.raises(ValueError, match="says nothing to format=onnx: leave it out"):
        handover.export(configure(f"run={tmp_path}", "format=onnx", word, page="export"))
