"""What the metrics here share: they compare what a quantized model and its float twin answer to the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Comparison(Metric):
    """A metric of two models' outputs, or of one and labels. Its states are sums: batches and ranks add up."""

    full_state_update = False

    def add_sum(self, name: str, dtype: torch.dtype) -> None:
        """Add a scalar state that starts at zero and is summed over ranks."""
        self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them; by default what ``compute`` returns.

        Args:
            val: a result of ``forward`` or ``compute``, or several.
            ax: a matplotlib axis to draw on.

        Returns:
            the figure and the axis.
        """
        return self._plot(val, ax)


class MeanComparison(Comparison):
    """The mean of something over all samples, predictions or tokens; a subclass adds what one batch has of it."""

    summed: Tensor
    counted: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("summed", torch.float64)
        self.add_sum("counted", torch.int64)

    def add(self, part: Tensor, count: int) -> None:
        """Add a sum, and of how many it is."""
        self.summed, self.counted = self.summed + part, self.counted + count

    def compute(self) -> Tensor:
        """The mean over everything that was seen."""
        return share(self.summed, self.counted)


def require_same_shape(quantized: Tensor, reference: Tensor) -> None:
    """Refuse to let outputs of different shapes broadcast against each other.

    >>> require_same_shape(torch.ones(2, 3), torch.ones(3))
    Traceback (most recent call last):
        ...
    ValueError: the quantized output has shape (2, 3), its reference (3,): both must come from the same batch
    """
    if quantized.shape != reference.shape:
        raise ValueError(
            f"the quantized output has shape {tuple(quantized.shape)}, its reference {tuple(reference.shape)}: "
            f"both must come from the same batch"
        )


def at_least_single(x: Tensor) -> Tensor:
    """Half precision and integers as float32, float64 as it is: squares of float16 overflow at 256."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def class_indices(x: Tensor) -> Tensor:
    """Which class scores (..., C) favour, (...); integers are class indices already.

    >>> class_indices(torch.tensor([[0.1, 0.9], [0.8, 0.2]])), class_indices(torch.tensor([1, 0]))
    (tensor([1, 0]), tensor([1, 0]))
    """
    return x.argmax(-1) if x.is_floating_point() else x


def share(part: Tensor | int, whole: Tensor | int) -> Tensor:
    """``part / whole`` in float64; NaN of nothing."""
    return torch.as_tensor(part, dtype=torch.float64) / whole
