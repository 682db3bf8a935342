"""Checkpoints in and out: the released layout to the bit, every kind of source, and refusals that change nothing."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mvlm.model import checkpoint
from mvlm.model.checkpoint import (
    from_released,
    load_checkpoint,
    load_language,
    load_projector,
    load_vision,
    read_config,
    read_tensors,
    save_checkpoint,
)
from mvlm.model.mobilevlm import MobileVLM
from mvlm.model.names import CLIP, PROJECTOR, TOWER, clip_names, model_names, projector_type
from mvlm.model.vision import Vision
from mvlm.projector.avgpool import AvgPool
from mvlm.projector.c_abstractor import CAbstractor
from mvlm.projector.ldpv1 import LDPv1
from mvlm.projector.ldpv2 import LDPv2
from mvlm.projector.learnable_pe import LearnablePE
from mvlm.projector.pw2 import PW2

REFERENCE = Path(__file__).parents[1] / "reference"
CHECKPOINTS = REFERENCE / "checkpoints"
TOWER_FOLDER = REFERENCE / "vision_tower"
TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def blank(like: nn.Module) -> nn.Module:
    """A copy with other weights."""
    copied = copy.deepcopy(like)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(0.25)
    return copied


def refused(module: nn.Module, load, match: str) -> None:
    """`load` raises, and no weight of the module is touched."""
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=match):
        load()
    assert same(before, module.state_dict())


def small(projector, *, tied: bool = False, tower: str = "vit_small_patch14_dinov2", **arguments) -> MobileVLM:
    """A model of a few thousand weights; 4x4 patches."""
    torch.manual_seed(1)
    vision = Vision(tower, 56, embed_dim=16, depth=2, num_heads=2, **arguments)
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=5000.0, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    return MobileVLM(vision, projector, LlamaForCausalLM(config)).eval()


# ------------------------------------------------------------------------------------------------------- round trip


def test_what_is_loaded_is_saved_to_the_byte(released, tmp_path):
    files = [released.folder / name for name in TOKENIZER]
    save_checkpoint(released.model, tmp_path, extras={"mm_vision_tower": "vision_tower"}, files=files)
    original, saved = released.folder / "model.safetensors", tmp_path / "model.safetensors"
    assert same(load_file(original), load_file(saved))
    assert original.read_bytes() == saved.read_bytes()
    assert all((tmp_path / name).read_bytes() == (released.folder / name).read_bytes() for name in TOKENIZER)
    assert not (tmp_path / ".part").exists()

    theirs, ours = read_config(released.folder), read_config(tmp_path)
    assert {key for key in theirs if theirs[key] != ours[key]} == {"transformers_version"}
    assert ours["mm_vision_tower_inside"] and ours["mm_vision_arguments"]["num_heads"] == 4
    # and what we saved is enough to build the model again, without the tower's folder
    assert same(released.model.state_dict(), from_released(tmp_path).state_dict())


def test_shards_of_torch_files_are_the_same_checkpoint(ldpnetv2):
    folder = CHECKPOINTS / "ldpnetv2_bin"
    assert same(read_tensors(folder), read_tensors(ldpnetv2.folder))
    model = blank(ldpnetv2.model)
    loaded = load_checkpoint(model, folder, vision=TOWER_FOLDER)
    assert same(model.state_dict(), ldpnetv2.model.state_dict())
    assert loaded.tensors == len(read_tensors(folder)) and not loaded.skipped


def test_large_models_are_cut_into_shards_and_old_weights_go(ldpnetv2, tmp_path):
    (tmp_path / "stage.json").write_text("kept")
    save_checkpoint(ldpnetv2.model, tmp_path)
    save_checkpoint(ldpnetv2.model, tmp_path, shard_size=100_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and "model.safetensors" not in shards
    assert same(read_tensors(tmp_path), read_tensors(ldpnetv2.folder))
    save_checkpoint(ldpnetv2.model, tmp_path, shard_size=200_000)  # fewer: none of the first cut may stay
    assert same(read_tensors(tmp_path), read_tensors(ldpnetv2.folder))
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert names == {path.name for path in tmp_path.glob("*.safetensors")} and len(names) < len(shards)
    save_checkpoint(ldpnetv2.model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "stage.json"]


def test_a_save_that_fails_leaves_the_old_one(ldpnetv2, tmp_path, monkeypatch):
    save_checkpoint(ldpnetv2.model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(blank(ldpnetv2.model), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_file(released, tmp_path):
    """The reference weights are such that half precision holds them exactly."""
    save_checkpoint(released.model, tmp_path, dtype=torch.float16)
    assert {value.dtype for value in read_tensors(tmp_path).values()} == {torch.float16}
    assert read_config(tmp_path)["torch_dtype"] == "float16"
    assert same(from_released(tmp_path).state_dict(), released.model.state_dict())


# ------------------------------------------------------------------------------------------------------- which tower


@pytest.fixture
def other_tower_inside(ldpnet, tmp_path) -> Path:
    """A first-generation checkpoint whose own tower is not the CLIP it names."""
    tensors = read_tensors(ldpnet.folder)
    for name in tensors:
        if name.startswith(TOWER):
            tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(ldpnet.folder / "config.json", tmp_path)
    return tmp_path


def test_second_generation_keeps_its_own_tower(ldpnetv2):
    inside = {n: v for n, v in read_tensors(ldpnetv2.folder).items() if n.startswith(TOWER)}
    outside = {TOWER + n: v for n, v in read_tensors(TOWER_FOLDER).items()}
    assert inside.keys() == outside.keys() and not same(inside, outside)
    tower = ldpnetv2.model.vision.tower.state_dict()
    weight = f"{TOWER}{CLIP}embeddings.patch_embedding.weight"
    assert torch.equal(tower["patch_embed.proj.weight"], inside[weight])


def test_first_generation_reads_clip_anew(ldpnet, other_tower_inside):
    model = blank(ldpnet.model)
    loaded = load_checkpoint(model, other_tower_inside, vision=TOWER_FOLDER)
    assert same(model.state_dict(), ldpnet.model.state_dict())
    assert loaded.tower == str(TOWER_FOLDER) and len(loaded.skipped) == len(read_tensors(TOWER_FOLDER))


def test_the_folder_that_the_config_names_is_found_beside_it(ldpnet, other_tower_inside):
    shutil.copytree(TOWER_FOLDER, other_tower_inside / "vision_tower")
    assert load_checkpoint(blank(ldpnet.model), other_tower_inside).tower == str(other_tower_inside / "vision_tower")


def test_its_own_is_used_with_a_warning_where_clip_is_not_to_be_had(ldpnet, other_tower_inside):
    model = blank(ldpnet.model)
    with pytest.warns(UserWarning, match="reads the tower 'vision_tower' anew"):
        load_checkpoint(model, other_tower_inside)
    gap = model.vision.tower.cls_token - ldpnet.model.vision.tower.cls_token
    assert torch.allclose(gap, torch.ones_like(gap))


def test_what_we_saved_keeps_its_tower_whatever_the_projector(ldpnet, tmp_path):
    model = copy.deepcopy(ldpnet.model)
    with torch.no_grad():
        model.vision.tower.cls_token.add_(1)
    save_checkpoint(model, tmp_path, extras={"mm_vision_tower": str(TOWER_FOLDER)})
    again = blank(model)
    load_checkpoint(again, tmp_path)
    assert same(again.state_dict(), model.state_dict())


# ------------------------------------------------------------------------------------------------------- projectors


def test_projector_alone(ldpnet):
    folder = CHECKPOINTS / "ldpnet_projector_only"
    stored = read_tensors(folder)
    model = blank(ldpnet.model)
    loaded = load_checkpoint(model, folder)
    places = {p.ours: p for p in model_names(model)}
    for name, value in model.state_dict().items():
        if name.startswith("projector."):
            assert torch.equal(value, stored[places[name].theirs[0]])
        else:
            assert (value == 0.25).all(), name
    assert loaded.tensors == len(stored) == 24
    for source in (folder, folder / "mm_projector.bin"):
        projector = LDPv1(32, 64)
        load_projector(projector, source)
        assert same(projector.state_dict(), model.projector.state_dict())
    whole = load_projector(blank(ldpnet.model.projector), ldpnet.folder)
    assert whole.tensors == 24 and len(whole.skipped) == len(read_tensors(ldpnet.folder)) - 24


KINDS = {
    "mlp2x_gelu": PW2,
    "ldpnet": LDPv1,
    "ldpnetv2": LDPv2,
    "mvlm_avgpool": AvgPool,
    "mvlm_learnable_pe": partial(LearnablePE, grid=4),
    "mvlm_ldpnetv2_pool1": partial(LDPv2, pool=1),
    "mvlm_avgpool_pool4": partial(AvgPool, pool=4),
    "mvlm_learnable_pe_pool1": partial(LearnablePE, grid=4, pool=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_projector_comes_back(kind, tmp_path):
    """As its own class, with its own pooling, from nothing but the folder."""
    model = small(KINDS[kind])
    save_checkpoint(model, tmp_path)
    assert read_config(tmp_path)["mm_projector_type"] == projector_type(model.projector) == kind
    again = from_released(tmp_path)
    assert type(again.projector) is type(model.projector) and again.image_tokens == model.image_tokens
    assert same(model.state_dict(), again.state_dict())
    features = torch.randn(1, 16, 16)
    assert torch.equal(model.project(features), again.project(features))


def test_types_of_ours_are_none_that_the_reference_would_build():
    assert not any(kind.startswith(("linear", "mlp", "ldpnet")) for kind in KINDS if kind.startswith("mvlm_"))
    assert sum(kind.startswith("mvlm_") for kind in KINDS) == 5


@pytest.mark.parametrize(("there", "here"), [(PW2, AvgPool), (LDPv2, partial(LDPv2, pool=1)), (AvgPool, LDPv2)])
def test_another_projector_is_refused(there, here, tmp_path):
    """Also one with the same names and shapes, which would load and compute something else."""
    save_checkpoint(small(there), tmp_path)
    model = small(here)
    mine, theirs = projector_type(model.projector), read_config(tmp_path)["mm_projector_type"]
    refused(model, lambda: load_checkpoint(model, tmp_path), f"{theirs!r} and the model has {mine!r}.*choose the same")
    refused(model, lambda: load_projector(model.projector, tmp_path), f"{theirs!r} and the model has {mine!r}")


class Mine(PW2):
    """A user's projector: no row in any table."""

    def __init__(self, vision_dim: int, language_dim: int) -> None:
        super().__init__(vision_dim, language_dim)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.randn(vision_dim))

    def forward(self, features):
        return super().forward(features - self.mean) * self.scale


