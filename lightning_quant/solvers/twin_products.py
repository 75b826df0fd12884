"""The products that twin formats are aligned for: a layer's input times its weight, probabilities times values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_quant.calibration import merge_across_ranks
from lightning_quant.layers import QuantAttention, QuantizedLayer
from lightning_quant.quantizers import Quantizer, TwinQuantizer
from lightning_quant.solvers.noise import some_tokens

__all__ = ["RoundedProduct", "rounded_products"]

TOKENS = 8  # of each sample


class RoundedProduct:
    """What a twin quantizer meets while a model runs, and what that is multiplied by: some tokens of each sample.

    Args:
        quantizer: of the first factor.
        factor: the second one, or the quantizer that meets it in the same forward.
    """

    def __init__(self, quantizer: TwinQuantizer, factor: Tensor | Quantizer) -> None:
        self.quantizer, self.factor = quantizer, factor
        self.seen: list[Tensor] = []
        self.factors: list[Tensor] = []

    def __enter__(self) -> RoundedProduct:
        self.quantizer.observer = self._see
        if isinstance(self.factor, Quantizer):
            self.factor.observer = self._see_factor
        return self

    def __exit__(self, *exception: object) -> None:
        """The context around this one gives the observers back."""

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What all processes met, the same on each of them."""
        parts = merge_across_ranks(list(zip(self.seen, self.factors, strict=True)))
        return [pair for part in parts for pair in part]

    def _see(self, x: Tensor) -> Tensor:
        if isinstance(self.factor, Quantizer):
            queries = torch.linspace(0, x.shape[-2] - 1, min(TOKENS, x.shape[-2]), device=x.device).long()
            self.seen.append(x[..., queries, :].detach())
        else:
            self.seen.append(some_tokens(x, TOKENS).detach())
            self.factors.append(self.factor)
        return x

    def _see_factor(self, value: Tensor) -> Tensor:
        probabilities = self.seen[-1]
        repeats = probabilities.shape[-3] // value.shape[-3] if probabilities.dim() > 3 else 1
        self.factors.append(value.detach().repeat_interleave(repeats, dim=-3) if repeats > 1 else value.detach())
        return value


def rounded_products(module: nn.Module) -> list[RoundedProduct]:
    """The products of a quantized layer or attention site whose first factor has a twin format."""
    if isinstance(module, QuantizedLayer) and isinstance(module.input_quantizer, TwinQuantizer):
        return [RoundedProduct(module.input_quantizer, module.quantized().detach().t())]
    attending = getattr(module, "attention_quantizers", ())
    sites: list[QuantAttention] = [attending] if isinstance(attending, QuantAttention) else list(attending)
    return [
        RoundedProduct(site.probabilities_quantizer, site.value_quantizer)
        for site in sites
        if isinstance(site.probabilities_quantizer, TwinQuantizer) and site.value_quantizer is not None
    ]
