"""What grows is seen to grow."""

from __future__ import annotations

import os

import pytest

from mvlm.bench import soak


def test_growth_is_a_slope() -> None:
    steps = list(range(0, 2000, 20))
    assert soak.slope([5 + 0.003 * s for s in steps], 1000, steps) == pytest.approx(3.0)
    assert soak.slope([400.0] * 5 + [7.0] * 95, 1000, steps) == pytest.approx(0, abs=1e-9), (
        "the beginning does not count"
    )


def test_a_process_and_its_children_are_seen() -> None:
    """100 MB that are written to, and ten files more."""
    script = (
        "import time; a = bytearray(b'x' * 10**8); f = [open('/dev/null') for _ in range(10)]\n"
        "import os; child = os.fork(); time.sleep(1.5)"
    )
    seen = soak.watched(["-c", script], lambda: 1, 0.3)
    memory, files = max(one[2] for one in seen), max(one[3] for one in seen)
    assert 95 < memory < 200, "shared pages count once"
    assert files >= 26, "both processes' files"
    assert soak.looked_at(os.getpid())[1] > 0
    with pytest.raises(RuntimeError, match="ended with 3"):
        soak.watched(["-c", "raise SystemExit(3)"], lambda: 0, 0.1)
