"""The definition of rectified sparse attention, block by block, in float64: slow and obvious. Tests compare with it."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    block: int,
    *,
    blocked: int | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Dense softmax attention under the expanded mask of kept blocks; a query with nothing to see answers 0.

    Args:
        query: (B, Hq, L, d).
        key: (B, Hkv, S, d).
        value: (B, Hkv, S, dv).
        kept: (B, Hq, N, M) bool.
        block: tokens per block.
        blocked: how many keys stand in blocks; every query sees the others.
        scale: of the softmax.
        valid: (B, S) bool.
        causal: a query sees no blocked key behind its own position.
    """
    group, length, keys = query.size(1) // key.size(1), query.size(2), key.size(2)
    blocked = keys if blocked is None else blocked
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    seen = kept.repeat_interleave(block, 2)[:, :, :length].repeat_interleave(block, 3)[..., :blocked]
    if causal:
        seen = seen & torch.ones(length, blocked, dtype=torch.bool).tril()
    seen = torch.cat([seen, seen.new_ones(*seen.shape[:-1], keys - blocked)], -1)
    if valid is not None:
        seen = seen & valid[:, None, None]
    scores = query.double() @ key.mT * (query.size(-1) ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0) @ value


def naive_rectified(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    drop_rate: float,
    p_remain: float,
    always: Tensor,
    text_key: Tensor,
    text_value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One head of one sample, by the letter of the method: loops over blocks, scalars and vectors.

    Args:
        query: (L, d), the visual tokens in the order in which they are cut into blocks.
        key: (L, d).
        value: (L, dv).
        block: tokens per block.
        drop_rate: share of the blocks that may be dropped.
        p_remain: implicit attention that is kept at least.
        always: (N, N) bool.
        text_key: (T, d), T may be 0.
        text_value: (T, dv).

    Returns:
        The output (L, dv), the kept blocks (N, N) bool, and the weights that each row has in all (N,).
    """
    query, key, value, text_key, text_value = (x.double() for x in (query, key, value, text_key, text_value))
    scale, texts = query.size(-1) ** -0.5, len(text_key)
    queries, keys, values = query.split(block), key.split(block), value.split(block)
    count = len(keys)
    kept = torch.zeros(count, count, dtype=torch.bool)
    outputs, weights = [], []
    for i, rows in enumerate(queries):
        mean = rows.mean(0)
        spread = (rows - mean).abs().mean(0)
        logits = [mean @ block_of_keys.mean(0) for block_of_keys in keys]
        masses = [len(k) * torch.exp(scale * z) for k, z in zip(keys, logits, strict=True)]
        text_mass = sum((torch.exp(scale * mean @ k) for k in text_key), start=torch.zeros(()).double())
        total = sum(masses) + text_mass
        probabilities = [mass / total for mass in masses] + ([text_mass / total] if texts else [])

        at_least = len(probabilities) if drop_rate == 0 else max(1, int(count - drop_rate * count + 1e-6))
        reached = 0.0
        for taken, slot in enumerate(sorted(range(len(probabilities)), key=lambda j: -probabilities[j])):
            if taken >= at_least and reached > p_remain:
                break
            reached += float(probabilities[slot])
            if slot < count:
                kept[i, slot] = True
        kept[i] |= always[i]

        critical, addend = text_mass / total, value.new_zeros(value.size(-1))
        pooled = torch.zeros_like(critical)
        for j, block_of_keys in enumerate(keys):
            error = (spread @ block_of_keys.mean(0)).abs()
            error = error + (mean @ (block_of_keys - block_of_keys.mean(0)).abs().mean(0)).abs()
            if kept[i, j] or not logits[j].abs() > error:
                critical = critical + probabilities[j]
            else:
                pooled = pooled + probabilities[j]
                addend = addend + probabilities[j] * values[j].mean(0)
        weights.append(critical + pooled)
        chosen = [j for j in range(count) if kept[i, j]]
        seen_keys = torch.cat([*(keys[j] for j in chosen), text_key])
        seen_values = torch.cat([*(values[j] for j in chosen), text_value])
        sparse = (scale * rows @ seen_keys.T).softmax(-1) @ seen_values
        outputs.append(critical * sparse + addend)
    return torch.cat(outputs), kept, torch.stack(weights)
