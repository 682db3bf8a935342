"""Starting is timed from outside, and what is timed is what it says."""

from __future__ import annotations

import pytest

from mvlm.bench import start


def test_a_command_that_fails_is_no_time() -> None:
    with pytest.raises(RuntimeError, match="ended with 3: so it is"):
        start.seconds("-c", "import sys; print('so it is', file=sys.stderr); sys.exit(3)")


@pytest.mark.slow
def test_all_starts_are_timed(configure, tmp_path, capsys) -> None:
    told = start.run(configure("target=start", "rounds=1", page="bench"))
    assert all(len(some) == 1 and some[0] > 0 for some in told["seconds"].values()) and len(told["seconds"]) == 4
    assert "transformers' Trainer" in capsys.readouterr().out

    start.seconds("-c", start.OURS, "model=nano", "trainer=cpu", f"runs={tmp_path}", "cell=one", "logger=csv")
    (run,) = tmp_path.iterdir()
    assert (run / "pretrain").exists() and not (run / "pretrain" / "stage.json").exists(), "not ended at the first step"
