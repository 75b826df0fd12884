"""MPTQ-ViT: centred smoothing of LayerNorm outputs, and twin formats behind GELU and softmax (2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_quant.calibration import observed
from lightning_quant.callbacks.formats import activation_scheme
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph, NormPair, matching
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.modules.unit_learning import activations_float
from lightning_quant.quantizers import (
    RangeRule,
    Scheme,
    UniformQuantizer,
    build_quantizer,
)
from lightning_quant.solvers import align_twin, product_error
from lightning_quant.solvers.twin_products import rounded_products
from lightning_quant.transforms import fold_pair, smoothing, unfolded_on_failure

EXTREMES = replace(RangeRule.parse("minmax"), include_zero=False)


class MPTQViT(PostTrainingQuantization):
    r"""Plain post-training quantization, for transformers, with an exact transform and a format made for them.

    *SQ-b*: what a LayerNorm gives to linear layers is centred and smoothed,

    .. math::
        b_j = \frac{\max X_j + \min X_j}{2}, \quad
        s_j = \frac{\max |X_j - b_j|^\alpha}{\max |W_{:,j}|^{1 - \alpha}}, \quad
        X' = \frac{X - b}{s}, \quad W'_{:,j} = W_{:,j} s_j, \quad c' = c + W b

    which is folded into the norm and the layers, leaves the function as it was, and lets a symmetric grid serve the
    whole tensor.

    *OPT-m*: what comes out of a GELU, and attention probabilities, have two uniform grids, :math:`\Delta_2 = 2^m
    \Delta_1`: one for negative and one for positive numbers, or one for small and one for large ones. The exponent m
    and the step are searched together for the least error of the product behind; a layer behind a GELU whose product is
    more exact with a single grid keeps that one.

    On DeiT-Tiny at W4A4 the two grids carry the method: a top-1 of 55.2 % of 250 images with OPT-m alone, 53.2 % with
    both halves, 6.8 % with SQ-b alone, 5.6 % with neither. At W6A6 both halves have 79.2 %, in float it is 80.4 %.

    The paper publishes no code: the formulas are reconstructed from its abstract and from the methods it extends,
    SmoothQuant and PTQ4ViT. Its greedy search for the bits of each layer is that of
    :class:`~lightning_quant.MixedPrecision`.

    Reference: *MPTQ-ViT: Mixed-Precision Post-Training Quantization for Vision Transformer*, 2024.

    Args:
        weights: format of the weights.
        activations: format of layer inputs and of q, k, v; the probabilities take as many bits.
        ranges: how ranges are found; see :class:`PostTrainingQuantization`.
        alpha: how much of the outliers goes into the weights, 0 to 1; ``None`` leaves SQ-b out.
        centre: whether channels are centred before they are smoothed.
        twins: where two grids are used: ``"gelu"``, ``"softmax"``, or both.
        gelu: name patterns of the layers that read a GELU; default: those that run right behind a module of that name.
        arguments: see :class:`PostTrainingQuantization`.

    Raises:
        ValueError: for an unknown format or pattern, or a number that is out of range.

    >>> callback = MPTQViT(weights="int6", activations="int6")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    step: ClassVar[str] = "rewrite"

    def __init__(
        self,
        weights: str = "int6",
        activations: str = "int6",
        ranges: str = "mse",
        alpha: float | None = 0.5,
        centre: bool = True,
        twins: Sequence[Literal["gelu", "softmax"]] = ("gelu", "softmax"),
        gelu: Sequence[str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, ranges, **arguments)
        scheme = Scheme.parse(activations)
        if scheme.kind != "int" or scheme.dynamic or scheme.granularity not in (None, "tensor") or scheme.bits > 8:
            raise ValueError(
                f"activations={activations!r}: MPTQViT takes static integers of up to 8 bits with one scale per "
                f"tensor, like 'int4'; use PostTrainingQuantization for other formats"
            )
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1, or None")
        chosen = [twins] if isinstance(twins, str) else list(twins)
        if not set(chosen) <= {"gelu", "softmax"}:
            raise ValueError(f"twins={chosen} must be of 'gelu' and 'softmax'")
        self.alpha, self.centre, self.twins = alpha, centre, chosen
        self.gelu = None if gelu is None else list(gelu)

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {"alpha": self.alpha, "centre": self.centre, "twins": self.twins, "gelu": self.gelu}
        return {**super().arguments, **own}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """Symmetric behind norms, two grids behind GELU and softmax."""
        plan = super().plan_for(model, graph)
        for pair in self._pairs(plan, graph):
            for name in pair.linears:
                scheme = Scheme.parse(cast(str, plan.layers[name].inputs))
                plan.layers[name].inputs = str(replace(scheme, symmetric=True))
        for name in self._behind_gelu(model, plan, graph) if "gelu" in self.twins else ():
            plan.layers[name].inputs = _twin(plan.layers[name].inputs, "twin")
        for site in plan.attention.values() if "softmax" in self.twins else ():
            site.probabilities = _twin(site.probabilities, "utwin")
        return plan

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Smooth the norms, find ranges as plain quantization does, then align the two grids."""
        batches = list(batches)
        self.give_back_unreached(model, plan, set(graph.order))
        pairs = self._pairs(plan, graph)
        folded = {name: model.get_submodule(name) for pair in pairs for name in (_folded(pair), *pair.linears)}
        plan.created = [name for name, module in folded.items() if module.bias is None]
        with unfolded_on_failure(list(folded.values())):
            self._smooth(model, plan, pairs, batches, run)
            self.find_ranges(model, plan, batches, run, self.rule)
            self._align(model, plan, batches, run)

    # ---------------------------------------------------------------- private

    def _behind_gelu(self, model: nn.Module, plan: Plan, graph: ModelGraph) -> list[str]:
        """The layers that read a GELU: nothing that computes runs between the two."""
        linears = [name for name in plan.layers if isinstance(model.get_submodule(name), nn.Linear)]
        if self.gelu is not None:
            return [name for pattern in self.gelu for name in matching(linears, pattern, "gelu")]
        found, behind = [], False
        for name in graph.order:
            module = model.get_submodule(name)
            if next(module.children(), None) is not None or isinstance(module, (nn.Identity, nn.Dropout)):
                continue
            if behind and name in linears:
                found.append(name)
            behind = "gelu" in type(module).__name__.lower()
        return found

    def _pairs(self, plan: Plan, graph: ModelGraph) -> list[NormPair]:
        """The norms that are smoothed: not that of the head, nor one that a layer in another format reads."""
        if self.alpha is None:
            return []
        layers = [name for name in graph.order if name in plan.layers]
        return [
            pair
            for pair in graph.pairs
            if not {*pair.linears} & {*layers[-1:]}
            and all(name in plan.layers and _is_static_integer(plan.layers[name].inputs) for name in pair.linears)
        ]

    def _smooth(
        self, model: nn.Module, plan: Plan, pairs: Sequence[NormPair], batches: Sequence[Any], run: Callable[[Any], Any]
    ) -> None:
        """Find the extremes of every channel on the float stream, and fold."""
        readers = {pair: [cast(QuantizedLayer, model.get_submodule(name)) for name in pair.linears] for pair in pairs}
        for linears in readers.values():  # 16 bits, so that the ends of the grid are the extremes
            linears[0].set_quantizer("input_quantizer", Scheme.parse("int16_asym_channel"), axis=-1)
        with observed({pair.norm: _input(linears[0]) for pair, linears in readers.items()}, EXTREMES):
            for batch in batches:
                run(batch)
        for pair, linears in readers.items():
            extremes = _input(linears[0])
            lo = -extremes.zero_point * extremes.scale
            hi = lo + extremes.scheme.qmax * extremes.scale
            found = smoothing(lo, hi, [linear.weight_rows() for linear in linears], self.alpha or 0.0, self.centre)
            fold_pair(model.get_submodule(_folded(pair)), linears, found.divisor, found.shift, pair.modulation)
            for name, linear in zip(pair.linears, linears, strict=True):
                linear.set_quantizer("input_quantizer", Scheme.parse(cast(str, plan.layers[name].inputs)), axis=-1)

    def _align(self, model: nn.Module, plan: Plan, batches: Sequence[Any], run: Callable[[Any], Any]) -> None:
        """Search exponent and step of every twin format, on what it meets where only weights are quantized."""
        with activations_float(model), ExitStack() as stack:
            products = [
                (name, stack.enter_context(product))
                for name, module in plan.modules(model).items()
                for product in rounded_products(module)
            ]
            for batch in batches:
                run(batch)
        for name, product in products:
            pairs = product.pairs()
            error = align_twin(product.quantizer, pairs)
            if name in plan.layers:
                self._keep_one_grid_if_better(model, plan, name, pairs, error)

    def _keep_one_grid_if_better(
        self, model: nn.Module, plan: Plan, name: str, pairs: Sequence[tuple[Tensor, Tensor]], error: float
    ) -> None:
        layer = cast(QuantizedLayer, model.get_submodule(name))
        bits = Scheme.parse(cast(str, plan.layers[name].inputs)).bits
        asked = activation_scheme(cast(str, self.formats.activations), self.formats.activation_defaults)
        plain = build_quantizer(replace(asked, bits=bits), axis=-1).to(layer.device)
        plain.fit(torch.cat([x for x, _ in pairs]), self.rule)
        if product_error(plain, pairs) <= error:
            plan.layers[name].inputs = str(plain.scheme)
            layer.set_quantizer("input_quantizer", plain.scheme, axis=-1)
            _input(layer).load_state_dict(plain.state_dict())


def _twin(text: str | None, kind: Literal["twin", "utwin"]) -> str | None:
    """The twin format of as many bits, where there is a static integer one."""
    return f"{kind}_{Scheme.parse(text).bits}" if text is not None and _is_static_integer(text) else text


def _is_static_integer(text: str | None) -> bool:
    scheme = None if text is None else Scheme.parse(text)
    return scheme is not None and scheme.kind == "int" and not scheme.dynamic and scheme.bits <= 8


def _folded(pair: NormPair) -> str:
    """What takes the fold: the norm, or the linear layer that modulates it."""
    return pair.norm if pair.modulation is None else pair.modulation.scale.linear


def _input(layer: QuantizedLayer) -> UniformQuantizer:
    return cast(UniformQuantizer, layer.input_quantizer)
