"""A rotation that was found for what it rotates: block by block, then across the blocks, then block by block again."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from lightning_quant.quantizers import OwnPrecision


class BlockRotation(OwnPrecision):
    r"""Multiplies the last axis with :math:`Q = R_1 P R_2`, where the R are block-diagonal and P is a permutation.

    It is the identity until the blocks are set, and part of the state dict, since nothing but data tells what they are.

    Args:
        size: number of channels.
        block: channels in a block; where it does not divide the size, the largest common divisor of both.

    >>> rotation, x = BlockRotation(6, block=4), torch.randn(3, 6)
    >>> rotation.block, torch.equal(rotation(x), x)
    (2, True)
    """

    first: Tensor
    second: Tensor
    order: Tensor

    def __init__(self, size: int, block: int = 128) -> None:
        super().__init__()
        self.size, self.block = size, gcd(size, block)
        blocks = torch.eye(self.block).repeat(size // self.block, 1, 1)  # (blocks, b, b)
        self.register_buffer("first", blocks)
        self.register_buffer("second", blocks.clone())
        self.register_buffer("order", torch.arange(size))

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Rotate the last axis, in at least float32."""
        working = x if x.dtype == torch.float64 else x.float()
        if inverse:
            permuted = multiply_blocks(working, self.second.mT)
            return multiply_blocks(permuted[..., self.order.argsort()], self.first.mT).to(x.dtype)
        return multiply_blocks(multiply_blocks(working, self.first)[..., self.order], self.second).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and blocks."""
        return f"{self.size}, block={self.block}"


def multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """``x`` (..., C) times a block-diagonal matrix of (blocks, b, b).

    >>> x, blocks = torch.randn(3, 4), torch.randn(2, 2, 2)
    >>> torch.allclose(multiply_blocks(x, blocks), x @ torch.block_diag(*blocks), atol=1e-6)
    True
    """
    return torch.einsum("...kb,kbc->...kc", x.unflatten(-1, blocks.shape[:2]), blocks.to(x.dtype)).flatten(-2)
