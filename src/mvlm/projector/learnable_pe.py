"""[PW]x2 [AvgPool 2] [LearnablePE]: a learned vector for every place of the pooled grid (Table 7, row 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvlm.projector.avgpool import AvgPool


class LearnablePE(AvgPool):
    """AvgPool plus a table of positions: 6,590,464 parameters at 1024 -> 2048 on a 24x24 grid.

    The paper gives no initial values; 0.02 normal is what ViTs use for theirs.
    """

    def __init__(self, vision_dim: int, language_dim: int, grid: int = 24, pool: int = 2) -> None:
        """`grid` is the side of the tower's patch grid: the table has (grid / pool)^2 rows."""
        super().__init__(vision_dim, language_dim, pool)
        self.position = nn.Parameter(torch.empty((grid // pool) ** 2, language_dim))
        nn.init.normal_(self.position, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, N / pool^2, D).

        Raises:
            ValueError: the grid is not the one the table was made for.
        """
        tokens = super().forward(features)
        if tokens.shape[1] != len(self.position):
            raise ValueError(
                f"{tokens.shape[1]} tokens meet a table of {len(self.position)} positions: "
                "set projector.grid to the side of the tower's patch grid"
            )
        return tokens + self.position
