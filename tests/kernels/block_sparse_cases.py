"""Calls of block-sparse attention on odd sizes, which every backend has to answer alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call."""

    name: str = "plain"
    batch: int = 2
    heads: int = 4
    key_heads: int = 4
    length: int = 32
    keys: int = 32
    blocked: int | None = None
    dim: int = 16
    value_dim: int = 16
    block: int = 8
    causal: bool = False
    padded: bool = False
    scale: float | None = None
    contiguous: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the mask of kept blocks."""
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            if self.contiguous:
                return torch.randn(shape, generator=generator).to(self.dtype)
            batch, heads, tokens, dim = shape  # as most models have them
            return torch.randn(batch, tokens, heads, dim, generator=generator).to(self.dtype).transpose(1, 2)

        query = random(self.batch, self.heads, self.length, self.dim)
        key = random(self.batch, self.key_heads, self.keys, self.dim)
        value = random(self.batch, self.key_heads, self.keys, self.value_dim)
        blocked = self.keys if self.blocked is None else self.blocked
        shape = (self.batch, self.heads, -(-self.length // self.block), -(-blocked // self.block))
        kept = torch.rand(shape, generator=generator) < 0.5
        kept[:, :, 0, 0] = True
        return query, key, value, kept

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        valid = None
        if self.padded:  # another number of valid keys in each sample, and not only at the end
            valid = torch.rand(self.batch, self.keys, generator=torch.Generator().manual_seed(4)) < 0.7
        return {"blocked": self.blocked, "scale": self.scale, "valid": valid, "causal": self.causal}


CASES = [
    Case(),
    Case("ragged", length=29, keys=29),
    Case("more queries than keys", length=45, keys=19),
    Case("text behind", length=29, keys=41, blocked=29),
    Case("mixed lengths", length=29, keys=41, blocked=29, padded=True),
    Case("grouped heads", key_heads=2, length=29, keys=29, padded=True),
    Case("one key head", key_heads=1),
    Case("causal", length=29, keys=29, causal=True),
    Case("causal, padded, text behind", length=29, keys=33, blocked=29, causal=True, padded=True),
    Case("head dim 24, values 40", dim=24, value_dim=40, length=29, keys=29),
    Case("other scale", scale=0.7),
    Case("strided", contiguous=False, length=29, keys=29),
    Case("blocks of 7", block=7, length=29, keys=29),
]
