"""Seconds until a script does what it was asked for, each in a fresh process: help, the composed configuration, the first training step.

The peer is transformers' own LLaVA class under its Trainer with the nano model's sizes, from the same start to its first step's end. It
has no configuration to compose, no data to check and no run to track, so it bounds what the libraries alone take.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from mvlm.cli import ROOT

OURS = """
import os, runpy, sys
from mvlm.cli import imports
with imports():
    from mvlm.strategy.stage import Stage
Stage.on_train_batch_end = lambda *ignored: os._exit(0)
runpy.run_path("train.py", run_name="__main__")
"""
"""train.py, ended after its first step."""

PEER = """
import os, sys
import torch
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainerCallback,
                          TrainingArguments)

class End(TrainerCallback):
    def on_step_end(self, *ignored, **more):
        os._exit(0)

text = LlamaConfig(vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
tower = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, image_token_id=259, image_token_index=259))
ids = torch.tensor([1] + [259] * 16 + [5] * 20)
sample = {"input_ids": ids, "labels": ids.masked_fill(ids == 259, -100), "attention_mask": torch.ones_like(ids),
          "pixel_values": torch.zeros(3, 56, 56)}
arguments = TrainingArguments(sys.argv[1], use_cpu=True, report_to=[], save_strategy="no", remove_unused_columns=False)
Trainer(model, arguments, train_dataset=[sample] * 64, callbacks=[End()]).train()
"""


def seconds(*command: str) -> float:
    """Until the process ends.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    began = perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    took = perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{command[:2]} ended with {done.returncode}: {done.stderr[-800:]}")
    return took


def run(cfg: DictConfig) -> dict[str, Any]:
    """Start each `cfg.rounds` times in turn, after one round that is not counted, and print the medians.

    Returns:
        `bytecode`: whether the libraries lie compiled; and by way the seconds of every round.
    """
    with tempfile.TemporaryDirectory() as folder:
        nano = ("model=nano", "trainer=cpu", f"runs={folder}")
        ways = {
            "train.py --help": lambda number: seconds("train.py", "--help"),
            "train.py --cfg job": lambda number: seconds("train.py", "--cfg", "job"),
            "train.py model=nano, to its first step": lambda number: seconds("-c", OURS, *nano, f"cell=start{number}"),
            "transformers' Trainer and LLaVA, to its first step": lambda number: seconds("-c", PEER, folder),
        }
        rounds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(cfg.rounds + 1):
            for name, way in ways.items():
                took = way(number)
                rounds[name] += [round(took, 3)] * (number > 0)
    measured = {"bytecode": os.path.exists(np.__cached__), "seconds": rounds}
    table = Table("start", "seconds (median)", "rounds", title_justify="left")
    for name, took in rounds.items():
        table.add_row(name, f"{np.median(took):.2f}", ", ".join(f"{one:.2f}" for one in took))
    Console().print(table)
    if not measured["bytecode"]:
        Console().print(
            "The libraries are not compiled, which doubles all of this: ./setup.sh does it, on a fresh .venv"
        )
    return measured
