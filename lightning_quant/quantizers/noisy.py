"""A uniform grid behind a fixed noise: what is rounded is the tensor plus the noise, which is then taken off again."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.uniform import UniformQuantizer

__all__ = ["NoisyQuantizer"]


class NoisyQuantizer(UniformQuantizer):
    r"""Integers times a scale, at which each channel arrives with an offset of its own that never changes.

    .. math:: \hat x = Q(x + N) - N

    where :math:`Q` is the :class:`UniformQuantizer` and :math:`N` the noise. The codes are those of :math:`x + N`; a
    kernel leaves :math:`-N` to the bias of the layer behind, see :func:`~lightning_quant.solvers.denoising_bias`.
    A range found anew, by ``fit`` or ``freeze``, begins without noise.

    Args:
        scheme: A static ``intN`` or ``uintN`` format; see :class:`Scheme`.
        axis: The channel axis by role, which has to be the last one.

    Raises:
        ValueError: If the format is dynamic or has groups, or the channels are not the last axis.

    Example:
        >>> quantizer = NoisyQuantizer("uint4_asym", axis=-1)
        >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(15.0))
        >>> quantizer.set_state(quantizer.scale, quantizer.zero_point, torch.tensor([0.0, 0.25]))
        >>> quantizer(torch.tensor([[3.3, 3.3]]))
        tensor([[3.0000, 3.7500]])
    """

    state_names: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "noise")

    noise: Tensor

    def __init__(self, scheme: Scheme | str, axis: int | None = -1) -> None:
        super().__init__(scheme, axis)
        if self.scheme.dynamic or self.scheme.granularity == "group" or axis != -1:
            raise ValueError(
                f'"{self.scheme}" with axis={axis} takes no noise: it needs a static scale, per tensor or per channel, '
                f"and channels on the last axis (axis=-1)."
            )

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and noise."""
        return self.scale, self.zero_point, self.noise

    @torch.no_grad()
    def set_state(self, scale: Tensor, zero_point: Tensor, noise: Tensor) -> None:
        """Sets all three of a calibrated quantizer.

        Args:
            scale: Positive, in its present shape.
            zero_point: In its present shape.
            noise: An offset for each channel, ``(channels,)``, or one for all, ``()``.

        Raises:
            ValueError: If the quantizer is uncalibrated, or a number is not finite.
        """
        self._require_stored_state("set_state")
        for name, value in zip(self.state_names, (scale, zero_point, noise), strict=True):
            if not bool(value.isfinite().all()):
                raise ValueError(f"{self!r} takes a finite {name}, got {value}.")
            self._store(name, value.detach().to(self.scale))

    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Returns scale and zero point, and no noise."""
        scale, zero_point = super().state_from_range(lo, hi)
        return scale, zero_point, torch.zeros_like(scale)

    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns ``x`` on the grid of its channel."""
        scale, zero_point, noise = state
        return super().simulate(x + noise, scale, zero_point) - noise

    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """Returns the integers of ``x`` plus the noise."""
        scale, zero_point, noise = state
        return super().to_codes(x + noise, scale, zero_point)

    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """Returns the floats of codes, the noise taken off."""
        scale, zero_point, noise = state
        return super().from_codes(codes, scale, zero_point) - noise
