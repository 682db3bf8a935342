"""What a run folder says of the machine that made it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from mvlm.run import processor

UNNAMED = platform.processor() or platform.machine()


@pytest.mark.parametrize(
    "files, told",
    [
        ({"cpuinfo": "model\t\t: 17\nmodel name\t: AMD EPYC\ncpu family\t: 25\n"}, "AMD EPYC, family 25, model 17"),
        ({"cpuinfo": "model name\t: QEMU\n"}, "QEMU"),
        ({"cpuinfo": "model\t: 1\nHardware\t: none\n"}, UNNAMED),
        ({}, UNNAMED),
        ({"device-tree/model": "NVIDIA Jetson AGX Orin\0"}, "NVIDIA Jetson AGX Orin"),
    ],
)
def test_a_result_names_its_processor(files: dict[str, str], told: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processor(tmp_path) == told
