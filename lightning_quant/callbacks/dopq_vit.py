"""DopQ-ViT: tangent levels for attention probabilities, a median for the common scale of LayerNorm outputs (2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from lightning_quant.calibration import seen_maps
from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan, QuantAttention
from lightning_quant.solvers import FittedLevels, fit_attention_levels

LEVELS = ("tan", "atan", "logsqrt2", "log2")


class DopQViT(RepQViT):
    r"""RepQ-ViT with attention levels bent by a tangent, chosen for what attention makes of their error.

    *TanQ.* Levels of a logarithm crowd near 0 and are a fixed factor apart at the few large probabilities, however many
    bits there are; those of a tangent come closer together there with every bit, and have no gap beside 0:

    .. math::
        q = \left\lfloor \frac{n}{\theta} \arctan\left(\frac{A}{d} \tan\theta\right) \right\rceil, \qquad
        \hat A = d \, \frac{\tan(\theta q / n)}{\tan\theta}, \qquad n = 2^{bits} - 1

    Curvature :math:`\theta` and largest level :math:`d` are searched on the calibration samples, for the least
    :math:`\|(A - \hat A) V\|^2` at each attention site. With several ``levels`` a site takes the best of them, so that
    with ``"logsqrt2"`` its error on these samples is never above RepQ-ViT's. On other images, summed over the blocks of
    a float DeiT-Tiny, the error with tangents is a seventh of that with powers of :math:`\sqrt 2` at three bits, a
    third at six and a fiftieth at eight, and level at four. The accuracy of the model does not gain by that: it is
    within two points of RepQ-ViT's at four and at six bits, on either side. Powers of 2 have less error still at three
    and four bits, but the one model that was given them at four bits was less accurate.

    *MOSF.* Of the scales :math:`s_j` of a LayerNorm's channels the common one is that of least mean absolute deviation
    from the others, which is their median, instead of their mean. The folded scale has no influence of its own: the
    codes do not depend on it, nor do weights with a range per output channel, nor the reconstruction here, whose
    learning rates are relative to the scale. This half is here because the paper has it; it changes results by no more
    than rounding.

    The paper publishes no code, and its formulas are reconstructed from the abstract. Its figures were had with a
    reconstruction: set ``reconstruct=``.

    Reference: Yang et al., *DopQ-ViT: Towards Distribution-Friendly and Outlier-Aware Post-Training Quantization for
    Vision Transformers*, 2024.

    Args:
        weights: format of the weights.
        activations: format of layer inputs and of q, k, v; the probabilities take as many bits.
        levels: what the attention sites choose from: ``"tan"``, its mirror image ``"atan"`` (fine near the largest
            level instead of near 0), ``"logsqrt2"``, ``"log2"``.
        common_scale: ``"median"``, or ``"mean"`` as in RepQ-ViT.
        arguments: see :class:`RepQViT`.

    Raises:
        ValueError: if ``levels`` or ``common_scale`` is unknown, and where :class:`RepQViT` does.

    >>> callback = DopQViT(weights="int4", activations="int4", reconstruct="qdrop")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4",
        activations: str = "int4",
        levels: Sequence[str] = ("tan",),
        common_scale: Literal["median", "mean"] = "median",
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, **arguments)
        unknown = [name for name in levels if name not in LEVELS]
        if unknown or not levels:
            raise ValueError(f"levels={list(levels)} must be of {', '.join(map(repr, LEVELS))}")
        if common_scale not in ("median", "mean"):
            raise ValueError(f"common_scale={common_scale!r} is neither 'median' nor 'mean'")
        self.levels, self.centre = list(levels), common_scale

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "levels": self.levels, "common_scale": self.centre}

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """RepQ-ViT first; then each attention site finds its levels on the quantized stream that this has made."""
        batches = list(batches)
        super().calibrate_plan(model, plan, graph, batches, run)
        sites = {name: _calls(model.get_submodule(name)) for name in plan.attention}
        found: dict[QuantAttention, dict[str, FittedLevels]] = {}

        def fit(call: QuantAttention, maps: Tensor, values: Tensor) -> None:
            assert call.probabilities_quantizer is not None
            bits = call.probabilities_quantizer.scheme.bits
            found[call] = fit_attention_levels(maps, values, [f"{levels}_{bits}" for levels in self.levels])

        with seen_maps([call for calls in sites.values() for call in calls], fit):
            for batch in batches:
                run(batch)
        for name, calls in sites.items():
            seen = [found[call] for call in calls if call in found]
            if len(seen) == len(calls) > 0:
                best = min(seen[0], key=lambda text: sum(fitted[text].error for fitted in seen))
                plan.attention[name].probabilities = best  # one format for a site, a range for each call
                for call, fitted in zip(calls, seen, strict=True):
                    call.probabilities_quantizer = fitted[best].quantizer


def _calls(site: nn.Module) -> list[QuantAttention]:
    """The calls of attention in a site whose probabilities are quantized."""
    calls = cast(nn.Module, site.attention_quantizers).modules()
    return [call for call in calls if isinstance(call, QuantAttention) and call.probabilities_quantizer is not None]
