"""What an attention mask says, as far as sparse attention follows it: which keys are padding, and is it causal."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyMask(NamedTuple):
    """A mask that block-sparse attention can follow.

    Args:
        valid: which keys are not padding, (B, S) or (1, S) bool; ``None``: all are valid.
        causal: whether a query sees no later key.
    """

    valid: Tensor | None = None
    causal: bool = False


def read_mask(mask: Tensor | None, queries: int, keys: int) -> KeyMask | None:
    """Read the ``attn_mask`` of ``scaled_dot_product_attention``; ``None`` where it is neither padding nor causal.

    Each sample may have its own valid keys, wherever they are.

    Args:
        mask: broadcastable to (B, H, queries, keys): bool, or floats that are 0 or as good as -inf.
        queries: number of queries.
        keys: number of keys.

    >>> padding = torch.tensor([[True, True, False]])
    >>> read_mask(padding & torch.ones(3, 3, dtype=torch.bool).tril(), 3, 3)
    KeyMask(valid=tensor([[ True,  True, False]]), causal=True)
    >>> read_mask(torch.randn(3, 3), 3, 3) is None
    True
    """
    if mask is None:
        return KeyMask()
    mask = mask[(None,) * max(0, 4 - mask.dim())]
    for dim in (0, 1, 2):
        if mask.stride(dim) == 0:  # expanded: every entry is the first
            mask = mask.narrow(dim, 0, 1)
    if mask.size(-1) != keys:
        return None
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if bool(((mask != 0) & ~hidden).any()):
            return None
        mask = ~hidden
    if mask.size(1) > 1 and bool((mask != mask[:, :1]).any()):
        return None
    mask = mask[:, 0]  # (B, L, S)
    last = mask[:, -1]  # under a causal mask too the last query sees every valid key
    valid = None if bool(last.all()) else last
    if bool((mask == last.unsqueeze(1)).all()):
        return KeyMask(valid)
    earlier = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    if queries == keys and bool((mask == (last.unsqueeze(1) & earlier)).all()):
        return KeyMask(valid, causal=True)
    return None
