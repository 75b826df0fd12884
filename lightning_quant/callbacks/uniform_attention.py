"""Uniform attention: the cheapest approximation there is, and the baseline of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule

from lightning_quant.callbacks.attention_override import AttentionOverride, chosen_sites
from lightning_quant.graph.tokens import AttentionTokens
from lightning_quant.kernels.attention_door import AttentionFunction
from lightning_quant.kernels.uniform_attention import uniform_attention


class UniformAttention(AttentionOverride):
    """Gives every key the same weight, so that a layer answers with the mean of its values (WACV 2025).

    Over the text of a diffusion model it is a real method: the text then acts as one constant vector per layer, which
    makes inversion exact (`Uniform Attention Maps`). Elsewhere it is a baseline.

    Args:
        layers: which attention sites: numbers in the order of their calls, or name patterns; default: all.

    Raises:
        ValueError: at the first batch, if nothing attends, or a number or pattern fits no attention site.

    >>> from lightning_quant import UniformAttention
    >>> trainer = L.Trainer(callbacks=[UniformAttention(layers=["*.attn2"])])  # doctest: +SKIP
    """

    def __init__(self, layers: Sequence[int | str] = ("*",)) -> None:
        super().__init__()
        self.layers = list(layers)

    def functions(
        self, pl_module: LightningModule, calls: Sequence[AttentionTokens]
    ) -> Mapping[str, AttentionFunction]:
        """The mean of the values, for every chosen site."""
        sites = list(dict.fromkeys(call.site for call in calls))
        if not sites:
            raise ValueError(f"UniformAttention found nothing in this {type(pl_module).__name__} that attends")
        return dict.fromkeys(sorted(chosen_sites(sites, self.layers, "layers")), uniform_attention)
