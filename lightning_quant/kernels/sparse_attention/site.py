"""One place in a model where rectified sparse attention answers, and what it did there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.sparse_attention.attention import Attended, Sparsity, rectified_sparse_attention
from lightning_quant.kernels.sparse_attention.facts import AttentionFacts, attention_facts, kept_share
from lightning_quant.kernels.sparse_attention.layout import Blocks
from lightning_quant.kernels.sparse_attention.masks import KeyMask, read_mask
from lightning_quant.kernels.sparse_attention.workspace import Workspace


@dataclass
class SiteFacts:
    """What happened at one attention site.

    Args:
        layouts: the layouts that were attended over, in words.
        sparse_calls: how many calls were sparse.
        dense_calls: how many were dense, by reason.
        kept_share: share of the keys that were attended to, mean over the sparse calls: (heads,).
        sampled: the comparison with dense attention, on sampled queries of the first sparse call.
    """

    layouts: list[str]
    sparse_calls: int = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    kept_share: Tensor | None = None
    sampled: AttentionFacts | None = None


class SparseSite:
    """Answers the attention calls of one module: sparsely where it can, else densely, and keeps count.

    Args:
        layouts: the blocks of the sequences that it knows, by number of tokens and whether attention is causal.
        sparsity: how sparse.
        resting: whether calls are dense for now (warm-up steps).
        workspace: memory that sites use one after the other.
    """

    def __init__(
        self,
        layouts: Mapping[tuple[int, bool], Blocks],
        sparsity: Sparsity,
        resting: Callable[[], bool] = lambda: False,
        workspace: Workspace | None = None,
    ) -> None:
        self.layouts = dict(layouts)
        self.sparsity = sparsity
        self.resting = resting
        self.workspace = workspace or Workspace()
        self.facts = SiteFacts([str(blocks.layout) for blocks in self.layouts.values()])

    # How many blocks are kept depends on the data: one break of the graph instead of many.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Same arguments and result as ``F.scaled_dot_product_attention``."""
        found = self._readable(query, key, attn_mask, dropout_p, is_causal)
        if isinstance(found, str):
            self.facts.dense_calls[found] += 1
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        blocks, mask = found
        scale = query.size(-1) ** -0.5 if scale is None else scale
        attended = rectified_sparse_attention(query, key, value, blocks, self.sparsity, mask, scale, self.workspace)
        self._remember(query, key, value, blocks, mask, attended, scale)
        return attended.output

    def _readable(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> tuple[Blocks, KeyMask] | str:
        """The blocks and what the mask says, or why the call is dense."""
        tokens = query.size(-2)
        if self.resting():
            return "warm-up"
        if tokens != key.size(-2):
            return "queries and keys differ in number"
        if query.dim() != 4 or dropout_p > 0 or (torch.is_grad_enabled() and query.requires_grad):
            return "not a plain forward of (batch, heads, tokens, channels)"
        mask = KeyMask(causal=True) if is_causal else read_mask(attn_mask, tokens, tokens)
        if mask is None:
            return "the mask is neither padding nor causal"
        blocks = self.layouts.get((tokens, mask.causal))
        if blocks is None:
            return f"no layout for {tokens} {'causal ' if mask.causal else ''}tokens"
        return blocks.to(query.device), mask

    def _remember(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Blocks,
        mask: KeyMask,
        attended: Attended,
        scale: float,
    ) -> None:
        facts = self.facts
        facts.sparse_calls += 1
        share = kept_share(attended.selection.kept, blocks, attended.selection.size, mask)
        before = share if facts.kept_share is None else facts.kept_share
        facts.kept_share = before + (share - before) / facts.sparse_calls
        if facts.sampled is None:
            sampled = attention_facts(query, key, value, blocks, attended, mask, scale)
            facts.sampled = AttentionFacts(*(x.cpu() for x in sampled))