def test_a_projector_that_no_table_knows(tmp_path):
    model = small(Mine)
    save_checkpoint(model, tmp_path)
    stored = {name for name in read_tensors(tmp_path) if name.startswith(PROJECTOR)}
    assert stored == {PROJECTOR + name for name in model.projector.state_dict()}
    again = blank(model)
    load_checkpoint(again, tmp_path)
    assert same(again.state_dict(), model.state_dict())
    # a folder must not choose what code is run: only this package's projectors are imported by name
    with pytest.raises(ValueError, match="Mine' is none of mlp2x_gelu"):
        from_released(tmp_path)


def test_arguments_of_a_projector_that_no_table_knows(tmp_path):
    """They may show in no tensor: another number of tokens is pooled by the same weights."""
    model = small(partial(CAbstractor, grid=4, tokens=9, depth=1, hidden=8))
    save_checkpoint(model, tmp_path)
    told = {"grid": 4, "tokens": 9, "depth": 1, "hidden": 8}
    assert read_config(tmp_path)["mm_projector_arguments"] == told
    again, features = from_released(tmp_path), torch.randn(1, 16, 16)
    assert again.image_tokens == 9 and same(model.state_dict(), again.state_dict())
    assert torch.equal(model.project(features), again.project(features))
    other = small(partial(CAbstractor, grid=4, tokens=4, depth=1, hidden=8))
    refused(
        other, lambda: load_checkpoint(other, tmp_path), r"'tokens': 9.*the model has .*'tokens': 4.*choose the same"
    )


