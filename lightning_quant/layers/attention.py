"""Attention with quantized operands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.layers.base import through
from lightning_quant.layers.integers import integer_grid, sums_are_exact
from lightning_quant.quantizers import Quantizer, Scheme, build_quantizer


@dataclass(frozen=True)
class AttentionSchemes:
    """The formats of the four operands of attention; ``None`` leaves an operand float."""

    query: Scheme | None
    key: Scheme | None
    value: Scheme | None
    probabilities: Scheme | None

    @property
    def empty(self) -> bool:
        """Whether nothing is quantized."""
        return self.query is self.key is self.value is self.probabilities is None


class QuantAttention(nn.Module):
    r"""Scaled dot product attention with quantized operands.

    .. math:: \text{out} = Q_p(\text{softmax}(s \cdot Q_q(q) Q_k(k)^\top + m)) \, Q_v(v)

    where :math:`s` is the softmax scale, applied after the quantized product, and :math:`m` the mask.

    Args:
        schemes: the formats of query, key, value and probabilities.
    """

    OPERANDS = ("query", "key", "value", "probabilities")

    query_quantizer: Quantizer | None
    key_quantizer: Quantizer | None
    value_quantizer: Quantizer | None
    probabilities_quantizer: Quantizer | None

    def __init__(self, schemes: AttentionSchemes) -> None:
        super().__init__()
        for name in self.OPERANDS:
            scheme = getattr(schemes, name)
            self.register_module(f"{name}_quantizer", None if scheme is None else build_quantizer(scheme, axis=-1))

    def activation_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the four operands, by their own name."""
        found = {f"{name}_quantizer": getattr(self, f"{name}_quantizer") for name in self.OPERANDS}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def forward(
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
        """Same arguments and result as ``F.scaled_dot_product_attention``.

        query (..., L, E), key (..., S, E), value (..., S, Ev) -> (..., L, Ev)
        """
        probabilities = self.probabilities(query, key, attn_mask, is_causal, scale, enable_gqa)
        if enable_gqa:
            value = value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)
        p, v = integer_grid(self.probabilities_quantizer), integer_grid(self.value_quantizer)
        if p is not None and v is not None and not dropout_p and sums_are_exact(probabilities, value):
            return (p.integers(probabilities) @ v.integers(value)).mul_(p.scale.double() * v.scale)
        return F.dropout(probabilities, dropout_p).to(value.dtype) @ through(self.value_quantizer, value)

    def probabilities(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The quantized attention map: (..., L, S)."""
        if enable_gqa:
            key = key.repeat_interleave(query.size(-3) // key.size(-3), dim=-3)
        scores = self._scores(query, key, query.size(-1) ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is None:
            return through(self.probabilities_quantizer, scores.softmax(-1))
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
        nothing_to_see = scores.isneginf().all(-1, keepdim=True)  # torch's kernels answer 0 for such a row, softmax NaN
        return through(self.probabilities_quantizer, scores.softmax(-1).masked_fill(nothing_to_see, 0.0))

    def _scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        q, k = integer_grid(self.query_quantizer), integer_grid(self.key_quantizer)
        if q is not None and k is not None and sums_are_exact(query, key):
            return (q.integers(query) @ k.integers(key).transpose(-2, -1)).mul_(q.scale.double() * k.scale * scale)
        query, key = through(self.query_quantizer, query), through(self.key_quantizer, key)
        return query @ key.transpose(-2, -1) * scale
