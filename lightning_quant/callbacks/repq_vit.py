"""RepQ-ViT: scale reparameterization for post-training quantization of vision transformers (ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

from torch import nn

from lightning_quant.calibration import CalibrationBatches, fitted_in_stream
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.formats import Formats, activation_scheme, parse_format
from lightning_quant.graph import ModelGraph, Modulation, NormPair, matches
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.quantizers import RangeRule, UniformQuantizer
from lightning_quant.transforms import fold_pair, per_tensor, unfolded_on_failure


class RepQViT(QuantizationCallback):
    r"""Calibrates LayerNorm outputs and attention maps expressively, then turns both exactly into cheap formats.

    *LayerNorm outputs* are calibrated per channel, :math:`(s, z)`. With :math:`\tilde s = \text{mean}(s)`,
    :math:`\tilde z = \lfloor\text{mean}(z)\rceil`, :math:`r_1 = s / \tilde s`, :math:`r_2 = z - \tilde z`, folding
    into the norm and the next linear layer

    .. math::
        \tilde\gamma = \gamma / r_1, \quad \tilde\beta = (\beta + s \odot r_2) / r_1, \quad
        \tilde W_{:,j} = W_{:,j} \, r_{1,j}, \quad \tilde c = c - W (s \odot r_2)

    leaves the function as it was, while one scale :math:`\tilde s` and zero point :math:`\tilde z` now serve the
    whole tensor with the very same codes.

    *Attention probabilities* are quantized in base :math:`\sqrt 2`, :math:`q = \lfloor -2 \log_2 (A / d) \rceil`,
    which a base-2 shift by :math:`\lceil q / 2 \rceil` and a scale that depends on the parity of :math:`q` computes
    exactly.

    Everything is asymmetric and uniform otherwise, weights per output channel, activations per tensor; ranges are the
    percentiles of least squared error. All quantizers are calibrated in one forward of one merged batch, each on the
    already quantized stream. Stem inputs have 8 bits; the head has no exemption (``overrides={"head": "int8"}`` gives
    it one).

    Reference: Li et al., *RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers*,
    ICCV 2023.

    Args:
        weights: format of the weights.
        activations: format of layer inputs and of q, k, v; the probabilities take as many bits.
        stem_activations: format of the input of convolutions, ``None``: as ``activations``.
        percentiles: candidates of the range search.
        round_zero_point: whether :math:`\tilde z` is rounded, so that codes stay integers; the published code leaves
            it fractional.
        attention: whether q, k, v and the attention probabilities are quantized.
        first_last: format of the first and the last layer, ``None`` for no exemption.
        embeddings: format of embedding tables, ``None`` leaves them float.
        overrides: format of single layers by name pattern, ``{"blocks.0.*": "int8"}``, for weights and inputs.
        common: ``target``, ``skip``, ``calibration_samples``, ``calibration_loader``, ``during_fit``,
            ``reconstruct``: see :class:`~lightning_quant.callbacks.base.QuantizationCallback`.

    Raises:
        ValueError: for an unknown format or pattern, NaN in the calibration data, or a model without a LayerNorm that
            can be folded.

    >>> callback = RepQViT(weights="int4", activations="int4")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    step: ClassVar[str] = "rewrite"
    centre: Literal["mean", "median"] = "mean"  # of the scales per channel, as the one for the whole tensor

    def __init__(
        self,
        weights: str = "int4",
        activations: str = "int4",
        stem_activations: str | None = "int8",
        percentiles: Sequence[float] = (0.999, 0.9999, 0.99999),
        round_zero_point: bool = True,
        attention: bool = True,
        first_last: str | None = None,
        embeddings: str | None = None,
        overrides: Mapping[str, str] | None = None,
        **common: Any,
    ) -> None:
        bits = _bits(activations, attention)
        formats = Formats(
            weights,
            activations,
            f"logsqrt2_{bits}",
            first_last,
            embeddings,
            dict(overrides or {}),
            weight_defaults={"symmetric": False, "granularity": "channel"},
        )
        super().__init__(formats, attention, **common)
        self.stem_activations = stem_activations
        self.rule = replace(RangeRule.parse("percentile_mse"), percentiles=tuple(percentiles))
        self.round_zero_point = round_zero_point

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {
            "stem_activations": self.stem_activations,
            "percentiles": list(self.rule.percentiles),
            "round_zero_point": self.round_zero_point,
        }
        return {**super().arguments, **own}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """Every layer in the asked formats; the input of the stem has its own."""
        plan = super().plan_for(model, graph)
        if not graph.pairs:
            why = next(iter(graph.unfoldable.items()), None)
            raise ValueError(
                f"RepQViT folds LayerNorms into the linear layers behind them, "
                f"and {type(model).__name__} has none that can be folded"
                + (f" (`{why[0]}`: {why[1]})" if why else "")
                + "; use PostTrainingQuantization for this model"
            )
        stem = next((name for name in graph.order if name in plan.layers), "")
        exempt = self.formats.first_last is not None or any(
            matches(stem, pattern) for pattern in self.formats.overrides
        )
        if (
            self.stem_activations is not None
            and isinstance(model.get_submodule(stem), (nn.Conv1d, nn.Conv2d))
            and not exempt
        ):
            plan.layers[stem].inputs = str(activation_scheme(self.stem_activations, self.formats.activation_defaults))
        return plan

    def draw(self, batches: CalibrationBatches) -> Iterable[Any]:
        """One merged batch."""
        return [batches.merged()]

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """One forward on the quantized stream, then the folding, then new ranges for the folded weights."""
        self.give_back_unreached(model, plan, set(graph.order))
        layers = plan.quantized_layers(model)
        head = [name for name in graph.order if name in layers][-1]
        pairs = [
            pair
            for pair in graph.pairs
            if head not in pair.linears and all(_is_uniform(layers.get(name)) for name in pair.linears)
        ]
        for name in (name for pair in pairs for name in pair.linears):
            layers[name].set_quantizer(
                "input_quantizer", replace(_input(layers[name]).scheme, granularity="channel"), axis=-1
            )
        self.fit_weights(layers, self.rule)
        with fitted_in_stream(plan.activation_quantizers(model), self.rule):
            batches = list(batches)
            for batch in batches:
                run(batch)
        self.refine_ranges(model, pairs, batches, run)

        folded = {name: model.get_submodule(name) for pair in pairs for name in (_folded_norm(pair), *pair.linears)}
        plan.created = [name for name, module in folded.items() if module.bias is None]
        with unfolded_on_failure(list(folded.values())):
            for pair in pairs:
                self._reparameterize(
                    folded[_folded_norm(pair)], [layers[name] for name in pair.linears], pair.modulation
                )
            self.fit_weights({name: layers[name] for name in folded if name in layers}, self.rule)

    def refine_ranges(
        self, model: nn.Module, pairs: Sequence[NormPair], batches: Sequence[Any], run: Callable[[Any], Any]
    ) -> None:
        """Where a method built on this one has a better idea of the ranges per channel, before they are folded."""

    def _reparameterize(self, norm: nn.Module, linears: list[QuantizedLayer], modulation: Modulation | None) -> None:
        """Fold the norm into the linears that read it, and give them one scale for the whole tensor."""
        per_channel = _input(linears[0])  # all of them read the same tensor
        found = per_tensor(per_channel.scale, per_channel.zero_point, self.round_zero_point, self.centre)
        fold_pair(norm, linears, found.divisor, found.shift, modulation)
        for linear in linears:
            linear.set_quantizer("input_quantizer", replace(per_channel.scheme, granularity="tensor"), axis=-1)
            _input(linear).scale = found.scale.float()
            _input(linear).zero_point = found.zero_point.float()


