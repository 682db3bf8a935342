"""[PW]x2: a two-layer perceptron on every patch (LLaVA-1.5's projector; Table 7, rows 1 and 3)."""

from __future__ import annotations

from torch import Tensor, nn


class PW2(nn.Module):
    """PW(GELU(PW x)), a point-wise convolution being a linear layer on each token.

    6,295,552 parameters at 1024 -> 2048; every patch stays a token (M = N).
    """

    def __init__(self, vision_dim: int, language_dim: int) -> None:
        super().__init__()
        self.pw1 = nn.Linear(vision_dim, language_dim)
        self.act = nn.GELU()  # exact (erf), as the reference
        self.pw2 = nn.Linear(language_dim, language_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, N, D)."""
        return self.pw2(self.act(self.pw1(features)))
