"""How much of the attention was kept, and how far the answer is from the dense one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.kernels.sparse_attention.attention import Attended
from lightning_quant.kernels.sparse_attention.layout import Blocks
from lightning_quant.kernels.sparse_attention.masks import KeyMask


class AttentionFacts(NamedTuple):
    """Facts about one call of sparse attention, per head.

    Args:
        kept_share: share of the keys in sight that were attended to, text included: (H,).
        kept_mass: how much of the dense attention they have, on sampled queries: (H,).
        error: relative error to dense attention on these queries: (H,).
        plain_error: the same without rectification: (H,).
        kept: share of the samples that kept a block: (H, N, N).
    """

    kept_share: Tensor
    kept_mass: Tensor
    error: Tensor
    plain_error: Tensor
    kept: Tensor


def attention_facts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    attended: Attended,
    mask: KeyMask,
    scale: float,
    rows: int = 16,
) -> AttentionFacts:
    """Compare with dense attention on evenly spaced visual queries.

    Args:
        query: (B, Hq, L, d).
        key: (B, Hkv, L, d).
        value: (B, Hkv, L, dv).
        blocks: the layout, cut into blocks.
        attended: the result of the call.
        mask: of the call.
        scale: of the softmax.
        rows: how many queries are sampled.
    """
    kept, _, size = attended.selection
    group, length, visual = query.size(1) // key.size(1), key.size(2), len(blocks.visual)
    key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
    sampled = torch.linspace(0, visual - 1, min(rows, visual), device=query.device).long()
    positions = blocks.visual[sampled]

    visible = torch.ones(1, 1, len(sampled), length, dtype=torch.bool, device=query.device)
    if mask.valid is not None:
        visible = visible & mask.valid[:, None, None]
    if mask.causal:
        visible = visible & (torch.arange(length, device=query.device) <= positions[:, None])
    listed = kept[:, :, sampled // blocks.size].repeat_interleave(blocks.size, -1)[..., :visual]
    seen = torch.ones(*listed.shape[:-1], length, dtype=torch.bool, device=query.device)
    seen[..., blocks.visual] = listed

    scores = (query[:, :, positions].float() @ key.mT * scale).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # (B, H, rows, L)
    exact = weights @ value
    mass = (weights * seen).sum(-1, keepdim=True)
    plain = (weights * seen) @ value / mass.clamp(min=1e-12)
    output = attended.output[:, :, positions].float()

    def error(answer: Tensor) -> Tensor:
        return (answer - exact).square().sum((0, 2, 3)).sqrt() / exact.square().sum((0, 2, 3)).sqrt().clamp(min=1e-12)

    return AttentionFacts(
        kept_share(kept, blocks, size, mask),
        mass.mean((0, 2, 3)),
        error(output),
        error(plain),
        kept.float().mean(0),
    )


def kept_share(kept: Tensor, blocks: Blocks, size: Tensor, mask: KeyMask) -> Tensor:
    """Share of the keys in sight that visual queries attend to, text included: (H,)."""
    text = len(blocks.text) if mask.valid is None else mask.valid[:, blocks.text].sum(-1)[:, None, None]
    sight = size[:, None, None].float()  # keys of each block that a query sees on average
    if mask.causal:
        own = torch.eye(kept.size(-1), device=kept.device)
        sight = sight * torch.ones_like(own).tril(-1) + (sight + 1) / 2 * own
    share = ((kept * sight).sum(-1) + text) / (sight.sum(-1) + text).clamp(min=1)  # (B, H, N)
    return share.mean((0, 2))
