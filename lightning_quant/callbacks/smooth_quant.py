"""SmoothQuant: outliers of activations are moved into the weights behind them (ICML 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_quant.calibration import channel_extremes, first_samples
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph, NormPair, residual_stream
from lightning_quant.layers import Plan, as_float, weight_rows
from lightning_quant.transforms import fold_scale, require_same, smoothing, unfolded_on_failure


class SmoothQuant(PostTrainingQuantization):
    r"""Divides each channel behind a norm by a number that the weights behind it are multiplied with.

    .. math:: s_j = \frac{\max |X_j|^\alpha}{\max_i |W_{ij}|^{1 - \alpha}}, \qquad X' = X / s, \quad W' = W s

    for every norm, LayerNorm and RMSNorm, that linear layers alone read; the maximum of the weights is taken over all
    of them. The division is folded into the norm, so nothing runs that did not run before. With :math:`\alpha = 1/2`
    activations and weights have the same reach in every channel. The model computes what it did, which is checked on
    two samples, and is then quantized as by :class:`PostTrainingQuantization`.

    A norm whose reader shares its weight with another layer, as a head with the embedding, is left alone. What is
    folded stays folded after ``remove``.

    Reference: Xiao et al., *SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models*,
    ICML 2023. Its code smooths the inputs of attention and MLP, as this does; LLaMA is given ``alpha=0.85`` there.

    Args:
        weights: format of the weights, ``None`` for float.
        activations: format of the layers' inputs, ``None`` for float. With both ``None`` the callback only smooths, and
            a callback behind it quantizes.
        ranges: how ranges are found; see :class:`PostTrainingQuantization`.
        alpha: how much of the outliers goes into the weights, 0 to 1.
        attention: whether q, k, v and the attention probabilities are quantized.
        arguments: see :class:`PostTrainingQuantization`.

    Raises:
        ValueError: for a number out of range, or a model without a norm that can be smoothed.

    >>> callback = SmoothQuant(weights="int8", activations="int8", skip=["lm_head"])
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    step: ClassVar[str] = "rewrite"
    rewrites_alone: ClassVar[bool] = True

    def __init__(
        self,
        weights: str | None = "int8",
        activations: str | None = "int8",
        ranges: str = "minmax",
        alpha: float = 0.5,
        attention: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, ranges, attention, **arguments)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1")
        self.alpha = alpha

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "alpha": self.alpha}

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Find the reach of every channel on the float stream, fold, and quantize what that gives."""
        batches = list(batches)
        samples = first_samples(batches[0], 2)
        with as_float(model):
            pairs = smoothable(model, graph, lambda: run(samples))
            if not pairs:
                raise ValueError(
                    f"SmoothQuant folds norms into the linear layers behind them, and {type(model).__name__} has none "
                    f"that linear layers alone read; use PostTrainingQuantization for this model"
                )
            exact = run(samples)
            readers = {pair.norm: [model.get_submodule(name) for name in pair.linears] for pair in pairs}
            extremes = channel_extremes({norm: layers[0] for norm, layers in readers.items()}, batches, run)
        touched = [model.get_submodule(norm) for norm in readers] + [x for layers in readers.values() for x in layers]
        with unfolded_on_failure(touched):
            for norm in extremes:
                weights = [weight_rows(layer) for layer in readers[norm]]
                found = smoothing(*extremes[norm], weights, self.alpha, centre=False)
                fold_scale(model.get_submodule(norm), readers[norm], found.divisor)
            with as_float(model):
                require_same(exact, run(samples), "use PostTrainingQuantization for this model")
            if self.formats.weights is None and self.formats.activations is None:
                self.give_back_unreached(model, plan, set(graph.order))
            else:
                super().calibrate_plan(model, plan, graph, batches, run)


def smoothable(model: nn.Module, graph: ModelGraph, run: Callable[[], Any]) -> list[NormPair]:
    """The norms, LayerNorm and RMSNorm, that linear layers alone read; whose scale is a Parameter of the norm."""
    tied = {name.rpartition(".")[0] for group in graph.tied for name in group}
    found = residual_stream(model, run)
    pairs = {pair.norm: pair for pair in graph.pairs if pair.modulation is None}
    for norm, readers in found.norms.items():
        if found.kinds[norm] == "rms" and norm not in found.obstacles and readers:
            pairs[norm] = NormPair(norm, tuple(readers))
    return [
        pair
        for pair in pairs.values()
        if not tied & {pair.norm, *pair.linears}
        and isinstance(getattr(model.get_submodule(pair.norm), "weight", None), Tensor)
    ]
