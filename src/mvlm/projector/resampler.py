"""Learned queries that look at all patches: Qwen-VL's resampler (Bai et al., arXiv 2308.12966, section 2.1)."""

from __future__ import annotations

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mvlm.projector.grid import token_side


class Resampler(nn.Module):
    """M queries, one layer of cross-attention, a norm and a linear map: 23,384,064 parameters at 1024 -> 2048 and 144 tokens.

    Of the resamplers this one is the best motivated at our sizes. It is one layer (Flamingo's Perceiver has six, with a feed-forward
    network each), and its queries lie on a grid of their own: query and patch get the sine-cosine code of their place on the
    picture. To look at what is there it has to learn one product of two fixed codes, and tokens come row by row, as those of the
    other projectors do. Few samples teach it little all the same: `mvlm.strategy.align` has figures.

    As in the authors' code the code of the patches is that of the queries, enlarged; it is added to queries and keys, not to values;
    heads are 128 wide (or the next larger width that divides D); weights start as theirs. The order of channels in the code is
    timm's. The map of the features into the language model's width is always there; theirs leaves it out where Dv = D.
    """

    def __init__(self, vision_dim: int, language_dim: int, grid: int = 24, tokens: int | None = None) -> None:
        """
        Args:
            grid: side of the tower's patch grid.
            tokens: M, a square number; a quarter of the patches if None (144 on 24x24).

        Raises:
            ValueError: `tokens` is no square number, or there are fewer patches; D is no multiple of 4.
        """
        super().__init__()
        if language_dim % 4:
            raise ValueError(
                f"sine and cosine of row and column need a width that is a multiple of 4, and the language model's is {language_dim}: "
                "choose another projector"
            )
        side = token_side(tokens, grid)
        self.grid, self.tokens = grid, side**2
        heads = next(n for n in range(max(1, language_dim // 128), 0, -1) if language_dim % n == 0)
        self.query = nn.Parameter(torch.empty(side**2, language_dim))
        self.pw1 = nn.Linear(vision_dim, language_dim, bias=False)
        self.norm_query = nn.LayerNorm(language_dim, eps=1e-6)
        self.norm_patch = nn.LayerNorm(language_dim, eps=1e-6)
        self.attention = nn.MultiheadAttention(language_dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(language_dim, eps=1e-6)
        self.pw2 = nn.Linear(language_dim, language_dim, bias=False)
        for weight in (self.query, self.pw1.weight, self.attention.out_proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.normal_(self.pw2.weight, std=language_dim**-0.5)

        code = build_sincos2d_pos_embed([side, side], language_dim, device=self.query.device)
        larger = interpolate(code.T.unflatten(1, (side, side))[None], size=(grid, grid), mode="bicubic")
        self.register_buffer("query_position", code, persistent=False)
        self.register_buffer("patch_position", larger[0].flatten(1).T.contiguous(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, M, D).

        Raises:
            ValueError: the grid is not the one the positions were made for.
        """
        if features.shape[1] != len(self.patch_position):
            raise ValueError(
                f"{features.shape[1]} patch features meet {len(self.patch_position)} positions: "
                "set projector.grid to the side of the tower's patch grid"
            )
        values = self.norm_patch(self.pw1(features))
        queries = (self.norm_query(self.query) + self.query_position).expand(features.shape[0], -1, -1)
        seen, _ = self.attention(queries, values + self.patch_position, values, need_weights=False)
        return self.pw2(self.norm(seen))
