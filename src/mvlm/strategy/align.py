"""`start=words`: a projector that starts out naming what it is shown. For generated scenes only, which know what every patch shows.

The paper starts from a random projector and earns its sight in 5,000 steps of 256 captions. A laptop has a hundred steps of 8, and
a plain recipe then learns to guess answers without looking. This start gives the language model something to look at: the projector
alone, apart from the language model, learns to put the word embedding of what a cell shows into that cell's token. It asks the same
of every projector, changes no architecture, is a named option (`recipe.start`), is off in the paper's recipe, and what it reached is
written into the run folder.

How far it brings a projector differs, so look at `start.named` in pretrain/stage.json before projectors are compared. On 300 pictures,
seed 0, 100 steps at this file's rate gave `ldpv2` 65 % of the words of 15 other pictures, `pixel_shuffle` 40 %, `resampler`, whose
queries must find their cells first, 12 %, `c_abstractor` 6 %; 300 steps gave the first three 73, 61 and 20 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

SHARPNESS = 16.0
"""Cosines are multiplied by this before the softmax over words."""

RIDGE = 0.01
"""Added to the features' variances, as a share of their mean, before they are whitened."""


@dataclass(frozen=True)
class Alignment:
    """What the start reached on pictures it was not fitted to."""

    pictures: int
    steps: int
    whitened: bool
    """Whether it learned from whitened features, which needs a projector that begins with a linear layer."""
    named: float
    """Share of the words of the cells' phrases that are among the words nearest to the cell's token, by cosine ("red dog": among the
    nearest two)."""
    named_rare: float
    """The same over the cells of phrases rarer than the average one: objects, where backgrounds fill most of the rest."""


def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (Dv,) and symmetric matrix (Dv, Dv) after which features (..., Dv) are centred and nearly uncorrelated.

    A tower's features are dominated by a few constant channels; gradient descent on raw ones sees little else.
    """
    sample = features.flatten(0, -2).float()
    sample = sample[:: max(1, len(sample) // 100_000)]
    mean = sample.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov((sample - mean).T))
    return mean, axes @ torch.diag((variances + RIDGE * variances.mean()).rsqrt()) @ axes.T


@torch.no_grad()
def foldable(projector: nn.Module, features: Tensor, mean: Tensor, matrix: Tensor) -> nn.Linear | None:
    """The linear layer that whitening can be folded into, for it takes the tower's features; None if there is no such layer.

    A width alone tells nothing: a layer further back may have as many inputs. So the folding is tried on a copy.
    """
    width = features.shape[-1]
    for name, layer in projector.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features == width and layer.bias is not None:
            folded = copy.deepcopy(projector)
            fold(folded.get_submodule(name), mean, matrix)
            wanted = projector((features - mean) @ matrix)
            # Rounding costs some millionths of the largest value, a wrong layer all of it.
            return layer if (folded(features) - wanted).abs().max() < 0.01 * wanted.abs().max() else None
    return None


def fold(layer: nn.Linear, mean: Tensor, matrix: Tensor) -> None:
    """Make a layer that took whitened features take raw ones: W (A (x - mean)) + b = (W A) x + (b - W A mean), exactly."""
    with torch.no_grad():
        layer.weight.copy_(layer.weight @ matrix)
        layer.bias.sub_(layer.weight @ mean)


def align(
    projector: nn.Module,
    features: Tensor,
    cells: Sequence[Sequence[str]],
    embed: Callable[[str], Tensor],
    *,
    steps: int = 800,
    batch_size: int = 8,
    rate: float = 3e-3,
    held_out: float = 0.05,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> Alignment:
    """Fit the projector's tokens to the word embeddings of what their cells show.

    The loss of a cell is the squared distance to its phrase's embedding (the mean of its words') plus the cross-entropy of naming
    its words among all, by cosine. A cell weighs as the square root of its phrase's rarity, or backgrounds would be all that is
    learned.

    Args:
        projector: changed in place.
        features: (P, N, Dv), the tower's output for P generated pictures.
        cells: P lists of M phrases, row by row ("red dog", "beach", ...); "" where a cell shows nothing (letterbox margin).
        embed: word -> (tokens, D), the language model's own embeddings of its tokens.
        held_out: share of the pictures that only measure.
        autocast: type of the matrix products.
    """
    phrases = sorted({phrase for picture in cells for phrase in picture if phrase})
    words = sorted({word for phrase in phrases for word in phrase.split()})
    # Each phrase as a distribution over words: half red, half dog.
    shares = torch.tensor([[phrase.split().count(word) / len(phrase.split()) for word in words] for phrase in phrases])
    embeddings = torch.stack([embed(word).float().mean(0) for word in words])
    table, centre = shares @ embeddings, embeddings.mean(0)
    directions = normalize(embeddings - centre, dim=-1)
    index = {phrase: i for i, phrase in enumerate(phrases)} | {"": -1}
    goal = torch.tensor([[index[phrase] for phrase in picture] for picture in cells])
    frequency = torch.bincount(goal[goal >= 0], minlength=len(phrases)).float()

    mean, matrix = whitening(features)
    layer = foldable(projector, features[:2].float(), mean, matrix)
    if layer is None:
        mean, matrix = torch.zeros_like(mean), torch.eye(len(mean))
    tests = max(1, round(len(features) * held_out))

    def tokens(which: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of the cells that show something, and what they show."""
        white = (features[which].float() - mean) @ matrix
        with torch.autocast(features.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            made = projector(white)
        seen = goal[which] >= 0
        return made.float()[seen], goal[which][seen]

    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    told = "teaching the projector words" + ("" if layer else " (from raw features)")
    for _ in track(range(steps), description=told):
        said, meant = tokens(tests + torch.randint(len(features) - tests, (batch_size,), generator=draw))
        weight = frequency[meant].rsqrt()
        nearness = normalize(said - centre, dim=-1) @ directions.T
        naming = cross_entropy(SHARPNESS * nearness, shares[meant], reduction="none")
        loss = (weight * (naming + (said - table[meant]).square().sum(-1))).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        said, meant = tokens(torch.arange(tests))
        ranks = ((said - centre) @ directions.T).argsort(descending=True).argsort()
        length = (shares[meant] > 0).sum(1, keepdim=True)
        right = (shares[meant] * (ranks < length)).sum(1)
        rare = frequency[meant] < frequency.mean()
    if layer is not None:
        fold(layer, mean, matrix)
    return Alignment(len(features), steps, layer is not None, right.mean().item(), right[rare].mean().item())