def _bits(activations: str, attention: bool) -> int:
    """The bits of the activations; refuses formats that cannot come out of the folding, or have no logarithm."""
    scheme = parse_format(activations, "activations")
    if scheme.kind != "int" or scheme.dynamic or scheme.granularity not in (None, "tensor"):
        raise ValueError(
            f"activations={activations!r}: RepQViT folds scales into weights until one static integer scale per tensor "
            f"is left, as 'int4' has; use PostTrainingQuantization for other formats"
        )
    if attention and not 2 <= scheme.bits <= 8:
        raise ValueError(
            f"activations={activations!r}: the attention probabilities take as many bits, and a logarithmic format has "
            f"2 to 8; set attention=False to leave them float"
        )
    return scheme.bits


def _folded_norm(pair: NormPair) -> str:
    """What takes the fold: the norm, or the linear layer that modulates it."""
    return pair.norm if pair.modulation is None else pair.modulation.scale.linear


def _input(layer: QuantizedLayer) -> UniformQuantizer:
    return cast(UniformQuantizer, layer.input_quantizer)


def _is_uniform(layer: QuantizedLayer | None) -> bool:
    """Whether a linear's input has a scale and a zero point that can be folded away."""
    quantizer = None if layer is None else layer.input_quantizer
    return (
        isinstance(quantizer, UniformQuantizer)
        and not quantizer.scheme.dynamic
        and quantizer.scheme.granularity == "tensor"
    )
