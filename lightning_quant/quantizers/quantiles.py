"""Quantiles of tensors of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["quantile"]

# A row longer than twice this is reduced by parts, which bounds the memory of the partial sort.
PART = 2**23


def quantile(x: Tensor, q: float | Sequence[float], dim: int | None = None) -> Tensor:
    """Returns the linearly interpolated quantile: ``torch.quantile`` for tensors of any size, and faster in the tails.

    Args:
        x: Floats; float16 and bfloat16 are computed in float32. A row with NaN gives NaN.
        q: One quantile or several; several come back along a new first axis.
        dim: The axis to reduce; all of ``x`` if ``None``.

    Raises:
        ValueError: If there is nothing to reduce or a quantile is outside [0, 1].

    Example:
        >>> quantile(torch.arange(11.0), [0.25, 0.999])
        tensor([2.5000, 9.9900])
    """
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    rows = x.flatten() if dim is None else x.movedim(dim, -1)
    n = rows.shape[-1]
    quantiles = [q] if isinstance(q, (int, float)) else list(q)
    if n == 0 or not all(0 <= value <= 1 for value in quantiles):
        raise ValueError(f"quantiles lie from 0 to 1 and need at least one value, got {quantiles} of {n} values.")
    # torch.quantile computes ranks in the dtype of x; float32 ranks are exact enough up to 2^24 elements.
    rank = torch.tensor(quantiles, dtype=x.dtype if n <= 2**24 else torch.float64) * (n - 1)
    below, above = rank.floor().long().tolist(), rank.ceil().long().clamp(max=n - 1).tolist()
    results: list[Tensor | None] = [None] * len(quantiles)
    for largest in (False, True):
        chosen = [i for i in range(len(quantiles)) if (below[i] >= n // 2) == largest]
        if not chosen:
            continue
        reach = max(n - below[i] if largest else above[i] + 1 for i in chosen)
        tail = _tail(rows, reach, largest)
        for i in chosen:
            low, high = ((n - 1 - r if largest else r) for r in (below[i], above[i]))
            results[i] = torch.lerp(tail[..., low], tail[..., high], (rank[i] - below[i]).item())
    stacked = torch.stack([result for result in results if result is not None])
    stacked = stacked.masked_fill(rows.amax(-1).isnan(), float("nan"))
    return stacked[0] if isinstance(q, (int, float)) else stacked


def _tail(rows: Tensor, k: int, largest: bool) -> Tensor:
    """The k outermost values, outermost first. Long rows go by parts, whose tails hold the tail of the whole."""
    if rows.shape[-1] > 2 * PART:
        tails = [piece.topk(min(k, piece.shape[-1]), largest=largest).values for piece in rows.split(PART, -1)]
        rows = torch.cat(tails, -1)
    return rows.topk(k, largest=largest, sorted=True).values
