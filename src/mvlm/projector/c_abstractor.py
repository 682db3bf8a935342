"""Honeybee's C-Abstractor: convolutions, an adaptive pooling, convolutions (Cha et al., arXiv 2312.06742, section 3.2)."""

from __future__ import annotations

import math

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from mvlm.projector.grid import to_map, to_tokens, token_side


class CAbstractor(nn.Module):
    """Positions, `depth` RegNet blocks, pooling to the tokens, `depth` blocks, a perceptron: 22,713,856 parameters at 1024 -> 2048.

    Defaults are the paper's. As in the authors' code the blocks are timm's, bottlenecks that don't narrow, with a depthwise 3x3
    convolution, squeeze-excite, layer norm over the channels and SiLU; the perceptron has SiLU between its two layers.
    """

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        grid: int = 24,
        tokens: int | None = None,
        depth: int = 3,
        hidden: int = 1024,
    ) -> None:
        """
        Args:
            grid: side of the tower's patch grid; the table of positions has grid^2 rows.
            tokens: M, a square number; a quarter of the patches if None (144 on 24x24). The paper has 256 there, too.
            depth: blocks on either side of the pooling.
            hidden: their channels.

        Raises:
            ValueError: `tokens` is no square number, or there are fewer patches; no block.
        """
        super().__init__()
        if depth < 1:
            raise ValueError(
                f"depth={depth}: a C-Abstractor without blocks is a perceptron that pools, projector=avgpool"
            )
        self.grid, self.tokens, self.depth, self.hidden = grid, token_side(tokens, grid) ** 2, depth, hidden
        self.position = nn.Parameter(torch.empty(grid**2, vision_dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        kind = {"stride": 1, "dilation": 1, "act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
        self.before = RegStage(depth, vision_dim, hidden, **kind)
        self.pool = nn.AdaptiveAvgPool2d(math.isqrt(self.tokens))
        self.after = RegStage(depth, hidden, hidden, **kind)
        self.pw1 = nn.Linear(hidden, language_dim)
        self.act = nn.SiLU()
        self.pw2 = nn.Linear(language_dim, language_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, M, D).

        Raises:
            ValueError: the grid is not the one the table of positions was made for.
        """
        if features.shape[1] != len(self.position):
            raise ValueError(
                f"{features.shape[1]} patch features meet a table of {len(self.position)} positions: "
                "set projector.grid to the side of the tower's patch grid"
            )
        grid = self.after(self.pool(self.before(to_map(features + self.position))))
        return self.pw2(self.act(self.pw1(to_tokens(grid))))
