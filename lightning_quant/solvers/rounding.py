"""Learn how a weight is rounded: up or down (AdaRound), with the step size too (Genie), or by moving the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_quant.quantizers import Quantizer, UniformQuantizer, levels, straight_through, to_steps

__all__ = ["ROUNDINGS", "FreeRounding", "JointRounding", "SoftRounding", "TrainedWeight", "WeightRounding"]

# h stretches the sigmoid so that it reaches 0 and 1 at finite values.
LOWER, UPPER = -0.1, 1.1
TINY = torch.finfo(torch.float32).tiny


class WeightRounding(nn.Module):
    """A trainable stand-in for one weight and its quantizer.

    Args:
        quantizer: the calibrated quantizer of the weight; left alone until :meth:`harden`.
        weight: the float weight, output channels first.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        if not quantizer.calibrated or quantizer.scheme.dynamic:
            raise ValueError(f"{quantizer!r} has no scale to round with: calibrate it first")
        self.shape = weight.shape

    def weight(self) -> Tensor:
        """The weight to compute with now, with gradients."""
        raise NotImplementedError

    def penalty(self, sharpness: float) -> Tensor:
        """What drives the rounding to a decision; 0 where there is none to take."""
        return torch.zeros(())

    def harden(self, quantizer: Quantizer) -> None:
        """Decide, and leave the codes in the quantizer."""
        raise NotImplementedError

    def groups(self, rounding_lr: float, scale_lr: float) -> list[dict[str, object]]:
        """The Parameters with their learning rates, as an optimizer takes them."""
        return [{"params": list(self.parameters()), "lr": rounding_lr, "decay": False}]

    def _as_weight(self, rows: Tensor) -> Tensor:
        """Back to the layout of the weight from (scales, elements), without what fills up the last group of a row."""
        channels = self.shape[0]
        return rows.reshape(channels, -1)[:, : math.prod(self.shape[1:])].reshape(self.shape)


class SoftRounding(WeightRounding):
    r"""AdaRound: every weight lies between two values of the format, and learns which of them to take.

    .. math::
        \hat W = W_\downarrow + h(V) \, (W_\uparrow - W_\downarrow), \qquad
        h(V) = \text{clamp}(1.2 \, \sigma(V) - 0.1, \, 0, \, 1)

    :math:`V` starts where :math:`\hat W = W`; the penalty :math:`\sum 1 - |2 h(V) - 1|^\beta` drives it to a decision,
    and in the end :math:`V \ge 0` rounds up. On a uniform grid :math:`W_\downarrow = s \lfloor W / s \rfloor`; any
    format has such neighbours. A weight outside the range has the end of the grid for both, and nothing to learn.

    References: Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization*, ICML 2020.

    Example:
        >>> quantizer, weight = UniformQuantizer("int2_sym", axis=0), torch.tensor([[0.3, -0.8, 5.0]])
        >>> quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
        >>> rounding = SoftRounding(quantizer, weight)
        >>> rounding.weight().detach()  # as the float weight, within the range
        tensor([[ 0.3000, -0.8000,  1.0000]])
        >>> _ = rounding.choice.data.fill_(9.0)
        >>> rounding.harden(quantizer)
        >>> quantizer(weight)
        tensor([[1., 0., 1.]])
    """

    scale: Tensor
    low: Tensor
    gap: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        with torch.no_grad():
            marks = levels(quantizer).to(weight.device)
            place = quantizer.rows(to_steps(quantizer, weight.detach().float()))  # (scales, elements that share one)
            below = torch.searchsorted(marks, place.contiguous(), right=True) - 1
            above = (below + 1).clamp(0, len(marks) - 1)
            low, high = marks[below.clamp(0, len(marks) - 1)], marks[above]
            gap = high - low
            rest = torch.where(gap > 0, (place - low) / gap.clamp(min=1e-9), 0.0).clamp(0, 1)
            choice = -((UPPER - LOWER) / (rest - LOWER) - 1).log()
        self.register_buffer("scale", quantizer.row_state()[0])
        self.register_buffer("low", low - _zero_point(quantizer))  # in steps of the scale
        self.register_buffer("gap", gap)
        self.choice = nn.Parameter(choice)

    def share(self) -> Tensor:
        """How far up each weight is rounded, h(V): 0 is down, 1 is up."""
        return (torch.sigmoid(self.choice) * (UPPER - LOWER) + LOWER).clamp(0, 1)

    def weight(self) -> Tensor:
        """Between the neighbours."""
        return self._as_weight((self.low + self.share() * self.gap) * self.scale)

    def penalty(self, sharpness: float) -> Tensor:
        """How undecided the weights are, summed."""
        undecided = 1 - (2 * self.share() - 1).abs().pow(sharpness)
        return (undecided * (self.gap > 0)).sum()

    @torch.no_grad()
    def harden(self, quantizer: Quantizer) -> None:
        """Round up where ``V >= 0``, and see that the codes are what was computed with in the limit."""
        if not bool(self.choice.isfinite().all()):
            raise ValueError("the rounding has diverged (NaN); lower learning_rate=")
        limit = self._as_weight((self.low + (self.choice >= 0) * self.gap) * quantizer.row_state()[0])
        quantizer.solve(quantizer.encode(limit))
        # quantizer.scale, not ours: it may have been learned too, and what counts is what the quantizer gives back
        if not torch.allclose(quantizer.rounded(limit), limit, rtol=1e-5, atol=0):
            raise RuntimeError(f"{quantizer!r} does not hold the rounded weight; please report this")


