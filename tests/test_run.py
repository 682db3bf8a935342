"""What a run folder says of the machine that made it, and whose it is on file systems of all kinds."""

from __future__ import annotations

import errno
import fcntl
import logging
import platform
from pathlib import Path

import pytest

from mvlm.run import Run, processor

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


def test_a_file_system_without_locks_is_told_and_keeps_nobody_out(tmp_path, monkeypatch, caplog) -> None:
    """As Lustre's, mounted without `flock`."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        Run(tmp_path).lock()
    assert "can't be locked" in caplog.text and "Function not implemented" in caplog.text
    assert not Run(tmp_path).locked


def test_whether_a_folder_is_locked_is_asked_as_nfs_wants_it(tmp_path, monkeypatch) -> None:
    """It refuses a shared lock of a file that is not open to be read; that does not mean that somebody has it."""
    real = fcntl.flock

    def flock(file, how):
        if how & fcntl.LOCK_SH and not file.readable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(file, how)

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    assert not Run(tmp_path).locked
    held = Run(tmp_path)
    held.lock()
    assert Run(tmp_path).locked
