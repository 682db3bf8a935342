"""A step that diverged, looked at again: the loss of each of its samples alone, with the weights that lie nearest before it.

`mvlm.strategy.stage` leaves a file `diverged-<step>.json` in the stage's folder. The step's samples are found by its number, since an order
is a pure function of seed and epoch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from mvlm import build, resume
from mvlm.data.collate import collate
from mvlm.data.datamodule import StepData
from mvlm.data.held_out import hold_out
from mvlm.fit import HELD_OUT, STARTED, begin
from mvlm.run import Run, content
from mvlm.strategy import lora


@torch.no_grad()
def replay(file: str | Path) -> list[tuple[str, str, int, float]]:
    """Print and return (id, source, labelled tokens, loss a token) of the step's samples, the worst first.

    Raises:
        ValueError: the file is none that a diverged step left, or its run's data has changed since.
    """
    file = Path(file)
    try:
        told = json.loads(file.read_text())
        stage, step, ids = told["stage"], int(told["step"]), told["ids"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no file that a diverged step left ({error!r}): give runs/<run>/<stage>/diverged-<step>.json"
        ) from None
    run = Run.find(file.parent.parent)
    cfg = run.config
    recipe = cfg.recipe[stage]
    files, words = build.corpus(cfg), build.tokenizer(cfg)
    torch.manual_seed(cfg.seed)  # as train.py: what nothing pretrained fills begins the same
    model = build.model(cfg)
    mixture, _ = hold_out(build.mixture(cfg, stage, files, words, model.image_tokens), HELD_OUT)
    data = StepData(mixture, recipe.batch, recipe.micro_batch, seed=cfg.seed, order=recipe.order)
    batches = data.train_dataloader().batches
    batches.seek(step - 1)
    places = [place for micro_batch in next(iter(batches)) for place in micro_batch]
    samples = [mixture[place] for place in places]
    if sorted(found := [s.id for s in samples]) != sorted(ids):
        raise ValueError(
            f"step {step} of {run.folder} has the samples {found[:4]}... now, and had {ids[:4]}...: its data has changed"
        )

    weights = _nearest(cfg, run, stage, step, model)
    model.eval().to(build.device())
    rows = []
    for sample in samples:
        loss = model(collate([sample], words.pad_id).to(build.device()))
        rows.append((sample.id, sample.source, loss.tokens, float(loss.total) / max(1, loss.tokens)))
    rows.sort(key=lambda row: -row[3] if math.isfinite(row[3]) else -math.inf)
    table = Table(
        "sample",
        "source",
        "labelled tokens",
        "loss a token",
        title=f"{stage}, step {step}: {told['reason']}",
        title_justify="left",
    )
    for name, source, tokens, loss in rows:
        table.add_row(name, source, str(tokens), f"{loss:.4g}")
    Console().print(table, f"in float32, with {weights}", sep="\n")
    return rows


def _nearest(cfg, run: Run, stage: str, step: int, model) -> str:
    """Fill the model with the newest whole checkpoint before the step, or with what the stage began with; says which."""
    if not begin(cfg, run, stage, model) and (started := run.folder / stage / STARTED).exists():
        model.projector.load_state_dict(load_file(started))
    if settings := cfg.strategy[stage].get("lora"):
        lora.attach(model.language, **OmegaConf.to_container(settings))
    for path in resume.checkpoints(run.folder / stage):
        if resume.step_of(path) < step and not resume.torn(path):
            state = resume.PlainCheckpoints(content(cfg)).load_checkpoint(path)["state_dict"]
            model.load_state_dict({name.removeprefix("model."): t for name, t in state.items()}, strict=False)
            return f"the weights after step {resume.step_of(path)}"
    return f"the weights that the stage began with, for no checkpoint before step {step} is left"
