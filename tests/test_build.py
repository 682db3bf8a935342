"""What a configuration's words become on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hydra.errors import InstantiationException

from mvlm import build, plan

REFERENCE = Path(__file__).parent / "reference"


@pytest.mark.parametrize(("gpu", "processor"), [(True, False), (False, True)])
def test_precision_is_what_the_device_that_computes_multiplies(monkeypatch, tmp_path, gpu, processor):
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : avx512f" + " avx512_bf16" * processor)
    monkeypatch.setattr(build, "Path", lambda name: flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    words = {True: "bf16-mixed", False: "32-true"}
    assert (build.precision("auto"), build.precision("auto", "cpu")) == (words[gpu], words[processor])
    assert build.precision("16-mixed", "cpu") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.precision("auto") == words[processor]


def test_a_precision_is_one_of_lightnings_words():
    half = [build.autocast_type(word) for word in ("bf16-mixed", "bf16", "16-mixed", 16)]
    assert half == [torch.bfloat16, torch.bfloat16, torch.float16, torch.float16]
    assert {build.autocast_type(word) for word in ("32-true", 32, "64-true")} == {None}
    for word in ("fp16", "float32", "bf16-half", "transformer-engine"):
        with pytest.raises(ValueError, match=f"precision={word}: it may be auto"):
            build.autocast_type(word)


@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "gpu", "0x"])
def test_a_device_that_is_not_there_is_refused(wanted):
    with pytest.raises(ValueError, match=rf"device={wanted}: .*auto"):
        build.device(wanted)
    assert build.device("cpu") == build.device() == torch.device("cpu")


@pytest.mark.parametrize("model", ["1.7b", "3b", "7b"])
def test_a_tokenizer_comes_from_the_hub_without_weights(configure, monkeypatch, tmp_path, model):
    """As where somebody else's run is scored, whose weights are in its folder."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(shutil.copytree(REFERENCE / "tokenizer", tmp_path / name))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    cfg = configure(f"model={model}")
    words = build.tokenizer(cfg)
    assert words.decode(words.encode("A picture.")) == "A picture."
    ((name, patterns),) = asked
    assert name == cfg.model.tokenizer == cfg.model.weights.language and set(patterns) == {"*.json", "*.model"}


def test_what_a_part_says_is_told_without_hydras_words(configure):
    cfg = configure("model=nano", "projector=resampler", "projector.tokens=7")
    for build_it in (build.model, lambda cfg: plan.meta_model(cfg.model.module)):
        with pytest.raises(ValueError, match=r"^projector\.tokens=7 is no square number"):
            build_it(cfg)
    cfg.model.module.projector._target_ = "mvlm.projector.gone"
    with pytest.raises(InstantiationException, match="gone"):  # of no part's own: with all that Hydra knows
        build.model(cfg)