@pytest.mark.parametrize("kind", ["linear", "ldpnetv2_pool1", "os.path.join", "mvlm.projector.none.None"])
def test_a_type_that_nobody_has(kind, ldpnetv2, tmp_path):
    shutil.copytree(ldpnetv2.folder, tmp_path / "x")
    config = read_config(tmp_path / "x") | {"mm_projector_type": kind}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"mm_projector_type '{kind}'"):
        from_released(tmp_path / "x", vision=TOWER_FOLDER)


# ------------------------------------------------------------------------------------------------------- towers


def strip(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def tower_sources(folder: Path, ldpnet) -> dict[str, tuple[Path, int]]:
    """One tower in each of its shapes, and how many tensors each holds beside it."""
    clip = read_tensors(TOWER_FOLDER)
    timm = ldpnet.model.vision.tower.state_dict()
    made = {
        "transformers 5": strip(clip, CLIP),
        "transformers 4.30": clip | {f"{CLIP}embeddings.position_ids": torch.arange(577)[None]},
        "timm": timm | {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)},
    }
    for name, tensors in made.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {
        "CLIPVisionModel": (TOWER_FOLDER, 0),
        "CLIPModel": (REFERENCE / "clip_full", len(read_tensors(REFERENCE / "clip_full")) - len(clip)),
        "MobileVLM": (ldpnet.folder, len(read_tensors(ldpnet.folder)) - len(clip)),
        "transformers 5": (folder / "transformers 5.safetensors", 0),
        "transformers 4.30": (folder / "transformers 4.30.safetensors", 1),
        "timm": (folder / "timm.safetensors", 2),
    }


