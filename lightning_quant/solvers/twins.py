"""Where the two grids of a twin format end, by what the product behind them makes of the error (OPT-m)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_quant.quantizers import Quantizer, TwinQuantizer

__all__ = ["align_twin", "product_error"]


@torch.no_grad()
def product_error(quantizer: Quantizer, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    r"""Sum of :math:`\| (\hat A - A) B \|^2` over pairs of a tensor that is rounded and what it is multiplied by."""
    return sum(float(((quantizer.rounded(a) - a) @ b).square().sum(dtype=torch.float64)) for a, b in pairs)


@torch.no_grad()
def align_twin(
    quantizer: TwinQuantizer,
    pairs: Iterable[tuple[Tensor, Tensor]],
    exponents: Iterable[int] | None = None,
    candidates: int = 24,
) -> float:
    r"""OPT-m: search the exponent together with the step, for the least error of the product.

    .. math:: \min_{m, \Delta_1} \sum \| (\hat A - A) B \|^2, \qquad \Delta_2 = 2^m \Delta_1

    The coarse grid ends at up to 1.2 times the largest number. What the quantizer was before is kept if nothing beats
    it.

    Args:
        quantizer: calibrated; it is set to the best.
        pairs: tensors (..., k) that are rounded, and what they are multiplied by (..., k, n).
        exponents: which m are tried; default: 0 to 8.
        candidates: how many ends of the coarse grid.

    Returns:
        The error of the best.

    >>> quantizer, x = TwinQuantizer("twin_4"), torch.tensor([[-0.17, -0.1, -0.02, 0.0, 0.3, 1.0, 2.0]])
    >>> quantizer.freeze(torch.tensor(-2.0), torch.tensor(2.0))  # both grids alike
    >>> before = product_error(quantizer, [(x, torch.eye(7))])
    >>> align_twin(quantizer, [(x, torch.eye(7))]) < before, quantizer.exponent > 2
    (True, tensor(True))
    """
    pairs = [(a.float(), b.float()) for a, b in pairs]
    top = max(float(a.max()) for a, _ in pairs)
    best = (product_error(quantizer, pairs), quantizer.scale * torch.exp2(quantizer.exponent), quantizer.exponent)
    ends = [1.2 * top * (i + 1) / candidates for i in range(candidates)] if top > 0 else []
    for exponent in range(9) if exponents is None else exponents:
        for end in ends:
            coarse = torch.tensor(end / (quantizer.levels_each - 1), device=quantizer.scale.device)
            quantizer.align(coarse, exponent)
            error = product_error(quantizer, pairs)
            if error < best[0]:
                best = (error, coarse, torch.tensor(float(exponent)))
    quantizer.align(best[1], int(best[2]))
    return best[0]
