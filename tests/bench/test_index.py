"""The index beside `json.load`: both find all samples, and what is measured is there."""

from __future__ import annotations

import json

import pytest

from mvlm.bench import index


def test_the_generated_file_is_like_the_real_ones(tmp_path):
    index.write(tmp_path / "data.json", 1000)
    records = json.loads((tmp_path / "data.json").read_text())
    assert len(records) == 1000 and sum("image" not in r for r in records) == 50
    assert all((tmp_path / "pictures" / r["image"]).is_file() for r in records if "image" in r)
    # 1.3 kB a sample, as it says; the lengths' spread makes a mean over 1,000 uncertain by 3 %.
    assert 1.15e6 < (tmp_path / "data.json").stat().st_size < 1.45e6
    assert index._open(tmp_path / "data.json").skipped == []


@pytest.mark.slow
def test_all_steps_are_measured(configure, tmp_path, capsys):
    told = index.run(configure("target=index", "samples=3000", f"out={tmp_path}", page="bench"))
    assert told["use"]["samples"] == told["peer"]["samples"] == 3000
    assert told["use"]["held_out"] == 8 and len(told["use"]["workers"]) == 4
    assert told["index_bytes"] > 0.9 * told["bytes"]
    assert told["use"]["pickled_bytes"] < 1_000_000
    assert list(tmp_path.iterdir()) == []
    assert "json.load" in capsys.readouterr().out