def test_a_tower_in_any_shape(ldpnet, tmp_path):
    sources = tower_sources(tmp_path, ldpnet)
    assert len(sources) == 6
    for name, (source, beside) in sources.items():
        vision = blank(ldpnet.model.vision)
        loaded = load_vision(vision, source)
        assert same(vision.state_dict(), ldpnet.model.vision.state_dict()), name
        assert len(loaded.skipped) == beside, name


def test_the_table_covers_the_real_clip():
    """timm's ViT-L/14-336 against transformers' own module, both without weights."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        theirs = {name: tuple(value.shape) for name, value in CLIPVisionModel(config).state_dict().items()}
        tower = Vision("vit_large_patch14_clip_quickgelu_336", 336).tower
    ours = {name: place.shape for place in clip_names(tower) for name in place.theirs}
    assert ours == strip(theirs, CLIP) and len(ours) == 391


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "eva02_tiny_patch14_224", "vit_base_patch14_dinov2"])
def test_weights_of_other_vits_fit_whatever_pools_behind_them(name, tmp_path):
    """timm's own file of a tower, small: what lies behind its blocks is left, and what is run is what timm runs."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 56}
    theirs = timm.create_model(name, num_classes=0, **sizes).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    vision = Vision(name, sizes.pop("img_size"), **sizes).eval()
    load_vision(vision, tmp_path)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    wanted = theirs.forward_intermediates(pixels, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(vision(pixels), wanted)


def test_a_tower_that_is_not_clip_keeps_timm_names(tmp_path):
    model = small(PW2, class_token=False)
    save_checkpoint(model, tmp_path)
    stored = {name for name in read_tensors(tmp_path) if name.startswith(TOWER)}
    assert stored == {TOWER + name for name in model.vision.tower.state_dict()}
    assert read_config(tmp_path)["vision_tower_type"] == "timm"
    vision = blank(model.vision)
    load_vision(vision, tmp_path)
    assert same(vision.state_dict(), model.vision.state_dict())
    assert same(from_released(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"act_layer": "gelu"}, "quick_gelu there, GELU here"),
        ({"num_heads": 2}, "4 heads there, 2 here"),
        ({"depth": 2}, "no place for .*encoder.layers.2"),
        ({"depth": 4}, "asks for more: .*encoder.layers.3"),
        ({"embed_dim": 64}, r"\(32,\) .*there and \(64,\)"),
        ({"image_size": 224}, r"\(577, 32\) .*there and \(257, 32\)"),
    ],
)
def test_another_tower_is_refused(change, told, ldpnet):
    vision = Vision(**(ldpnet.model.vision.arguments | change))
    refused(vision, lambda: load_vision(vision, TOWER_FOLDER), f"nothing was loaded.*({told})")


