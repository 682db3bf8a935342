"""Tower and projector: what is refused, by name, and image embeddings in llama.cpp itself, with controls that must fail."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mvlm.export import vision
from mvlm.export.container import Stored, vector
from mvlm.export.gate import EMBEDDING, RESIZED
from mvlm.projector.avgpool import AvgPool
from mvlm.projector.ldpv1 import LDPv1
from mvlm.projector.ldpv2 import LDPv2
from mvlm.projector.learnable_pe import LearnablePE
from mvlm.projector.pw2 import PW2

from .conftest import changed, fitted, small

PROJECTORS = {
    "pw2": (PW2, "mlp"),
    "ldpv1": (LDPv1, "ldp"),
    "avgpool": (AvgPool, "ldpv2"),
    "learnable_pe": (LearnablePE, "ldpv2"),
    "ldpv2": (LDPv2, "ldpv2"),
    "avgpool, pool=1": (partial(AvgPool, pool=1), "mlp"),
    "learnable_pe, pool=1": (partial(LearnablePE, pool=1), "mlp"),
}


# ------------------------------------------------------------------------------------------------------- in llama.cpp


@pytest.mark.parametrize("name", PROJECTORS)
def test_llama_cpp_computes_every_projector(engine, bench, tmp_path, name):
    made, kind = PROJECTORS[name]
    model = small(made)
    assert vision.projector_type(model.projector) == kind
    parity = bench.with_model(model).gate().check_embeddings(*bench.with_model(model).write(tmp_path))
    assert parity.passed, parity.faults
    assert parity.embedding[0] < EMBEDDING / 2 and max(parity.embedding) < RESIZED / 2, "drawn around what was measured"


def test_llama_cpp_computes_quick_gelu_and_a_norm_before_the_blocks(engine, bench, tmp_path):
    """The parts of CLIP that DINOv2 has not; patches without a bias, positions on the grid only."""
    model = small(name="vit_base_patch16_clip_quickgelu_224")
    assert vision.activation(model.vision.tower.blocks[0].mlp.act) == "quick_gelu"
    assert model.vision.tower.patch_embed.proj.bias is None and not isinstance(model.vision.tower.norm_pre, nn.Identity)
    parity = bench.with_model(model).gate().check_embeddings(*bench.with_model(model).write(tmp_path))
    assert parity.passed, parity.faults


def with_class_token(tensors: list[Stored]) -> list[Stored]:
    """A token and a row of positions that the tower does not have."""
    row = torch.zeros(1, 48)
    more = [t._replace(value=torch.cat([row, t.value])) if t.name == "v.position_embd.weight" else t for t in tensors]
    return [*more, vector("v.class_embd", torch.ones(48))]


def without_layer_scale(tensors: list[Stored]) -> list[Stored]:
    """As a converter that does not know it would write."""
    blocks = small().vision.tower.blocks
    plain = {"attn_out": lambda b: b.attn.proj, "ffn_down": lambda b: b.mlp.fc2}
    found = []
    for tensor in tensors:
        part, _, leaf = tensor.name.rpartition(".")
        number, name = part.split(".")[-2:]
        found.append(
            tensor._replace(value=getattr(plain[name](blocks[int(number)]), leaf)) if name in plain else tensor
        )
    return found


CONTROLS = {
    "class token stored": {"vision_tensors": with_class_token},
    "one block short": {
        "vision_table": lambda t: {key: value for key, value in t.items() if key != "clip.vision.feature_layer"}
    },
    "unfolded layer scale": {"vision_tensors": without_layer_scale},
    "another GELU": {"vision_table": lambda t: t | {"clip.use_gelu": False}},
    "transposed PEG": {"vision_tensors": changed("peg.0.weight", lambda w: w.mT)},
    "transposed positions": {
        "vision_tensors": changed(
            "position_embd.weight", lambda w: w.unflatten(0, (24, 24)).transpose(0, 1).flatten(0, 1)
        )
    },
    "another mean": {"vision_table": lambda t: t | {"clip.vision.image_mean": t["clip.vision.image_std"]}},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_what_goes_wrong_silently_does_not_pass(engine, bench, tmp_path, name):
    """Each of these files loads and runs in llama.cpp without a word."""
    parity = bench.gate().check_embeddings(*bench.write(tmp_path, **CONTROLS[name]))
    assert not parity.passed
    assert min(parity.embedding) > 1.5 * EMBEDDING, "a control that fails by a hair shows a loose bound"


def test_a_table_of_positions_is_not_dropped_or_turned(engine, bench, tmp_path):
    """LearnablePE rests on llama.cpp not looking at the shape of a bias: both that it is added, and in which order."""
    learned = bench.with_model(small(LearnablePE))
    for spoil in (lambda b: b.mean((0, 1)), lambda b: b.transpose(0, 1)):
        files = learned.write(tmp_path, vision_tensors=changed("peg.0.bias", spoil))
        assert not learned.gate().check_embeddings(*files).passed


# ------------------------------------------------------------------------------------------------- what is refused


class Mine(LDPv2):
    """A projector derived from a known one, as someone might write it."""


@pytest.mark.parametrize(
    "projector, told",
    [
        (
            partial(LDPv2, pool=1),
            r"no LDPv2 with pool=1: its ldpv2 pools 2x2, and its mlp has no PEG. .* projector.pool=2$",
        ),
        (partial(LDPv2, pool=3), r"no LDPv2 with pool=3"),
        (partial(AvgPool, pool=4), r"no AvgPool with pool=4: its ldpv2 pools 2x2. .* projector.pool=2 or 1$"),
        (
            Mine,
            r"no projector that computes what Mine does; it has mlp, ldp and ldpv2. .* projector=pw2, ldpv1, avgpool",
        ),
    ],
)
def test_projectors_that_llama_cpp_has_not(projector, told):
    with pytest.raises(ValueError, match=told):
        vision.check(small(projector), fitted())


@pytest.mark.parametrize("projector", [LDPv1, LDPv2, AvgPool])
def test_another_grid(projector):
    with pytest.raises(
        ValueError, match=r"24x24 grid .* this tower makes 8x8 \(32 px\).*projector=pw2, which takes any"
    ):
        vision.check(small(projector, image_size=32), fitted(32))


def test_pw2_takes_any_grid(engine, bench, tmp_path):
    other = replace(bench, model=small(PW2, image_size=32), look=fitted(32))
    assert other.gate().check_embeddings(*other.write(tmp_path)).passed


@pytest.mark.parametrize(
    "tower, told",
    [
        ({"mlp_ratio": 1}, r"as wide as the tower \(48\), and llama.cpp then takes fc1 for fc2.*mlp_ratio"),
        ({"qk_norm": True}, r"has blocks.#.attn.k_norm.bias, .*, for which llama.cpp's ViT has no place"),
        ({"name": "vit_small_patch14_reg4_dinov2", "class_token": True}, r"has reg_token, for which"),
        ({"act_layer": "relu"}, r"activation ReLU is none that llama.cpp's ViT has: gelu, quick_gelu, silu"),
        ({"name": "vit_medium_patch16_rope_reg1_gap_256"}, r"the plain ViT, not a Eva"),
    ],
)
def test_towers_that_llama_cpp_has_not(tower, told):
    with pytest.raises(ValueError, match=told):
        vision.check(small(**tower), fitted())


def test_pictures_of_another_size():
    with pytest.raises(ValueError, match=r"fitted into 112 px and the tower takes 96"):
        vision.check(small(), fitted(112))


def without(name: str):
    return {"vision_tensors": lambda tensors: [tensor for tensor in tensors if name not in tensor.name]}


def kernel_as_float32(tensors: list[Stored]) -> list[Stored]:
    return [vector(t.name, t.value) if "peg.0.weight" in t.name else t for t in tensors]


FATAL = {
    "no positions": (without("v.position_embd"), "v.position_embd.weight is missing"),
    "no second layer": (without("mlp.2"), "mm.model.mlp.2.weight is missing"),
    "a float32 kernel": (
        {"vision_tensors": kernel_as_float32},
        "mm.model.peg.0.weight is F32, and a depth-wise kernel must be F16",
    ),
    "another width": (
        {"vision_tensors": changed("mlp.2.weight", lambda w: w[:32])},
        r"mm.model.mlp.2.weight is \(32, 64\), not \(64, 64\)",
    ),
    "another grid": (
        {"vision_table": lambda t: t | {"clip.vision.image_size": t["clip.vision.patch_size"] * 8}},
        "its grid is 8x8, and ldpv2 needs 24x24",
    ),
    "an unknown projector": (
        {"vision_table": lambda t: t | {"clip.projector_type": "resampler"}},
        "has the projector 'resampler'",
    ),
    "no key": (
        {"vision_table": lambda t: {key: value for key, value in t.items() if key != "clip.vision.patch_size"}},
        "it lacks clip.vision.patch_size",
    ),
}


@pytest.mark.parametrize("name", FATAL)
def test_files_that_would_end_llama_cpp_are_not_opened(bench, tmp_path, name):
    spoilt, told = FATAL[name]
    language, mmproj = bench.write(tmp_path, **spoilt)
    with pytest.raises(ValueError, match=told):
        vision.check_file(mmproj, language)


@pytest.mark.parametrize("name", PROJECTORS)
def test_our_own_files_are_opened(bench, tmp_path, name):
    language, mmproj = bench.with_model(small(PROJECTORS[name][0])).write(tmp_path)
    vision.check_file(mmproj, language)


def test_files_of_two_exports_are_told(bench, tmp_path):
    """Of one shape, so that llama.cpp would run them."""
    for name in "ab":
        (tmp_path / name).mkdir()
        mark = {vision.WEIGHTS: name * 64}
        bench.write(tmp_path / name, vision_table=lambda t, m=mark: t | m, language_table=lambda t, m=mark: t | m)
    vision.check_file(tmp_path / "a" / "mmproj.gguf", tmp_path / "a" / "language.gguf")
    with pytest.raises(
        ValueError, match=r"mmproj.gguf and language.gguf were exported from different weights \(a{12} and b{12}\)"
    ):
        vision.check_file(tmp_path / "a" / "mmproj.gguf", tmp_path / "b" / "language.gguf")
