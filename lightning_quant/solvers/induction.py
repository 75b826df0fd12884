"""Learned importance of the inputs of a layer, for the choice of what to prune (Sparsity Induction, 2026)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_quant.quantizers import Pattern, straight_through
from lightning_quant.solvers.masks import Compared, keep_best

__all__ = ["InducedMask", "skewness_init"]

SHARPNESS = 0.5  # width of the step between pruned and kept, in the logarithm of the score, for the backward pass


def skewness_init(median: Tensor, mean: Tensor) -> Tensor:
    r"""Where the factors begin: :math:`(\text{median}_t X_{tj} - \text{mean}_t X_{tj})^2`, with geometric mean 1.

    Args:
        median: of each input over the tokens (inputs,).
        mean: the same.

    >>> skewness_init(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0])).round(decimals=2)
    tensor([0.5000, 2.0000])
    """
    factors = (median - mean).double().square()
    factors = factors + 1e-4 * factors.mean() + torch.finfo(torch.float32).tiny
    return (factors / factors.log().mean().exp()).clamp(1e-2, 1e2).float()


class InducedMask(nn.Module):
    r"""A mask that depends on learned factors, one for each input and maybe one for each row.

    .. math:: m_{ij} = r_i \, B_{ij} \, s_j, \qquad M = \text{keep the largest } m

    where :math:`B` is the score of the host method. That is what scaling the weights by :math:`s`, pruning them and
    scaling the inputs back comes to: :math:`(M \odot W S) S^{-1} = M \odot W`. So nothing needs to be folded, and no
    weight changes. It also means that with the mask as a constant the output does not depend on :math:`s` at all; the
    gradient therefore goes through the mask, as if it were a soft step of :math:`\ln m` at the threshold.

    Args:
        weight: (out, inputs), what is pruned.
        base: the score of the host method, in the same shape.
        pattern: how many are pruned.
        compared: whether weights compete in a row, or in the layer.
        start: of the factors (inputs,).
        rows: whether every row has a factor, too.
        mean: of the inputs, which is where the shift begins (inputs,); ``None`` learns no shift.
        size: of the inputs, in units of which the shift is learned.
    """

    def __init__(
        self,
        weight: Tensor,
        base: Tensor,
        pattern: Pattern,
        compared: Compared,
        start: Tensor,
        rows: bool = False,
        mean: Tensor | None = None,
        size: Tensor | float = 1.0,
    ) -> None:
        super().__init__()
        self.pattern, self.compared = pattern, compared
        self.register_buffer("weight", weight.detach().float(), persistent=False)
        base = base.detach().float()
        self.register_buffer("log_base", base.clamp(min=torch.finfo(base.dtype).tiny).log(), persistent=False)
        self.log_inputs = nn.Parameter(start.to(base).log())
        self.log_rows = nn.Parameter(base.new_zeros(len(base), 1)) if rows else None
        self.mean, self.size = None if mean is None else mean.to(base), size
        self.moved = None if mean is None else nn.Parameter(torch.zeros_like(base[0]))
        self._direction = nn.functional.normalize(torch.ones_like(base[0]), dim=0)

    weight: Tensor
    log_base: Tensor

    def importance(self) -> Tensor:
        """What the host's score is multiplied with: (out or 1, inputs)."""
        logs = self.log_inputs if self.log_rows is None else self.log_rows + self.log_inputs
        return logs.detach().exp().reshape(-1, self.log_inputs.numel())

    def forward(self) -> Tensor:
        """The mask as numbers, with a gradient: (out, inputs)."""
        logs = self.log_base + self.log_inputs
        if self.log_rows is not None:
            logs = logs + self.log_rows
        keep = keep_best(logs.detach(), self.pattern, self.compared)
        threshold = _thresholds(logs.detach(), keep, self.pattern, self.compared)
        soft = torch.sigmoid((logs - threshold) / SHARPNESS)
        return straight_through(soft, keep.to(soft))

    @property
    def shift(self) -> Tensor | None:
        r""":math:`\delta`, what is taken from the inputs before pruning, and given back behind the layer: (inputs,)."""
        return None if self.mean is None or self.moved is None else self.mean + self.size * self.moved

    def correction(self, pruned: Tensor) -> Tensor | None:
        r"""What pruning takes from the output at the shift: :math:`(W - \hat W) \delta`, to be added back: (out,)."""
        shift = self.shift
        return None if shift is None else (self.weight - pruned) @ shift

    def concentration(self) -> Tensor:
        r"""The spectral norm of the scaled weight over its Frobenius norm, which plain growth does not change."""
        scaled = self.weight * self.log_inputs.exp()
        if self.log_rows is not None:
            scaled = scaled * self.log_rows.exp()
        with torch.no_grad():
            left = nn.functional.normalize(scaled @ self._direction, dim=0)
            self._direction = nn.functional.normalize(left @ scaled, dim=0)
        norm: Tensor = left @ scaled @ self._direction
        frobenius: Tensor = scaled.norm().clamp(min=torch.finfo(scaled.dtype).tiny)
        return norm / frobenius


def _thresholds(logs: Tensor, keep: Tensor, pattern: Pattern, compared: Compared) -> Tensor:
    """Between the best that is pruned and the worst that is kept, of those that compete; like ``logs``."""
    shape = logs.shape
    if pattern.group is not None:
        logs, keep = logs.unflatten(-1, (-1, pattern.group)), keep.unflatten(-1, (-1, pattern.group))
    elif compared == "layer":
        logs, keep = logs.reshape(1, -1), keep.reshape(1, -1)
    pruned = logs.masked_fill(keep, -math.inf).amax(-1, keepdim=True)
    kept = logs.masked_fill(~keep, math.inf).amin(-1, keepdim=True)
    return ((pruned + kept) / 2).expand_as(logs).reshape(shape)