def test_a_folder_without_this_tower(ldpnet):
    vision = small(PW2).vision
    refused(
        vision, lambda: load_vision(vision, TOWER_FOLDER), "no such tower.*vision_model.* there.*cls_token.* expected"
    )
    clip = blank(ldpnet.model.vision)
    refused(clip, lambda: load_vision(clip, REFERENCE / "base_llm"), "no such tower")


def test_heads_are_not_guessed(ldpnetv2):
    with pytest.raises(ValueError, match=r"32 wide doesn't tell its heads.*vision=<folder"):
        from_released(ldpnetv2.folder)


# ------------------------------------------------------------------------------------------------------- language


def test_language_model_from_its_own_folder_and_from_ours(ldpnet):
    for source, beside in ((REFERENCE / "base_llm", 0), (ldpnet.folder, len(read_tensors(ldpnet.folder)) - 21)):
        language = blank(ldpnet.model.language)
        loaded = load_language(language, source)
        assert same(language.state_dict(), ldpnet.model.language.state_dict())
        assert loaded.tensors == 21 and len(loaded.skipped) == beside


def test_tied_embeddings(tmp_path):
    tied, free = small(PW2, tied=True), small(PW2)
    save_checkpoint(tied, tmp_path / "tied")
    save_checkpoint(free, tmp_path / "free")
    assert "lm_head.weight" not in read_tensors(tmp_path / "tied")

    again = blank(tied)
    load_checkpoint(again, tmp_path / "tied")
    assert same(again.state_dict(), tied.state_dict())
    assert again.language.lm_head.weight is again.language.model.embed_tokens.weight
    assert same(from_released(tmp_path / "tied").state_dict(), tied.state_dict())

    untied = blank(free.language)
    load_language(untied, tmp_path / "tied")  # one matrix fills both
    assert torch.equal(untied.lm_head.weight, tied.language.model.embed_tokens.weight)

    refused(again, lambda: load_checkpoint(again, tmp_path / "free"), "head of its own.*tie_word_embeddings=false")
    with torch.no_grad():
        free.language.lm_head.weight.copy_(free.language.model.embed_tokens.weight)
    save_checkpoint(free, tmp_path / "free")
    load_checkpoint(again, tmp_path / "free")  # two equal matrices are one
    assert same(again.language.state_dict(), free.language.state_dict())


def test_an_untied_file_without_its_head_is_torn(ldpnet, tmp_path):
    tensors = read_tensors(REFERENCE / "base_llm")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(REFERENCE / "base_llm" / "config.json", tmp_path)
    language = blank(ldpnet.model.language)
    refused(language, lambda: load_language(language, tmp_path), "asks for more: lm_head.weight")


