"""Cosine between the outputs of a quantized model and its float twin."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.metrics.comparison import MeanComparison, at_least_single, require_same_shape


def cosine_fidelity(quantized: Tensor, reference: Tensor) -> Tensor:
    """Mean cosine of the samples of a batch (N, ...); see :class:`CosineFidelity`.

    Args:
        quantized: what the quantized model returns, one sample per row.
        reference: what its float twin returns, in the same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> cosine_fidelity(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [1.0, 1.0]]))
        tensor(0.8536, dtype=torch.float64)
    """
    return _cosines(quantized, reference).mean()


class CosineFidelity(MeanComparison):
    r"""Mean cosine between the outputs of the two models, sample by sample.

    .. math:: \frac{1}{N} \sum_{n=1}^N \frac{\langle x_n, r_n \rangle}{\|x_n\| \, \|r_n\|}

    where :math:`r_n` is the flattened output of the float model for sample :math:`n` and :math:`x_n` that of the
    quantized one. It does not see a common factor, unlike :class:`~lightning_quant.metrics.SQNR`. Two outputs that are
    zero agree (1); a zero against anything else does not (0).

    As input to ``forward`` and ``update`` the metric accepts:

    - ``quantized``: outputs of the quantized model, (N, ...)
    - ``reference``: outputs of its float twin, (N, ...)

    As output of ``forward`` and ``compute`` it returns a float64 scalar.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``update``, if the shapes differ.

    Example:
        >>> metric = CosineFidelity()
        >>> metric.update(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [1.0, 1.0]]))
        >>> metric.compute()
        tensor(0.8536, dtype=torch.float64)
    """

    is_differentiable = True
    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def update(self, quantized: Tensor, reference: Tensor) -> None:
        """Add the cosines of one batch."""
        cosines = _cosines(quantized, reference)
        self.add(cosines.sum(), len(cosines))


def _cosines(quantized: Tensor, reference: Tensor) -> Tensor:
    """The cosine of each sample: (N, ...) -> (N,)."""
    require_same_shape(quantized, reference)
    x, r = (at_least_single(each).unsqueeze(-1).flatten(1) for each in (quantized, reference))
    xr, xx, rr = ((a * b).sum(1, dtype=torch.float64) for a, b in ((x, r), (x, x), (r, r)))
    norms = (xx * rr).sqrt()  # one root of the product: equal samples have a cosine of exactly 1
    return torch.where(norms == 0, (xx == rr).double(), xr / norms)
