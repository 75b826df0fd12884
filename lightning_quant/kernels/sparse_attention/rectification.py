"""What makes block-sparse attention follow the full attention map: one factor and one row per block of queries."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor


class Rectification(NamedTuple):
    """``output = factor * sparse output + addend``, the same for all rows of a query block.

    Args:
        factor: (B, H, N).
        addend: (B, H, N, d).
    """

    factor: Tensor
    addend: Tensor

    def rows(self, block: int, length: int) -> Rectification:
        """The same per query: (B, H, L, 1) and (B, H, L, d)."""
        factor, addend = self.factor.unsqueeze(-1), self.addend
        return Rectification(*(x.repeat_interleave(block, 2)[:, :, :length] for x in (factor, addend)))


def rectify(
    blocks: Tensor,
    text: Tensor | None,
    kept: Tensor,
    worth_it: Tensor,
    values: Tensor,
    parts: Collection[str] = ("critical", "noncritical"),
) -> Rectification:
    r"""Give the kept blocks the weight they have in truth, and the dropped ones their mean value.

    .. math:: R_i = \sum_{j \in C_i} P_{ij} + P_{i,text} \qquad A_i = \sum_{j \notin C_i} P_{ij} \bar v_j

    :math:`C_i` are the kept blocks and those dropped ones whose mean cannot be trusted, which leave their mass with the
    kept ones. :math:`R_i + \sum_{j \notin C_i} P_{ij} = 1`: with both parts the weights of every row sum to one.

    Args:
        blocks: implicit attention to the key blocks, (B, H, N, M).
        text: implicit attention to the text keys, (B, H, N), which are always kept.
        kept: the kept blocks, (B, H, N, M) bool.
        worth_it: where pooling can be trusted, (B, H, N, M) bool.
        values: means of the value blocks, (B, H, M, d).
        parts: ``"critical"`` for the factor, ``"noncritical"`` for the addend; one alone is for comparison.
    """
    pooled = blocks.masked_fill(kept | ~worth_it, 0.0)
    factor = (blocks - pooled).sum(-1)
    if text is not None:
        factor = factor + text
    addend = pooled @ values
    return Rectification(
        factor if "critical" in parts else factor.new_ones(()).expand_as(factor),
        addend if "noncritical" in parts else addend.new_zeros(()).expand_as(addend),
    )
