"""What the tests of the data share."""

from __future__ import annotations

import json

import pytest
import tokenizers


@pytest.fixture(scope="session")
def fast_folder(tmp_path_factory, trained_bpe):
    """A small byte-level BPE with chat markup whose post-processor trims offsets, the trap for labels."""
    folder = tmp_path_factory.mktemp("fast")
    bpe = trained_bpe("user assistant hello there, a general boat on the lake", 320)
    bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where the indexes of these tests' files lie; a new one a test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MVLM_CACHE", str(folder))
    return folder
