"""Patch tokens are a square picture read row by row. These functions are all that projectors need to know of that."""

from __future__ import annotations

import math

from torch import Tensor


def side(tokens: Tensor) -> int:
    """Side of the square grid that `tokens` (B, N, D) come from.

    Raises:
        ValueError: N is no square number (a class token left in is the usual reason).
    """
    n = tokens.shape[1]
    root = math.isqrt(n)
    if root * root != n:
        raise ValueError(
            f"{n} patch features are no square grid (nearest: {root}x{root} = {root * root}): "
            "is a class token still among them, or is the picture not square?"
        )
    return root


def to_map(tokens: Tensor) -> Tensor:
    """(B, N, D) in row-major order -> (B, D, side, side), as convolutions want it."""
    s = side(tokens)
    return tokens.transpose(1, 2).unflatten(2, (s, s))


def to_tokens(grid: Tensor) -> Tensor:
    """(B, D, side, side) -> (B, N, D), the inverse of `to_map`."""
    return grid.flatten(2).transpose(1, 2)


def token_side(tokens: int | None, grid: int) -> int:
    """Side of a square of `tokens` made from grid x grid patches; half the grid's (rounded down) where no number is given.

    Raises:
        ValueError: no square number, or more tokens than patches.
    """
    wanted = grid // 2 if tokens is None else math.isqrt(max(tokens, 0))
    if not 1 <= wanted <= grid or tokens not in (None, wanted**2):
        squares = ", ".join(str(s * s) for s in sorted({grid // 3, grid // 2, 2 * grid // 3, grid}))
        raise ValueError(
            f"projector.tokens={tokens} is no square number from 1 to the {grid * grid} of the {grid}x{grid} patches: "
            f"take one such as {squares}"
        )
    return wanted


def average_pool(tokens: Tensor, k: int) -> Tensor:
    """k x k average pooling over the grid: (B, N, D) -> (B, N / k^2, D). Equation 3's AvgPool for k = 2.

    The reference pools adaptively to a fixed 12x12, which is the same thing on its 24x24 grid and something else on others.

    Raises:
        ValueError: the side of the grid is no multiple of k.
    """
    if k == 1:
        return tokens
    s = side(tokens)
    if s % k:
        raise ValueError(
            f"a {s}x{s} grid can't be pooled {k}x{k}: choose an image size whose grid side is a multiple of {k} "
            f"(e.g. {s - s % k} or {s - s % k + k} patches a side)"
        )
    cells = tokens.unflatten(1, (s // k, k, s // k, k))
    return cells.mean(dim=(2, 4)).flatten(1, 2)
