"""What every test shares: one thread, no network, a cache of its own for what is generated, the nano model."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: pools of several tests would fight for two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nano_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the nano corpus is generated, once a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def configure(nano_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """`configure("model=nano", ...)`: the configuration that `python train.py ...` would get."""
    monkeypatch.setenv("MVLM_CACHE", str(nano_cache))

    def configured(*overrides: str, page: str = "train") -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(page, list(overrides))

    return configured