class JointRounding(SoftRounding):
    r"""Genie's: the step size is learned together with the rounding, while the integers below stay what they are.

    .. math:: \hat W = s \, (B + h(V)), \qquad B = \lfloor W / s_0 \rfloor \text{ constant}

    so that the gradient of :math:`s` is the integer itself.

    References: Jeon et al., *Genie: Show Me the Data for Quantization*, CVPR 2023.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        _refuse_shared_rows(quantizer, "joint")
        scale = self.scale
        del self.scale
        self.scale = nn.Parameter(scale.clone())

    def groups(self, rounding_lr: float, scale_lr: float) -> list[dict[str, object]]:
        """The step size learns at the rate of scales."""
        return [
            {"params": [self.choice], "lr": rounding_lr, "decay": False},
            {"params": [self.scale], "lr": scale_lr, "decay": True},
        ]

    @torch.no_grad()
    def harden(self, quantizer: Quantizer) -> None:
        """Take the learned step size over, then round."""
        quantizer.scale = self.scale.detach().abs().clamp(min=TINY).reshape(quantizer.scale.shape)
        super().harden(quantizer)


class TrainedWeight(WeightRounding):
    """The float weight itself is trained through the rounding, and rounded to the nearest in the end."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        self.quantizer = (quantizer,)  # not a child: it belongs to the layer
        self.trained = nn.Parameter(weight.detach().clone().float())

    def weight(self) -> Tensor:
        """To the nearest, with the gradient passed straight through."""
        return self.quantizer[0].rounded(self.trained)

    @torch.no_grad()
    def harden(self, quantizer: Quantizer) -> None:
        """To the nearest."""
        if not bool(self.trained.isfinite().all()):
            raise ValueError("the weight has diverged (NaN); lower learning_rate=")
        quantizer.solve(quantizer.encode(self.trained))


class FreeRounding(WeightRounding):
    r"""AdaQuant's: the weight moves freely, and its scale and zero point with it; each is rounded to the nearest.

    .. math::
        \hat W = s \, (\text{clamp}(\lfloor W / s \rceil + z, \, q_{min}, \, q_{max}) - z)

    where z is rounded, and gradients pass straight through every rounding. A weight may move by more than one step, and
    nothing drives it to a decision. Its learning rate is in steps of the grid, so that it means the same whatever the
    size of weights.

    References: Hubara et al., *Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
    Programming*, 2020.

    Example:
        >>> quantizer, weight = UniformQuantizer("int4_sym_channel", axis=0), torch.tensor([[0.3, -0.8]])
        >>> quantizer.fit(weight)
        >>> rounding = FreeRounding(quantizer, weight)
        >>> torch.equal(rounding.weight(), quantizer(weight))
        True
        >>> rounding.weight().sum().backward()
        >>> rounding.trained.grad
        tensor([[1., 1.]])
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        if not isinstance(quantizer, UniformQuantizer):
            raise ValueError(f"{quantizer!r} has no zero point to move: rounding='free' takes formats like 'int4'")
        _refuse_shared_rows(quantizer, "free")
        self.ends = (quantizer.scheme.qmin, quantizer.scheme.qmax)
        self.quantizer = (quantizer,)  # not a child: it belongs to the layer
        self.trained = nn.Parameter(
            quantizer.rows(weight.detach().float()).clone()
        )  # (scales, elements that share one)
        self.scale = nn.Parameter(quantizer.scale.reshape(-1, 1).clone())
        zero_point = quantizer.zero_point.reshape(-1, 1).clone()
        self.zero_point = nn.Parameter(zero_point, requires_grad=not quantizer.scheme.symmetric)

    def weight(self) -> Tensor:
        """To the nearest, with the gradient passed straight through."""
        scale = straight_through(self.scale, self._positive())
        zero_point = straight_through(self.zero_point, self.zero_point.detach().round())
        steps = self.trained / scale
        codes = (straight_through(steps, steps.detach().round()) + zero_point).clamp(*self.ends)
        return self._as_weight((codes - zero_point) * scale)

    @torch.no_grad()
    def harden(self, quantizer: Quantizer) -> None:
        """Take scale and zero point over, then round to the nearest."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters()):
            raise ValueError("the weight has diverged (NaN); lower learning_rate=")
        quantizer.scale = self._positive().reshape(quantizer.scale.shape)
        assert isinstance(quantizer, UniformQuantizer)
        quantizer.zero_point = self.zero_point.detach().round().reshape(quantizer.zero_point.shape)
        quantizer.solve(quantizer.encode(self._as_weight(self.trained.detach())))

    def groups(self, rounding_lr: float, scale_lr: float) -> list[dict[str, object]]:
        """The weight learns in steps; a zero point is one already."""
        size = self.scale.detach().abs().mean().item()
        learned = [{"params": [self.trained], "lr": rounding_lr * size, "decay": True}]
        if scale_lr > 0:
            learned.append({"params": [self.scale], "lr": scale_lr, "decay": True})
            if self.zero_point.requires_grad:
                learned.append({"params": [self.zero_point], "lr": scale_lr / max(size, TINY), "decay": True})
        return learned

    def _positive(self) -> Tensor:
        return self.scale.detach().abs().clamp(min=TINY)


ROUNDINGS: dict[str, type[WeightRounding]] = {
    "adaround": SoftRounding,
    "joint": JointRounding,
    "weights": TrainedWeight,
    "free": FreeRounding,
}


def _refuse_shared_rows(quantizer: Quantizer, rounding: str) -> None:
    if len(quantizer.row_state()[0]) != quantizer.scale.numel():
        raise ValueError(
            f"{quantizer!r} has one scale for several rows of its weight, and rounding={rounding!r} would move them "
            f"apart: take rounding='adaround', or leave the weight in one piece with split=False"
        )


def _zero_point(quantizer: Quantizer) -> Tensor | float:
    return quantizer.row_state()[1] if isinstance(quantizer, UniformQuantizer) else 0.0
