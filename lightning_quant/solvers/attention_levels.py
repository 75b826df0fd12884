"""Which uneven levels serve an attention map best, by what attention makes of the error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.quantizers import Quantizer, TangentQuantizer, build_quantizer, quantile

__all__ = ["FittedLevels", "fit_attention_levels"]

PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)
# Attention maps want much curvature: the grid is finer there.
CURVATURES = (0.1, 0.5, 0.8, 1.0, 1.1, 1.2, 1.3, 1.35, 1.4, 1.425, 1.45, 1.475, 1.5)


class FittedLevels(NamedTuple):
    """A quantizer, and the error that it was chosen for."""

    error: float
    quantizer: Quantizer


@torch.no_grad()
def fit_attention_levels(
    probabilities: Tensor,
    values: Tensor,
    formats: Sequence[str],
    percentiles: Sequence[float] = PERCENTILES,
    curvatures: Sequence[float] = CURVATURES,
    queries: int = 16,
) -> dict[str, FittedLevels]:
    r"""Fits each format to an attention map :math:`A` in front of values :math:`V`.

    What is least is :math:`\|(A - \hat A) V\|^2`: the error of the map itself would be swamped by its many entries
    near 0.

    Args:
        probabilities: (..., queries, keys).
        values: (..., keys, width), with as many heads or a divisor of them; what has another layout is left out of the
            error.
        formats: of the levels, like ``"tan_4"``, ``"log2_4"``.
        percentiles: of the probabilities, tried as the largest level.
        curvatures: tried for tangent formats.
        queries: how many evenly spaced rows of each map count.

    Example:
        >>> maps = torch.softmax(4 * torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0)), -1)
        >>> fitted = fit_attention_levels(maps, torch.eye(9).expand(2, 9, 9), ["tan_3", "log2_3", "uint3_asym"])
        >>> min(fitted, key=lambda text: fitted[text].error)
        'tan_3'
    """
    rows = torch.linspace(0, probabilities.shape[-2] - 1, min(queries, probabilities.shape[-2])).long()
    tops = quantile(probabilities.float().reshape(1, -1), list(percentiles), dim=1).flatten().unique()
    maps, values = probabilities[..., rows.to(probabilities.device), :].float(), _matching(probabilities, values)
    fitted: dict[str, FittedLevels] = {}
    for text in formats:
        for quantizer in _candidates(text, tops, curvatures):
            error = quantizer(maps).sub_(maps) @ values
            total = float(error.square_().sum(dtype=torch.float64))
            if text not in fitted or total < fitted[text].error:
                fitted[text] = FittedLevels(total, quantizer)
    return fitted


def _candidates(text: str, tops: Tensor, curvatures: Sequence[float]) -> Iterator[Quantizer]:
    for top in tops:
        for curvature in curvatures if text.startswith(("tan", "atan")) else (None,):
            quantizer = build_quantizer(text).to(top.device).eval()
            quantizer.freeze(torch.zeros_like(top), top)
            if isinstance(quantizer, TangentQuantizer) and curvature is not None:
                quantizer.curve(curvature)
            yield quantizer


def _matching(probabilities: Tensor, values: Tensor) -> Tensor:
    """The values as the product takes them: each head repeated where several heads of the map share it."""
    keys = probabilities.shape[-1]
    if values.dim() == probabilities.dim() > 2 and values.shape[-2] == keys:
        heads, groups = probabilities.shape[-3], values.shape[-3]
        if heads % groups == 0 and values.shape[:-3] == probabilities.shape[:-3]:
            return values.float().repeat_interleave(heads // groups, dim=-3)
    return torch.eye(keys, device=values.device)
