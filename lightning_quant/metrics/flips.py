"""Predictions that quantization broke, and predictions that it mended."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_quant.metrics.comparison import Comparison, class_indices, require_same_shape, share


class FlipCounts(NamedTuple):
    """What two classifiers got right, in numbers of predictions.

    Args:
        negative: right by the float model, wrong by the quantized one.
        positive: wrong by the float model, right by the quantized one.
        reference_right: right by the float model.
        predictions: all of them.
    """

    negative: Tensor
    positive: Tensor
    reference_right: Tensor
    predictions: Tensor | int

    def negative_rate(self) -> Tensor:
        """The share of negative flips."""
        return share(self.negative, self.predictions)

    def relative_negative_rate(self) -> Tensor:
        """The share of negative flips over what independent errors would give; 0 where those give none."""
        quantized_wrong = self.predictions - self.reference_right + self.negative - self.positive
        independent = share(self.reference_right, self.predictions) * share(quantized_wrong, self.predictions)
        return torch.where(independent == 0, 0.0, self.negative_rate() / independent)

    def positive_rate(self) -> Tensor:
        """The share of positive flips."""
        return share(self.positive, self.predictions)


def count_flips(quantized: Tensor, reference: Tensor, target: Tensor) -> FlipCounts:
    """Count the predictions that turned wrong and those that turned right.

    Args:
        quantized: class scores of the quantized model, (..., C), or class indices (...) as integers.
        reference: the same of its float twin.
        target: the true class indices, (...), or soft labels, (..., C), whose largest counts.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> count_flips(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        FlipCounts(negative=tensor(1), positive=tensor(1), reference_right=tensor(3), predictions=4)
    """
    require_same_shape(quantized, reference)
    new, old, truth = class_indices(quantized), class_indices(reference), class_indices(target)
    if new.shape != truth.shape:
        raise ValueError(
            f"an output of shape {tuple(quantized.shape)} with the classes on its last axis makes "
            f"{tuple(new.shape)} predictions, but the target has shape {tuple(target.shape)}"
        )
    new_right, old_right = new == truth, old == truth
    return FlipCounts(
        (old_right & ~new_right).sum(), (~old_right & new_right).sum(), old_right.sum(), old_right.numel()
    )


def negative_flip_rate(quantized: Tensor, reference: Tensor, target: Tensor, relative: bool = False) -> Tensor:
    """Share of predictions that only the float model has right; see :class:`NegativeFlipRate`.

    Example:
        >>> old, new = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1])
        >>> negative_flip_rate(new, old, target=torch.tensor([0, 0, 1, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    counts = count_flips(quantized, reference, target)
    return counts.relative_negative_rate() if relative else counts.negative_rate()


def positive_flip_rate(quantized: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Share of predictions that only the quantized model has right; see :class:`PositiveFlipRate`.

    Example:
        >>> old, new = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1])
        >>> positive_flip_rate(new, old, target=torch.tensor([0, 0, 1, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    return count_flips(quantized, reference, target).positive_rate()


class _Flips(Comparison):
    """The counts behind both rates; in a ``MetricCollection`` they are kept only once."""

    is_differentiable = False

    negative: Tensor
    positive: Tensor
    reference_right: Tensor
    predictions: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in FlipCounts._fields:
            self.add_sum(name, torch.int64)

    def update(self, quantized: Tensor, reference: Tensor, target: Tensor) -> None:
        """Count the flips of one batch."""
        for name, count in count_flips(quantized, reference, target)._asdict().items():
            setattr(self, name, getattr(self, name) + count)

    def counts(self) -> FlipCounts:
        """What was counted so far, on this rank."""
        return FlipCounts(self.negative, self.positive, self.reference_right, self.predictions)


class NegativeFlipRate(_Flips):
    r"""Share of predictions that the float model has right and the quantized model has wrong.

    .. math::
        \text{NFR} = \frac{1}{N} \#\{n : o_n = y_n, \, q_n \ne y_n\}, \qquad
        \text{RNFR} = \frac{\text{NFR}}{(1 - \text{ER}_o) \, \text{ER}_q}

    where :math:`y` are the labels, :math:`o` the predictions of the float model and :math:`q` those of the quantized
    one, and :math:`\text{ER}` is an error rate. A quantized model of the same accuracy may still fail on what used to
    work: with :class:`PositiveFlipRate`, :math:`\text{Acc}_q = \text{Acc}_o - \text{NFR} + \text{PFR}`. The relative
    rate is 1 where the errors of the two models are independent, and 0 where independent errors would not flip any.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``quantized``: class scores of the quantized model, (..., C); integers are taken as class indices, (...)
    - ``reference``: the same of its float twin
    - ``target``: the true class indices, (...)

    As output of ``forward`` and ``compute`` it returns a float64 scalar.

    Reference: Yan et al., *Positive-Congruent Training: Towards Regression-Free Model Updates*, CVPR 2021.

    Args:
        relative: whether to compute RNFR instead of NFR.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``update``, if the shapes do not match.

    Example:
        >>> old, new, target = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
        >>> metric, relative = NegativeFlipRate(), NegativeFlipRate(relative=True)
        >>> metric.update(new, old, target)
        >>> metric.compute(), relative(new, old, target)
        (tensor(0.2500, dtype=torch.float64), tensor(1.3333, dtype=torch.float64))
    """

    higher_is_better = False
    plot_lower_bound = 0.0  # and no upper bound: the relative rate can exceed 1

    def __init__(self, relative: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.relative = relative

    def compute(self) -> Tensor:
        """The rate over all predictions."""
        return self.counts().relative_negative_rate() if self.relative else self.counts().negative_rate()


class PositiveFlipRate(_Flips):
    r"""Share of predictions that the float model has wrong and the quantized model has right.

    .. math:: \text{PFR} = \frac{1}{N} \#\{n : o_n \ne y_n, \, q_n = y_n\}

    with the symbols of :class:`NegativeFlipRate`, which takes the same input.

    As output of ``forward`` and ``compute`` it returns a float64 scalar.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in ``update``, if the shapes do not match.

    Example:
        >>> metric = PositiveFlipRate()
        >>> metric.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def compute(self) -> Tensor:
        """The rate over all predictions."""
        return self.counts().positive_rate()
