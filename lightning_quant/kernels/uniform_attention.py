"""Attention that gives every key the same weight."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The mean of the values in sight; same arguments as ``F.scaled_dot_product_attention``.

    What a mask hides weighs nothing, a float mask that hides nothing is ignored.

    >>> value = torch.tensor([[1.0], [3.0], [8.0]])
    >>> uniform_attention(value, value, value).tolist()
    [[4.0], [4.0], [4.0]]
    >>> uniform_attention(value, value, value, is_causal=True).tolist()
    [[1.0], [2.0], [4.0]]
    """
    if enable_gqa:
        value = value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)
    if is_causal:
        attn_mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return value.mean(-2, keepdim=True).expand(*value.shape[:-2], query.size(-2), value.size(-1))
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min / 2
    weights = seen.to(value.dtype)
    mean: Tensor = (weights / weights.sum(-1, keepdim=True).clamp(min=1)) @ value
    return mean.expand(*value.shape[:-2], query.size(-2), value.size(-1))
