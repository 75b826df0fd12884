"""The quantized twin of ``nn.MultiheadAttention``, which hides projections and attention in one functional call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.layers.attention import AttentionSchemes, QuantAttention
from lightning_quant.layers.base import QuantizedLayer, through
from lightning_quant.layers.routing import Route
from lightning_quant.quantizers import Quantizer


class QuantMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with quantized projections and, where asked, quantized attention.

    The float class's ``forward`` still handles layouts and masks; only its call of ``F.multi_head_attention_forward``
    is answered here. While a route is active torch leaves its fused fast path alone. The output projection is a child
    layer with its own twin.
    """

    float_class = nn.MultiheadAttention
    takes_bias = False
    weight_names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    attention_quantizers: QuantAttention
    input_quantizers = ("input_quantizer", "key_input_quantizer", "value_input_quantizer")

    def add_quantizers(self, *contents: Any, **more: Any) -> None:
        """Fill slots; the quantizers of the attention operands come with :meth:`add_attention`."""
        super().add_quantizers(*contents, **more)
        if not hasattr(self, "attention_quantizers"):
            self.add_attention(AttentionSchemes(None, None, None, None))

    def add_attention(self, schemes: AttentionSchemes) -> None:
        """Quantize query, key, value and probabilities as well."""
        self.attention_quantizers = QuantAttention(schemes).to(self.device).train(self.training)

    def filled(self) -> set[str]:
        """The slots that something is in; the operands of attention are one."""
        attention = {"attention"} if self.attention_quantizers.activation_quantizers() else set()
        return super().filled() | attention

    def drop_quantizers(self) -> None:
        """Take the quantizers out again."""
        super().drop_quantizers()
        if hasattr(self, "attention_quantizers"):
            del self.attention_quantizers

    def activation_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the three inputs and of the four attention operands."""
        attention = self.attention_quantizers.activation_quantizers()
        return super().activation_quantizers() | {f"attention_quantizers.{name}": q for name, q in attention.items()}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Same arguments and result as ``nn.MultiheadAttention.forward``."""
        with Route({F.multi_head_attention_forward: lambda func, args, kwargs: self._attend(*args, **kwargs)}):
            out: tuple[Tensor, Tensor | None] = super().forward(*args, **kwargs)
            return out

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Answer ``F.multi_head_attention_forward``: query (L, N, E) or (L, E), key and value (S, N, E) or (S, E)."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        q, k, v = (
            x.view(len(x), -1, self.num_heads, self.head_dim).permute(1, 2, 0, 3) for x in (q, k, v)
        )  # (N, H, L, D)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        probabilities = self.attention_quantizers.probabilities(q, k, mask, is_causal=is_causal and mask is None)
        v = through(self.attention_quantizers.value_quantizer, v)
        out = F.dropout(probabilities, self.dropout if self.training else 0.0).to(v.dtype) @ v  # (N, H, L, D)
        out = self.out_proj(out.permute(2, 0, 1, 3).flatten(2))  # (L, N, E)
        maps = (probabilities.mean(1) if average_attn_weights else probabilities) if need_weights else None
        if not batched:
            out, maps = out.squeeze(1), None if maps is None else maps.squeeze(0)
        return out, maps

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections; learned extra key and value tokens are appended behind them."""
        if self.in_proj_weight is not None:
            weights = self.quantized("in_proj_weight").chunk(3)
        else:
            weights = tuple(self.quantized(f"{name}_proj_weight") for name in "qkv")
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        quantizers = (getattr(self, name) for name in self.input_quantizers)
        q, k, v = (
            F.linear(through(f, x), w, b) for f, x, w, b in zip(quantizers, inputs, weights, biases, strict=True)
        )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(1, k.size(1), -1)])
            v = torch.cat([v, self.bias_v.expand(1, v.size(1), -1)])
        return q, k, v

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """One additive mask (N, H, L, S) out of the two that torch allows; appended tokens are visible to all."""
        if attn_mask is None and padding is None:
            return None
        batch, extra = q.size(1), int(self.bias_k is not None) + int(self.add_zero_attn)
        total = q.new_zeros(())
        for mask, shape in ((attn_mask, None), (padding, (batch, 1, 1, -1))):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            if shape is not None:
                mask = mask.view(shape)
            elif mask.dim() == 3:
                mask = mask.view(batch, self.num_heads, *mask.shape[-2:])
            total = total + F.pad(mask, (0, extra))
        return total
