"""A table of scales, one row for each step of a trajectory, that is trained: samples at all steps learn together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_quant.quantizers.base import straight_through
from lightning_quant.quantizers.steps import StepQuantizer
from lightning_quant.quantizers.uniform import TINY

__all__ = ["LearnedStepQuantizer"]


class LearnedStepQuantizer(StepQuantizer):
    r"""A :class:`StepQuantizer` whose table is a Parameter.

    .. math:: \hat x = s_g \, (\text{clamp}(\lfloor x / s_g \rceil + \lfloor z_g \rceil, \, q_{min}, \, q_{max})
              - \lfloor z_g \rceil)

    where :math:`g` is the row of a sample's step, and gradients pass straight through every rounding. A batch with
    samples at many steps trains as many rows at once.

    Args:
        table: a calibrated table; left alone.
        offset: whether the zero points are learned, too.

    Example:
        >>> from lightning_quant.quantizers import Steps
        >>> table = StepQuantizer("uint2_asym", -1, Steps([999, 0]))
        >>> table.freeze_rows(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.5]))
        >>> learned = LearnedStepQuantizer(table)
        >>> table.steps.enter([999, 0])
        >>> learned(torch.tensor([[1.2], [9.0]])).sum().backward()
        >>> learned.scale.grad  # 1 - 1.2, and 3
        tensor([-0.2000,  3.0000])
    """

    def __init__(self, table: StepQuantizer, offset: bool = False) -> None:
        super().__init__(table.scheme, table.axis, table.steps)
        scale, zero_point = table.scale.detach().clone(), table.get_buffer("zero_point").detach().clone()
        del self.scale, self.zero_point
        self.scale = nn.Parameter(scale)
        if offset and not self.scheme.symmetric:
            self.zero_point = nn.Parameter(zero_point)
        else:
            self.register_buffer("zero_point", zero_point)
        self.to(scale.device).train(table.training)

    def settled(self) -> StepQuantizer:
        """A plain table with the same rows, which is no longer learned."""
        plain = StepQuantizer(self.scheme, self.axis, self.steps)
        plain.to(self.scale.device).train(self.training)
        plain._store("scale", self.scale.detach().abs().clamp(min=TINY))
        plain._store("zero_point", self.zero_point.detach().round())
        return plain

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Turns scales that an optimizer pushed below 0 around; to be called after each optimizer step."""
        self.scale.abs_().clamp_(min=TINY)

    def state_for(self, view: Tensor) -> tuple[Tensor, ...]:
        """The rows of the samples' steps, with gradients."""
        scale, zero_point = super().state_for(view)
        scale = straight_through(scale, scale.detach().clamp(min=TINY))
        return scale, straight_through(zero_point, zero_point.detach().round())
