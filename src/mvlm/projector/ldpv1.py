"""LDPv1, the first MobileVLM's projector: [PW]x2 [DW k=1 PW] [DW k=2 PW] (Table 7, rows 2 and 4)."""

from __future__ import annotations

from torch import Tensor, nn

from mvlm.projector.grid import to_map, to_tokens
from mvlm.projector.pw2 import PW2


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SqueezeExcite(nn.Module):
    """A gate a channel from the map's mean (MobileNetV3): x * hardsigmoid(fc2(relu(fc1(mean x))))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, dim // 4, 1)
        self.fc2 = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu())
        return x * nn.functional.hardsigmoid(gate)


class Block(nn.Module):
    """[DW PW], an inverted residual of MobileNetV3 that doesn't expand; a skip where the size stays."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.skip = stride == 1
        self.dw = nn.Conv2d(dim, dim, kernel_size=3, stride=stride, padding=1, groups=dim, bias=False)
        self.norm1 = ChannelNorm(dim)
        self.act = nn.Hardswish()
        self.se = SqueezeExcite(dim)
        self.pw = nn.Conv2d(dim, dim, kernel_size=1, bias=False)
        self.norm2 = ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H / stride, W / stride)."""
        y = self.norm2(self.pw(self.se(self.act(self.norm1(self.dw(x))))))
        return x + y if self.skip else y


class LDPv1(PW2):
    """The perceptron, then two depth-wise separable blocks, the second of stride 2.

    18,936,832 parameters at 1024 -> 2048. The table's notation hides the squeeze-excite and the layer norms, without which
    the count would be 14.74M.
    """

    def __init__(self, vision_dim: int, language_dim: int) -> None:
        super().__init__(vision_dim, language_dim)
        self.block1 = Block(language_dim, stride=1)
        self.block2 = Block(language_dim, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, N / 4, D)."""
        return to_tokens(self.block2(self.block1(to_map(super().forward(features)))))
