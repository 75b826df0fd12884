"""A uniform grid bent by a tangent: finer at one end of [0, d] than at the other, and exact at both."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.base import Quantizer, straight_through
from lightning_quant.quantizers.uniform import TINY

__all__ = ["ArctangentQuantizer", "TangentQuantizer", "bend", "unbend"]

DEFAULT_CURVATURE = 1.0
LARGEST_CURVATURE = 1.5  # just below pi / 2, where the tangent is infinite


def bend(x: Tensor, curvature: Tensor) -> Tensor:
    r"""Returns :math:`\tan(\theta x) / \tan \theta`, which takes [0, 1] to [0, 1] and is below x in between.

    Args:
        x: Numbers from 0 to 1.
        curvature: :math:`\theta`, above 0 and below :math:`\pi / 2`.

    Example:
        >>> bend(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(1.0))
        tensor([0.0000, 0.3508, 1.0000])
    """
    return torch.tan(x * curvature) / torch.tan(curvature)


def unbend(x: Tensor, curvature: Tensor) -> Tensor:
    r"""Returns :math:`\arctan(x \tan \theta) / \theta`, the inverse of :func:`bend`.

    Args:
        x: Numbers from 0 to 1.
        curvature: :math:`\theta`, above 0 and below :math:`\pi / 2`.

    Example:
        >>> unbend(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(1.0))
        tensor([0.0000, 0.6616, 1.0000])
    """
    return torch.atan(x * torch.tan(curvature)) / curvature


class TangentQuantizer(Quantizer):
    r"""TanQ, levels that grow like a tangent (``tan_N``): fine near 0 and coarse near the largest, without a gap at 0.

    .. math::
        q = \left\lfloor \frac{n}{\theta} \arctan\left(\frac{x}{d} \tan\theta\right) \right\rceil, \qquad
        \hat x = d \, \frac{\tan(\theta q / n)}{\tan\theta}, \qquad n = 2^{bits} - 1

    where :math:`d` is the largest level and :math:`\theta` the curvature: near 0 the grid is uniform, towards
    :math:`\pi / 2` it becomes a power law. What is above d becomes d, what is below 0 becomes 0, and code 0 is exactly
    0. The rounding is to the nearest in the bent domain. A kernel looks the :math:`2^{bits}` levels up in a table,
    ``quantizer.decode(torch.arange(2**bits))``. Gradients pass straight through between 0 and d.

    The name and the aim are those of DopQ-ViT; the formula is reconstructed from its abstract.

    Args:
        scheme: A ``tan_N`` format; see :class:`Scheme`.
        axis: Not used, as there is one scale per tensor.

    Example:
        >>> quantizer = TangentQuantizer("tan_2")
        >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(1.0))
        >>> quantizer.decode(torch.arange(4))
        tensor([0.0000, 0.2223, 0.5052, 1.0000])
        >>> quantizer(torch.tensor([0.1, 0.3, 0.9]))
        tensor([0.0000, 0.2223, 1.0000])
    """

    kind: ClassVar[str] = "tan"
    state_names: ClassVar[tuple[str, ...]] = ("scale", "curvature")

    curvature: Tensor

    @torch.no_grad()
    def curve(self, curvature: float) -> None:
        """Sets how much the grid is bent; a range found anew, by ``fit`` or ``freeze``, begins with a curvature of 1.

        Args:
            curvature: Above 0 and up to 1.5.

        Raises:
            ValueError: If the quantizer is uncalibrated or dynamic, or the number is out of range.
        """
        self._require_stored_state("curve")
        if not 0 < curvature <= LARGEST_CURVATURE:
            raise ValueError(f"a curvature is above 0 and up to {LARGEST_CURVATURE}, got {curvature}.")
        self.curvature = torch.full_like(self.scale, curvature)

    @staticmethod
    def to_ruler(x: Tensor, curvature: Tensor) -> Tensor:
        """Where ``x`` in [0, 1] lies between the first level, at 0, and the last one, at 1."""
        return unbend(x, curvature)

    @staticmethod
    def from_ruler(x: Tensor, curvature: Tensor) -> Tensor:
        """The inverse of :meth:`to_ruler`."""
        return bend(x, curvature)

    @property
    def last(self) -> int:
        """The code of the largest level."""
        return int(2**self.scheme.bits - 1)

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the upper end as the scale, and the usual curvature."""
        return hi.clamp(min=TINY), torch.full_like(hi, DEFAULT_CURVATURE)

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns ``x`` on the levels."""
        scale, curvature = (tensor.to(x.dtype) for tensor in state)
        ratio = (x * scale.reciprocal()).clamp(0, 1)
        rounded = self._level(self._code(ratio.detach(), curvature), curvature)
        if torch.is_grad_enabled() and ratio.requires_grad:
            rounded = straight_through(ratio, rounded)
        return rounded * scale

    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns codes from 0 to ``2**bits - 1``."""
        scale, curvature = state
        return self._code((x * scale.reciprocal()).clamp(0, 1), curvature).to(torch.int32)

    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """Returns the levels of codes."""
        scale, curvature = state
        return self._level(codes.to(scale.dtype), curvature) * scale

    def _code(self, ratio: Tensor, curvature: Tensor) -> Tensor:
        return self.to_ruler(ratio, curvature).mul(self.last).round()

    def _level(self, code: Tensor, curvature: Tensor) -> Tensor:
        return self.from_ruler(code / self.last, curvature)


class ArctangentQuantizer(TangentQuantizer):
    r"""The mirror image of :class:`TangentQuantizer` (``atan_N``): coarse near 0 and fine near the largest level.

    .. math::
        q = \left\lfloor n \, \frac{\tan(\theta x / d)}{\tan\theta} \right\rceil, \qquad
        \hat x = \frac{d}{\theta} \arctan\left(\frac{q}{n} \tan\theta\right)

    Args:
        scheme: An ``atan_N`` format; see :class:`Scheme`.
        axis: Not used, as there is one scale per tensor.

    Example:
        >>> quantizer = ArctangentQuantizer("atan_2")
        >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(1.0))
        >>> quantizer.decode(torch.arange(4))
        tensor([0.0000, 0.4788, 0.8042, 1.0000])
    """

    kind: ClassVar[str] = "atan"

    @staticmethod
    def to_ruler(x: Tensor, curvature: Tensor) -> Tensor:
        """Where ``x`` in [0, 1] lies between the first level, at 0, and the last one, at 1."""
        return bend(x, curvature)

    @staticmethod
    def from_ruler(x: Tensor, curvature: Tensor) -> Tensor:
        """The inverse of :meth:`to_ruler`."""
        return unbend(x, curvature)
