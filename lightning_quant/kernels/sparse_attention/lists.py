"""The kept blocks as lists of their numbers: what drives every block-sparse kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLists:
    """The kept key blocks of each query block, ascending; entries behind ``count`` mean nothing.

    Args:
        index: (B, H, N, longest) int32.
        count: (B, H, N) int32.
    """

    index: Tensor
    count: Tensor

    @classmethod
    def of(cls, kept: Tensor) -> BlockLists:
        """From a mask (B, H, N, M) bool.

        >>> lists = BlockLists.of(torch.tensor([[[[True, False, True], [False, True, False]]]]))
        >>> lists.index.tolist(), lists.count.tolist()
        ([[[[0, 2], [1, 0]]]], [[[2, 1]]])
        """
        count = kept.sum(-1, dtype=torch.int32)
        longest = int(count.max()) if count.numel() else 0
        index = kept.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)[..., :longest]
        return cls(index.to(torch.int32), count)

    def mask(self, blocks: int) -> Tensor:
        """Back to (B, H, N, M) bool."""
        listed = torch.arange(self.index.size(-1), device=self.index.device) < self.count.unsqueeze(-1)
        kept = torch.zeros(*self.count.shape, blocks + 1, dtype=torch.bool, device=self.index.device)
        # What is not listed goes to a block of its own, which is cut off.
        return kept.scatter_(-1, self.index.long().masked_fill(~listed, blocks), True)[..., :blocks]

    def finer(self, parts: int) -> BlockLists:
        """The same keys in blocks that are ``parts`` times smaller (the rows stay as they are)."""
        within = torch.arange(parts, dtype=torch.int32, device=self.index.device)
        return BlockLists((self.index.unsqueeze(-1) * parts + within).flatten(-2), self.count * parts)
