"""Which blocks of keys a block of queries attends to, decided on block means."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.kernels.sparse_attention.pooling import Pooled


def implicit_attention(
    query: Tensor,
    key: Tensor,
    size: Tensor,
    scale: float,
    text: Tensor | None = None,
    text_valid: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""How much of its attention a block of queries gives to each block of keys, estimated from block means.

    .. math:: P_{ij} = \frac{c_j e^{s z_{ij}}}{\sum_k c_k e^{s z_{ik}} + \sum_t e^{s \bar q_i \cdot k_t}}
        \qquad z_{ij} = \bar q_i \cdot \bar k_j

    with :math:`c_j` tokens in block j: a pooled block counts as often as it has tokens, while text keys stay single.

    Args:
        query: means of the query blocks, (B, H, N, d).
        key: means of the key blocks, (B, H, M, d).
        size: valid tokens of the key blocks, (B, M) or (1, M).
        scale: of the softmax.
        text: single keys that all queries see, (B, H, T, d).
        text_valid: which of them are not padding, (B, T) bool.
        causal: a query sees no later token; of its own block it sees half.

    Returns:
        The logits z (B, H, N, M), unscaled, P (B, H, N, M), and what is left for the text (B, H, N).
    """
    logits = query @ key.mT
    weight = size[:, None, None, :].float()  # (B, 1, 1, M)
    if causal:
        own = torch.eye(logits.size(-2), logits.size(-1), device=logits.device)
        earlier = torch.ones_like(own).tril(-1)
        weight = weight * earlier + (weight + 1) / 2 * own
    scores = [logits * scale + weight.log()]  # a block without tokens: -inf
    if text is not None:
        single = query @ text.mT * scale
        scores.append(single if text_valid is None else single.masked_fill(~text_valid[:, None, None], float("-inf")))
    probabilities = torch.cat(scores, -1).softmax(-1).nan_to_num(0.0)  # a sample without any valid key: 0/0
    blocks, singles = probabilities.split([logits.size(-1), probabilities.size(-1) - logits.size(-1)], -1)
    return logits, blocks, singles.sum(-1)


def pooling_is_worth_it(logits: Tensor, query: Pooled, key: Pooled) -> Tensor:
    r"""Where a block mean tells more than it hides: the gain of pooling exceeds its estimated error.

    .. math:: |\bar q_i \cdot \bar k_j| > |\Delta q_i \cdot \bar k_j| + |\bar q_i \cdot \Delta k_j|

    with :math:`\Delta` the mean absolute deviation per channel. Both sides are unscaled logits.

    Args:
        logits: the unscaled z of :func:`implicit_attention`, (B, H, N, M).
        query: the pooled query blocks.
        key: the pooled key blocks, with as many heads.
    """
    error = (query.deviation @ key.mean.mT).abs_() + (query.mean @ key.deviation.mT).abs_()
    return logits.abs() > error


def choose_blocks(
    blocks: Tensor,
    text: Tensor | None,
    drop_rate: float,
    p_remain: float,
    always: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """The blocks that are attended to: (B, H, N, M) bool.

    Each query block takes its key blocks (and all text keys together, as one more) in descending order of their
    implicit attention until it has more than ``p_remain`` of it, and at least ``1 - drop_rate`` of the blocks.

    Args:
        blocks: implicit attention to the key blocks, (B, H, N, M).
        text: implicit attention to the text, (B, H, N); ``None``: there is none.
        drop_rate: share of the key blocks that may be dropped.
        p_remain: implicit attention that is kept at least.
        always: blocks that are kept whatever their attention, (N, M) bool.
        visible: blocks with a token that may be seen, broadcastable to the result.

    >>> choose_blocks(torch.tensor([0.1, 0.5, 0.2, 0.2]).view(1, 1, 1, 4), None, 0.75, 0.6).flatten().tolist()
    [False, True, True, False]
    """
    slots = blocks if text is None else torch.cat([blocks, text.unsqueeze(-1)], -1)
    count = blocks.size(-1)
    at_least = slots.size(-1) if drop_rate == 0 else max(1, int(count - drop_rate * count + 1e-6))
    ranked, index = slots.sort(dim=-1, descending=True, stable=True)
    crossing = 1 + (ranked.cumsum(-1) <= p_remain).sum(-1, keepdim=True)  # the block that crosses the line is kept
    taken = torch.arange(slots.size(-1), device=slots.device) < crossing.clamp(min=at_least)
    kept = torch.zeros_like(taken).scatter_(-1, index, taken)[..., :count]
    if always is not None:
        kept = kept | always
    return kept if visible is None else kept & visible
