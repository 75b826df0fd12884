"""Signal to quantization noise ratio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_quant.metrics.comparison import Comparison, at_least_single, require_same_shape


def sqnr(quantized: Tensor, reference: Tensor) -> Tensor:
    """Signal to quantization noise ratio in decibels over all elements; see :class:`SQNR`.

    Args:
        quantized: what the quantized model returns.
        reference: what its float twin returns, in the same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> sqnr(torch.tensor([1.1, 2.0]), torch.tensor([1.0, 2.0]))
        tensor(26.9897, dtype=torch.float64)
    """
    return _decibels(*_energies(quantized, reference))


class SQNR(Comparison):
    r"""Signal to quantization noise ratio in decibels.

    .. math:: \text{SQNR} = 10 \log_{10} \frac{\sum_i r_i^2}{\sum_i (r_i - x_i)^2}

    where :math:`r` is the output of the float model and :math:`x` that of the quantized one, both over all elements of
    all batches. 20 dB is an error of 10 % in root mean square, 40 dB of 1 %; each bit more is worth about 6 dB. It is
    infinite where the two are equal, and NaN before anything was seen.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``quantized``: outputs of the quantized model, any shape
    - ``reference``: outputs of its float twin, the same shape

    As output of ``forward`` and ``compute`` it returns a float64 scalar.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``update``, if the shapes differ.

    Example:
        >>> metric = SQNR()
        >>> metric.update(torch.tensor([1.1, 2.0]), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(26.9897, dtype=torch.float64)
        >>> metric(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]))
        tensor(inf, dtype=torch.float64)
        >>> metric.compute()
        tensor(34.7712, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True

    signal: Tensor
    noise: Tensor
    elements: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("signal", torch.float64)
        self.add_sum("noise", torch.float64)
        self.add_sum("elements", torch.int64)

    def update(self, quantized: Tensor, reference: Tensor) -> None:
        """Add the energies of one batch."""
        signal, noise, elements = _energies(quantized, reference)
        self.signal, self.noise, self.elements = self.signal + signal, self.noise + noise, self.elements + elements

    def compute(self) -> Tensor:
        """The ratio of the summed energies, in decibels."""
        return _decibels(self.signal, self.noise, self.elements)


def _energies(quantized: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, int]:
    """The energy of the signal, that of the noise, and over how many elements they were summed."""
    require_same_shape(quantized, reference)
    quantized, reference = at_least_single(quantized), at_least_single(reference)
    # torch needs three times as long for a sum in another dtype than for the conversion and the sum.
    noise = (reference - quantized).square().double().sum()
    return reference.square().double().sum(), noise, reference.numel()


def _decibels(signal: Tensor, noise: Tensor, elements: Tensor | int) -> Tensor:
    if elements == 0:
        return signal.new_tensor(float("nan"))
    return torch.where(noise == 0, float("inf"), 10 * (signal / noise).log10())
