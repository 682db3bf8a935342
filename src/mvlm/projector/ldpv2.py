"""LDPv2, the paper's projector: [PW]x2 [AvgPool 2] [DW k=1] with a skip (Equation 3; Table 7, row 7)."""

from __future__ import annotations

from torch import Tensor, nn

from mvlm.projector.avgpool import AvgPool
from mvlm.projector.grid import to_map, to_tokens


class LDPv2(AvgPool):
    """f1 = AvgPool(PW(GELU(PW x))), then DW(f1) + f1: 6,316,032 parameters at 1024 -> 2048.

    The depth-wise 3x3 convolution is a PEG, a position encoding made from a token's neighbours: zero padding tells it where
    the border is. `pool=1` is the "w/o AvgPool" row of Table 4.
    """

    def __init__(self, vision_dim: int, language_dim: int, pool: int = 2) -> None:
        super().__init__(vision_dim, language_dim, pool)
        self.peg = nn.Conv2d(language_dim, language_dim, kernel_size=3, padding=1, groups=language_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, N / pool^2, D)."""
        tokens = super().forward(features)
        return to_tokens(self.peg(to_map(tokens))) + tokens
