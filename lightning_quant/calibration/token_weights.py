"""How much each token counts, by the attention that it receives or by what a block does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.layers import SOFTMAXES, AttentionSchemes, QuantAttention, softmax_is_last
from lightning_quant.layers.routing import Route

__all__ = ["attention_received", "column_sums", "token_weights"]

QUERIES = 128  # at a time, so that no whole map is kept


def attention_received(run: Callable[[], Any], samples: int) -> Tensor | None:
    """The sum over heads and queries of the attention that falls on each token: (samples, tokens).

    Args:
        run: runs something that attends from all tokens to all tokens, fused or spelled out; several calls add up.
        samples: how many samples it runs on.

    Returns:
        ``None`` if nothing attends.

    Example:
        >>> q = torch.randn(2, 3, 5, 4)
        >>> received = attention_received(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), samples=2)
        >>> received.shape, received.sum(1)  # each of 5 tokens gives 1 in each of 3 heads
        (torch.Size([2, 5]), tensor([15.0000, 15.0000]))
    """
    found: list[Tensor] = []

    def fused(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].shape[-2] == args[1].shape[-2]:
            found.append(column_sums(*args[:2], **_without_values(args, kwargs)))
        return func(*args, **kwargs)

    def spelled(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        maps = func(*args, **kwargs)
        if softmax_is_last(args, kwargs) and maps.dim() > 2 and maps.shape[-1] == maps.shape[-2]:
            found.append(maps.float().sum(-2))
        return maps

    with Route({F.scaled_dot_product_attention: fused, **dict.fromkeys(SOFTMAXES, spelled)}):
        run()
    return sum(sums.reshape(samples, -1, sums.shape[-1]).sum(1) for sums in found) if found else None  # type: ignore[return-value]


def column_sums(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    queries: int = QUERIES,
) -> Tensor:
    """The attention map summed over its queries, (..., heads, tokens), some of which are looked at at a time.

    Arguments as in ``F.scaled_dot_product_attention``.
    """
    attention = QuantAttention(AttentionSchemes(None, None, None, None))
    total = query.new_zeros(())
    for start in range(0, query.shape[-2], queries):
        rows = slice(start, start + queries)
        part = query[..., rows, :]
        mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]
        if is_causal:
            shape = (part.shape[-2], key.shape[-2])
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(start)
        total = total + attention.probabilities(part, key, mask, False, scale, enable_gqa).float().sum(-2)
    return total


def token_weights(importance: Tensor, least: float = 0.005, power: float = 1.0) -> Tensor:
    r"""Weights with a mean of 1 in each sample.

    .. math:: r \leftarrow \frac{r - \min r}{\max r - \min r} (1 - r_{min}) + r_{min}, \qquad
              w = \frac{T r^p}{\sum r^p}

    A token of importance 0 has the weight 0: nothing looks at it, as at padding. Tokens that are all alike weigh 1.

    Args:
        importance: (samples, tokens), not negative.
        least: :math:`r_{min}`, above 0 and up to 1.
        power: p.

    Example:
        >>> token_weights(torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]), least=0.5)
        tensor([[0.0000, 0.6667, 1.3333],
                [1.0000, 1.0000, 1.0000]])
    """
    seen = importance > 0
    low = importance.masked_fill(~seen, float("inf")).amin(1, keepdim=True)
    high = importance.amax(1, keepdim=True)
    alike = high <= low
    scaled = torch.where(alike, 1.0, (importance - low) / (high - low) * (1 - least) + least)
    weights = scaled.pow(power).masked_fill(~seen, 0.0)
    return weights * seen.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-30)


def _without_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments behind query, key and value that say what is attended to."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, args[3:], strict=False)) | kwargs
    return {name: value for name, value in given.items() if name not in ("dropout_p", "query", "key", "value")}
