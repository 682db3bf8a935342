"""Small models whose every part matters: each weight is drawn large enough that a wrong one shows in the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mvlm import build
from mvlm.data import byte_tokenizer
from mvlm.data.image import Pictures
from mvlm.data.prompt import Template, template
from mvlm.data.tokenizer import FastTokenizer, SentencePieceTokenizer, load_tokenizer
from mvlm.export import container, gate, language, tokenizer, vision
from mvlm.export.container import Stored
from mvlm.model.checkpoint import save_checkpoint
from mvlm.model.mobilevlm import MobileVLM
from mvlm.model.vision import Vision
from mvlm.projector.ldpv2 import LDPv2
from mvlm.run import Run

REFERENCE = Path(__file__).parents[1] / "reference"


def pytest_collection_modifyitems(items) -> None:
    """What is marked `engine` needs llama.cpp."""
    if find_spec("xllamacpp") is None:
        for item in items:
            if "engine" in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason="xllamacpp is not installed"))


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep the size of what passes and spread it: fresh ones are so small that attention is a plain mean, a
    position changes nothing and the largest logit is a matter of rounding."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=draw)
        if name.endswith("gamma"):  # layer scale
            value.copy_(0.3 + noise.abs())
        elif "norm" in name and name.endswith("weight"):
            value.copy_(1 + 0.2 * noise)
        elif value.dim() == 1:
            value.copy_(0.2 * noise)
        elif "token" in name or "pos" in name:
            value.copy_(noise)
        else:
            value.copy_(1.5 * noise / math.sqrt(value[0].numel()))
    return model.eval()


def llama(vocabulary: int = 259, tied: bool = False, **sizes) -> LlamaForCausalLM:
    """Two layers, two query heads to a key head. With a tied head random weights say the last token again and again."""
    asked = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    } | sizes
    return lively(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **asked)))


def small(
    projector: Callable[[int, int], nn.Module] = LDPv2, language: LlamaForCausalLM | None = None, **tower: Any
) -> MobileVLM:
    """A tower of 96 px in patches of 4 (the 24x24 grid that llama.cpp asks for) with three blocks and layer scale, a
    projector, a LLaMA."""
    sizes = {"patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 3, "class_token": False} | tower
    seen = Vision(sizes.pop("name", "vit_small_patch14_dinov2"), sizes.pop("image_size", 96), **sizes)
    model = MobileVLM(seen, projector, language or llama())
    lively(model.vision, 1)
    lively(model.projector, 2)
    return model.eval()


def fitted(size: int = 96, mode: str = "letterbox") -> Pictures:
    return Pictures(size, mode, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Bench:
    """A model with its words, and how it is written."""

    model: MobileVLM
    words: FastTokenizer | SentencePieceTokenizer
    words_folder: Path
    talk: Template
    look: Pictures

    def write(
        self,
        folder: Path,
        vision_table: Callable[[dict[str, Any]], dict[str, Any]] = lambda table: table,
        vision_tensors: Callable[[list[Stored]], list[Stored]] = lambda tensors: tensors,
        language_table: Callable[[dict[str, Any]], dict[str, Any]] = lambda table: table,
        language_tensors: Callable[[list[Stored]], list[Stored]] = lambda tensors: tensors,
    ) -> tuple[Path, Path]:
        """The pair of files, (language, mmproj); each part may be spoilt on its way."""
        m = self.model
        files = folder / "language.gguf", folder / "mmproj.gguf"
        words = tokenizer.vocabulary(self.words, self.words_folder, m.language.config.vocab_size)
        table = language.metadata(m.language.config, "small") | words | tokenizer.chat_template(self.talk)
        container.write(files[0], language_table(table), language_tensors(language.tensors(m.language)))
        table = vision.metadata(m.vision, m.projector, m.language.config.hidden_size, self.look, "small")
        tensors = [*vision.tower_tensors(m.vision), *vision.projector_tensors(m.projector, m.vision.grid)]
        container.write(files[1], vision_table(table), vision_tensors(tensors))
        return files

    def with_model(self, model: MobileVLM) -> Bench:
        return replace(self, model=model)

    def gate(self) -> gate.Gate:
        return gate.Gate(self.model, self.words, self.talk, self.look)


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory) -> Path:
    """The nano model's tokenizer."""
    return byte_tokenizer.build(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def bench(bytes_folder) -> Bench:
    """LDPv2, no class token, a byte for a token, chatml, pictures as llama.cpp fits them."""
    return Bench(small(), load_tokenizer(bytes_folder), bytes_folder, template("chatml"), fitted())


@pytest.fixture(scope="session")
def pieces_bench() -> Bench:
    """The same with sentencepiece and the reference's template."""
    folder = REFERENCE / "tokenizer"
    words = load_tokenizer(folder)
    return Bench(small(language=llama(words.vocab_size)), words, folder, template("v1"), fitted())


@pytest.fixture
def engine(monkeypatch) -> None:
    """Tests that ask for it need llama.cpp, and compare short answers to two questions a picture."""
    monkeypatch.setattr(gate, "TOKENS", 12)
    monkeypatch.setattr(gate, "QUESTIONS", gate.QUESTIONS[1:3])


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list[Stored]], list[Stored]]:
    """A spoiler: tensors whose name ends so, changed."""

    def spoil(tensors: list[Stored]) -> list[Stored]:
        assert any(tensor.name.endswith(name) for tensor in tensors), name
        return [t._replace(value=change(t.value)) if t.name.endswith(name) else t for t in tensors]

    return spoil


SMALL = (
    "model=nano", "model.grid=24", "model.module.vision.image_size=96", "+model.module.vision.patch_size=4",
    "+model.module.vision.mlp_ratio=3", "model.pictures.size=96", "model.module.language.config.tie_word_embeddings=false",
)  # fmt: skip
"""The nano model on the grid that llama.cpp asks for."""


@pytest.fixture
def run_of(configure, tmp_path):
    """`run_of("projector=pw2")`: the folder of a run that was never trained, but whose weights are lively."""

    def made(*words: str) -> Run:
        cfg = configure(*SMALL, *words)
        run = Run(tmp_path / "small")
        model = build.model(cfg)
        for seed, part in enumerate((model.vision, model.projector, model.language)):
            lively(part, seed)
        save_checkpoint(model, run.folder / "finetune")
        (run.folder / "finetune" / "stage.json").write_text("{}")
        OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), run.folder / "config.yaml")
        return run

    return made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()
