"""First moments of what a layer reads beside the second ones, for methods that shift inputs."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from lightning_quant.calibration.hessians import Hessian
from lightning_quant.calibration.ranks import merge_across_ranks, sum_across_ranks

__all__ = ["Moments"]


class Moments(Hessian):
    r"""Sums up the inputs beside their second moments, :math:`H` and :math:`\sum x`, and keeps some for their median.

    Example:
        >>> layer, x, shift = nn.Linear(3, 1), torch.randn(50, 3), torch.randn(3)
        >>> moments = Moments.of(layer)
        >>> moments.add(x)
        >>> torch.allclose(moments.mean(), x.mean(0), atol=1e-6)
        True
    """

    SAMPLE = 4096  # tokens

    sums: Tensor
    sample: list[Tensor]

    @classmethod
    def of(cls, layer: nn.Module, diagonal: bool = False) -> Moments:
        """Empty ones for the inputs of a layer, where its weight is."""
        moments = super().of(layer, diagonal)
        assert isinstance(moments, Moments)
        moments.sums = torch.zeros(moments.features, dtype=torch.float64, device=moments.total.device)
        moments.sample = []
        return moments

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens; see :class:`~lightning_quant.calibration.Hessian`."""
        super().add(x, weights)
        rows = x.detach().float().reshape(-1, self.features)
        self.sums += rows.sum(0).to(self.sums)
        room = self.SAMPLE - sum(map(len, self.sample))
        self.sample.append(rows[: max(0, room)].clone())

    def reduce(self) -> None:
        """Bring the ranks' sums together."""
        super().reduce()
        self.sums = sum_across_ranks(self.sums)
        self.sample = [rows for ranks in merge_across_ranks(self.sample) for rows in ranks]

    def shifted(self, shift: Tensor) -> Moments:
        r"""What they are of :math:`x - \delta`, without groups of channels.

        >>> layer, x, shift = nn.Linear(3, 1), torch.randn(50, 3), torch.randn(3)
        >>> here, there = Moments.of(layer), Moments.of(layer)
        >>> here.add(x), there.add(x - shift)
        (None, None)
        >>> torch.allclose(here.shifted(shift).matrix(), there.matrix())
        True
        """
        found, shift = copy(self), shift.to(self.sums)
        if self.only_diagonal:
            change = shift * (self.tokens * shift - 2 * self.sums)
            found.total = (self.total + change).clamp(min=0)
        else:
            crossed = torch.outer(self.sums, shift)
            found.total = self.total + self.tokens * torch.outer(shift, shift) - crossed - crossed.T
        found.sums = self.sums - self.tokens * shift
        return found

    def mean(self) -> Tensor:
        """Of each input: (features,)."""
        return (self.sums / max(1, self.tokens)).float()

    def median(self) -> Tensor:
        """Of each input: (features,)."""
        return torch.cat([rows.to(self.sums.device) for rows in self.sample]).median(0).values
