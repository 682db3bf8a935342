"""[PW]x2 [AvgPool 2]: the perceptron with its grid halved (Table 7, row 5; the first two lines of Equation 3)."""

from __future__ import annotations

from torch import Tensor

from mvlm.projector.grid import average_pool
from mvlm.projector.pw2 import PW2


class AvgPool(PW2):
    """AvgPool(PW(GELU(PW x))): 6,295,552 parameters at 1024 -> 2048, M = N / pool^2 tokens.

    The second PW and the pooling are both linear in each token (a mean of affine images is the affine image of the mean), so
    the pooling goes first: the same numbers for 1 / pool^2 of the second layer's work.
    """

    def __init__(self, vision_dim: int, language_dim: int, pool: int = 2) -> None:
        super().__init__(vision_dim, language_dim)
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, N / pool^2, D)."""
        return self.pw2(average_pool(self.act(self.pw1(features)), self.pool))