def test_old_rotary_tables_are_skipped(ldpnet, tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(read_tensors(REFERENCE / "base_llm") | table, tmp_path / "model.safetensors")
    assert load_language(blank(ldpnet.model.language), tmp_path).skipped == list(table)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rope_theta": 100000.0}, "rope_parameters .*10000.0.* there, .*100000.0.* here"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06 there, 1e-05 here"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, "num_attention_heads 4 there, 2 here"),
        ({"vocab_size": 400}, r"model.embed_tokens.weight is \(384, 64\) .*there and \(400, 64\)"),
        ({"num_hidden_layers": 3}, "asks for more: model.layers.2"),
    ],
)
def test_another_language_model_is_refused(change, told):
    """The first three fit tensor by tensor, and would compute something else."""
    known = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 384,
    }
    language = LlamaForCausalLM(LlamaConfig(**(known | {"rms_norm_eps": 1e-6} | change)))
    refused(language, lambda: load_language(language, REFERENCE / "base_llm"), f"nothing was loaded: .*{told}")


def test_rotary_scaling_goes_out_and_in(tmp_path):
    model = small(PW2)
    config = model.language.config
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    model.language = LlamaForCausalLM(config).eval()
    save_checkpoint(model, tmp_path)
    written = read_config(tmp_path)
    assert (written["rope_theta"], written["rope_scaling"]) == (5000.0, {"type": "linear", "factor": 2.0})
    again = from_released(tmp_path)
    ids = torch.arange(12)[None]
    assert torch.equal(again.language(ids).logits, model.language(ids).logits)


# ------------------------------------------------------------------------------------------------------- refusals


def test_shapes_and_cure_are_told(ldpnetv2, tmp_path):
    save_checkpoint(small(LDPv2), tmp_path)
    model = copy.deepcopy(ldpnetv2.model)
    refused(model, lambda: load_checkpoint(model, tmp_path), "nothing was loaded")
    projector = LDPv2(32, 48)
    told = r"mlp.mlp.0.weight is \(64, 32\) torch.float32 there and \(48, 32\) torch.float32 here.*Choose the projector"
    refused(projector, lambda: load_projector(projector, ldpnetv2.folder), told)


def test_codes_are_no_weights(ldpnetv2, tmp_path):
    """An 8-bit quantised file has the right names and shapes."""
    tensors = read_tensors(ldpnetv2.folder)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(ldpnetv2.folder / "config.json", tmp_path)
    model = copy.deepcopy(ldpnetv2.model)
    refused(model, lambda: load_checkpoint(model, tmp_path), "lm_head.weight is .*int8 there")


def test_the_meta_device_is_told(ldpnetv2):
    with torch.device("meta"):
        projector = LDPv2(32, 64)
    with pytest.raises(ValueError, match="meta device"):
        load_projector(projector, ldpnetv2.folder)


