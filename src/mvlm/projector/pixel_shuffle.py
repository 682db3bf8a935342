"""Pixel shuffle, then a perceptron: InternVL's projector (Chen et al., arXiv 2404.16821, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from mvlm.projector.grid import side


def space_to_depth(tokens: Tensor, factor: int) -> Tensor:
    """Neighbours side by side in the channels of one token: (B, N, D) -> (B, N / factor^2, factor^2 * D).

    Channels come patch by patch, each whole and row by row (for factor 2: upper left, upper right, lower left, lower right), as in
    InternVL, Idefics3, SmolVLM and nanoVLM. torch's `pixel_unshuffle` goes channel by channel instead.

    Raises:
        ValueError: the side of the grid is no multiple of the factor.
    """
    s = side(tokens)
    if s % factor:
        raise ValueError(
            f"a {s}x{s} grid can't be shuffled {factor}x{factor}: set projector.factor to a divisor of {s}, or choose an image "
            f"size whose grid side is a multiple of {factor} (e.g. {s - s % factor} or {s - s % factor + factor} patches a side)"
        )
    cells = tokens.unflatten(1, (s // factor, factor, s // factor, factor))
    return cells.transpose(2, 3).flatten(3).flatten(1, 2)


class PixelShuffle(nn.Module):
    """Linear(GELU(Linear(LayerNorm(shuffled)))): 12,595,200 parameters at 1024 -> 2048, M = N / factor^2 tokens.

    Nothing is averaged away: a token keeps every number of its patches, and the first layer pays for that with factor^2 times the
    weights of `avgpool`'s. The perceptron is InternVL's. Idefics3, SmolVLM and nanoVLM shuffle alike and then have one linear layer
    without bias, and no norm.
    """

    def __init__(self, vision_dim: int, language_dim: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.norm = nn.LayerNorm(factor**2 * vision_dim)
        self.pw1 = nn.Linear(factor**2 * vision_dim, language_dim)
        self.act = nn.GELU()
        self.pw2 = nn.Linear(language_dim, language_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, N / factor^2, D)."""
        return self.pw2(self.act(self.pw1(self.norm(space_to_depth(features, self.factor)))))
