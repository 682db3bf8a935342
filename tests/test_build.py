"""What a configuration's words become on this machine."""

from __future__ import annotations

import pytest
import torch

from mvlm import build


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
