"""Weights of some input channels multiplied and these channels divided, in front of what quantizes both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_quant.quantizers import OwnPrecision


class Dilation(OwnPrecision):
    r"""One number for each input channel of a layer, which leaves the layer's function alone.

    .. math:: W x = (W \, \text{diag}(s)) \, (\text{diag}(s)^{-1} x)

    The layer quantizes :math:`W \, \text{diag}(s)` and :math:`\text{diag}(s)^{-1} x`; its Parameters stay as they are.

    Args:
        channels: how many input channels there are.

    >>> dilation = Dilation(2)
    >>> dilation.factor.copy_(torch.tensor([1.0, 4.0]))
    tensor([1., 4.])
    >>> dilation.widen(torch.ones(1, 2)), dilation.narrow(torch.ones(3, 2), -1)[0]
    (tensor([[1., 4.]]), tensor([1.0000, 0.2500]))
    """

    factor: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(channels))

    def widen(self, rows: Tensor) -> Tensor:
        """Weights (out, in, ...), multiplied."""
        return rows * self._along(rows, 1)

    def narrow(self, x: Tensor, axis: int) -> Tensor:
        """Inputs with channels along an axis, divided."""
        return x / self._along(x, axis)

    def _along(self, x: Tensor, axis: int) -> Tensor:
        shape = [1] * x.dim()
        shape[axis] = -1
        return self.factor.to(x.dtype).view(shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}factor", torch.ones_like(self.factor))  # a float checkpoint dilates nothing
        super()._load_from_state_dict(state_dict, prefix, *rest)
