"""A low-rank branch beside a quantized weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quant.quantizers import OwnPrecision

__all__ = ["LowRank"]


class LowRank(OwnPrecision):
    r"""Adds a product of two thin matrices to a weight.

    .. math:: \hat W' = \hat W + A B, \qquad y = x \hat W'^\top = x \hat W^\top + (x B^\top) A^\top

    Here the sum is made of the weights, which computes the same: the branch reads the input that the quantized weight
    does, rounded where that is. The state is buffers, empty until they are known, so a float checkpoint lacks nothing.

    Args:
        rank: inner width of the product.

    Attributes:
        up: A, (out, rank).
        down: B, (rank, in).
        observer: While set, ``forward(x)`` returns ``observer(x)``.

    Example:
        >>> branch = LowRank(1)
        >>> branch.set(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 0.25]]))
        >>> branch(torch.zeros(2, 2))
        tensor([[0.5000, 0.2500],
                [1.0000, 0.5000]])
    """

    up: Tensor
    down: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.observer: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("up", torch.empty(0))
        self.register_buffer("down", torch.empty(0))

    @property
    def calibrated(self) -> bool:
        """Whether the product is known."""
        return self.up.numel() > 0

    def set(self, up: Tensor, down: Tensor) -> None:
        """Take the two matrices, in the dtype in which they are to be kept."""
        self.up, self.down = up.detach(), down.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """Returns a weight, output channels first, with the product added, or as it is while that is unknown."""
        if self.observer is not None:
            return self.observer(rows)
        if not self.calibrated:
            return rows
        return rows + (self.up.float() @ self.down.float()).reshape(rows.shape).to(rows.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """The stored shapes and dtypes say what is known."""
        for name in ("up", "down"):
            stored = state_dict.get(f"{prefix}{name}")
            blank = self.up.new_empty(0) if stored is None else torch.empty_like(stored, device=self.up.device)
            setattr(self, name, blank)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if not self.calibrated:
            missing[:] = [key for key in missing if key not in (f"{prefix}up", f"{prefix}down")]

    def extra_repr(self) -> str:
        """The rank."""
        return f"rank={self.rank}{'' if self.calibrated else ', unknown'}"
