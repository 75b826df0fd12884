"""How often a quantized model and its float twin choose the same class."""

from __future__ import annotations

from torch import Tensor

from lightning_quant.metrics.comparison import MeanComparison, class_indices, require_same_shape, share


def top_one_agreement(quantized: Tensor, reference: Tensor) -> Tensor:
    """Share of predictions that are equal; see :class:`TopOneAgreement`.

    Args:
        quantized: class scores of the quantized model, (..., C).
        reference: class scores of its float twin, in the same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]])
        >>> top_one_agreement(scores, torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.7, 0.3]]))
        tensor(0.6667, dtype=torch.float64)
    """
    return share(*_agreeing(quantized, reference))


class TopOneAgreement(MeanComparison):
    r"""Share of predictions on which the two models agree; it needs no labels.

    .. math:: \frac{1}{N} \sum_{n=1}^N 1[\arg\max_c x_{nc} = \arg\max_c r_{nc}]

    where :math:`r_n` are the class scores of the float model for prediction :math:`n` (an image, a token) and
    :math:`x_n` those of the quantized one.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``quantized``: class scores of the quantized model, (..., C); integers are taken as class indices, (...)
    - ``reference``: the same of its float twin

    As output of ``forward`` and ``compute`` it returns a float64 scalar.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``update``, if the shapes differ.

    Example:
        >>> metric = TopOneAgreement()
        >>> scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]])
        >>> metric.update(scores, torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.7, 0.3]]))
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(self, quantized: Tensor, reference: Tensor) -> None:
        """Count the agreements of one batch."""
        self.add(*_agreeing(quantized, reference))


def _agreeing(quantized: Tensor, reference: Tensor) -> tuple[Tensor, int]:
    """How many predictions agree, and out of how many."""
    require_same_shape(quantized, reference)
    equal = class_indices(quantized) == class_indices(reference)
    return equal.sum(), equal.numel()
