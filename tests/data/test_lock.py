"""Who has a file to himself, and what is done where no file system tells."""

from __future__ import annotations

import errno
import fcntl

from mvlm.data.lock import taken


def test_one_has_it_until_it_is_closed(tmp_path) -> None:
    with open(tmp_path / "a", "a+") as mine, open(tmp_path / "a", "a+") as other:
        assert taken(mine) and taken(mine), "again by the same"
        assert not taken(other) and not taken(other, shared=True)
        mine.close()
        assert taken(other, shared=True) and taken(other, wait=True)


def test_where_there_are_no_locks_nobody_waits(tmp_path, monkeypatch, caplog) -> None:
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "a", "a+") as file:
        assert taken(file, shared=True) and not caplog.records
        assert taken(file, wait=True) and "nothing keeps two processes apart" in caplog.text