def test_unmerged_adapters_are_not_saved(ldpnetv2, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    model = copy.deepcopy(ldpnetv2.model)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model.language)
    with pytest.raises(ValueError, match="merge them before saving"):
        save_checkpoint(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_is_no_model(tmp_path, ldpnetv2):
    for folder, told in (
        (CHECKPOINTS / "ldpnet_projector_only", "no whole model"),
        (REFERENCE / "base_llm", "config.json lacks mm_projector_type"),
    ):
        with pytest.raises(ValueError, match=told):
            from_released(folder)


# ------------------------------------------------------------------------------------------------------- files


def torn(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    return target


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_files_that_cannot_be_read(tmp_path, capsys):
    bin_folder = CHECKPOINTS / "ldpnetv2_bin"
    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "nested.bin")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "note.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    torn(TOWER_FOLDER / "model.safetensors", tmp_path / "torn.safetensors")
    torn(bin_folder / "pytorch_model-00003-of-00003.bin", tmp_path / "torn.bin")
    for name, told in {
        "evil.bin": "more than plain tensors",
        "list.bin": "no plain state dict",
        "nested.bin": "no plain state dict",
        "old.bin": "older than torch 1.6",
        "empty.safetensors": r"\(0 bytes\) can't be read, it is torn",
        "note.safetensors": "git lfs pull",
        "torn.safetensors": "it is torn: copy or download it again",
        "torn.bin": "torn, ",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{told}"):
            read_tensors(tmp_path / name)
    assert not capsys.readouterr().out


def test_folders_that_cannot_be_read(tmp_path):
    bin_folder = CHECKPOINTS / "ldpnetv2_bin"
    with pytest.raises(ValueError, match=r"holds no weights .*it is empty"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_tensors(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no weights.*tokenizer.model"):
        read_tensors(REFERENCE / "tokenizer")

    index = "pytorch_model.bin.index.json"
    for file in bin_folder.iterdir():
        shutil.copy(file, tmp_path)
    assert len(read_tensors(tmp_path)) == len(read_tensors(bin_folder))
    torn(bin_folder / "pytorch_model-00002-of-00003.bin", tmp_path / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(ValueError, match=r"00002-of-00003.bin .*torn"):
        read_tensors(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ValueError, match=r"names the shard pytorch_model-00002-of-00003.bin"):
        read_tensors(tmp_path)
    where = json.loads((bin_folder / index).read_text())["weight_map"]
    (tmp_path / index).write_text(json.dumps({"weight_map": {"x": "../secret.bin"}}))
    with pytest.raises(ValueError, match=r"names the shard ../secret.bin, which is not in its folder"):
        read_tensors(tmp_path)
    lost = {"lm_head.weight": where["lm_head.weight"], "another": where["lm_head.weight"]}
    (tmp_path / index).write_text(json.dumps({"weight_map": lost}))
    with pytest.raises(ValueError, match=r"promises tensors that no shard holds \(another\)"):
        read_tensors(tmp_path)
    torn(bin_folder / index, tmp_path / index)
    with pytest.raises(ValueError, match="no whole index"):
        read_tensors(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / index).unlink()
    with pytest.raises(ValueError, match="adapters, not a model"):
        read_tensors(tmp_path)


def test_a_torn_config(ldpnetv2, tmp_path):
    torn(ldpnetv2.folder / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.json is no whole JSON"):
        read_config(tmp_path)


# ------------------------------------------------------------------------------------------------------- the hub


def test_a_name_is_fetched_from_the_hub(ldpnet, tmp_path, monkeypatch):
    """Pickles only where there are no safetensors: OpenAI's CLIP and others ship several formats at once."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns[0]))
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(REFERENCE / "vision_tower" / "config.json", folder)
        weights = read_tensors(TOWER_FOLDER)
        if name == "some/new" and "*.safetensors" in allow_patterns:
            save_file(weights, folder / "model.safetensors")
        if name == "some/old" and "*.bin" in allow_patterns:
            torch.save(weights, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("some/new", "some/old"):
        vision = blank(ldpnet.model.vision)
        load_vision(vision, name)
        assert same(vision.state_dict(), ldpnet.model.vision.state_dict())
    assert asked == [("some/new", "*.safetensors"), ("some/old", "*.safetensors"), ("some/old", "*.bin")]


def test_a_hub_that_gives_nothing_is_one_clear_line(ldpnet, monkeypatch):
    def unreachable(name, allow_patterns):
        raise ConnectionError("name resolution failed\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError) as caught:
        load_language(ldpnet.model.language, "mtgv/MobileLLaMA-1.4B-Chat")
    told = str(caught.value)
    assert (
        "\n" not in told
        and "no local folder" in told
        and "name resolution failed" in told
        and "give the folder" in told
    )


@pytest.mark.parametrize("path", ["runs/a/pretrain", "/none", "../up/x", "none", "~/none/such"])
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(path, ldpnet, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match="no such file or folder"):
        load_vision(ldpnet.model.vision, path)
