"""PTQ4ARVG: post-training quantization of autoregressive visual generators (2026)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_quant.calibration import (
    CalibrationBatches,
    chosen_samples,
    hooked_outputs,
    merge_batches,
    reordered,
    sample_count,
    sampled_inputs,
)
from lightning_quant.callbacks.formats import weight_scheme
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.graph import ModelGraph, NormPair
from lightning_quant.layers import (
    Plan,
    PositionPlan,
    QuantizedLayer,
    as_float,
    decoder_of,
    takes_positions,
    weight_rows,
)
from lightning_quant.quantizers import RangeRule, Scheme
from lightning_quant.transforms import fold_pair, gain_projection, unfolded_on_failure

# The largest of a short row lies beyond all quantiles that the paper tries, so it is a candidate as well.
RULE = RangeRule("percentile_mse", percentiles=(0.999, 0.9999, 0.99999, 1.0))
ROWS = 16384  # of an activation, that the scaling is found on


class PTQ4ARVG(PostTrainingQuantization):
    r"""Quantizes transformers that make images token by token: channels, positions and samples each get their due.

    *GPS*: what linear layers read behind a norm, modulated or not, is smoothed, centred, and scaled where the error
    that the activation saves is what the weights lose,

    .. math:: s_i = s_m \left( \frac{\|x_i\|^2 \, \|W_i - Q(W)_i\|^2}{\|x_i - Q_m(x_i)\|^2 \, \|Q(W)_i\|^2}
              \right)^{1/4}, \qquad s_m = \sqrt{\text{range}(x_m) / \text{range}(W_m)}

    where m is the channel whose range is the largest. All of it is folded: into the norm, or into the linear layer that
    modulates it, and into the weights.

    *STWQ*: a sequence always has the same length, and its first tokens (sinks) reach far beyond the others, at the same
    places in every sample. So an input has a static range for each sink and one for all other tokens; what makes the
    modulations, if it differs from token to token, has one for each position. A decoder that goes on behind a cache is
    asked where it is: token by token, values are those of a whole sequence. The last layer has one range, and so have
    the operands of attention. GPS leaves the sinks out.

    *DGC*: of ``calibration_samples`` samples, :math:`\text{round}(r n)` have their condition and the others not, where
    r is the share of conditional ones among the n of all 2n that are farthest, by Mahalanobis, from the mean of their
    group, in the output of the last block for the first token. ``"topk"`` calibrates on those n themselves. Where a
    group does not vary there, as behind a causal mask without a class, both have a half.

    Everything is asymmetric, weights per output channel; ranges are the quantiles of least squared error by default.

    Reference: *PTQ4ARVG: Post-Training Quantization for AutoRegressive Visual Generation Models*, 2026. Its distances
    are found in all dimensions, where few samples are all equally far; here in their main n / 4.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs and of the attention operands.
        ranges: how ranges are found; the default is the paper's, with the extremes as one more candidate. ``"mse"``
            tries more of them, and is nearer in small models.
        gain: whether channels are scaled (GPS).
        sinks: how many of the first tokens have their own range; ``None``: no range depends on the position (no STWQ).
        position: the argument of the decoder that says where a call goes on: a number, a tensor of positions or a
            cache; default: ``start``, ``start_pos``, ``cache_position`` or ``past_key_values``, if it has one. Without,
            every call begins a sequence.
        mix: how calibration samples are chosen (DGC), ``"ratio"`` or ``"topk"``; ``None`` takes all as they come. It
            needs ``unconditional_batch(batch)`` of the model, which gives the batch without its condition.
        attention: whether q, k, v and the attention probabilities are quantized.
        calibration_samples: how many samples calibrate, in one forward each of whole sequences.
        arguments: see :class:`PostTrainingQuantization`.

    Raises:
        ValueError: for a number or format out of range, a model that does not tell what no condition looks like, or
            calibration that runs no whole sequences.

    >>> callback = PTQ4ARVG(weights="int6", activations="int6")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    step: ClassVar[str] = "rewrite"

    def __init__(
        self,
        weights: str = "int6",
        activations: str = "int6",
        ranges: str = "percentile_mse",
        gain: bool = True,
        sinks: int | None = 2,
        position: str | None = None,
        mix: Literal["ratio", "topk"] | None = "ratio",
        attention: bool = True,
        calibration_samples: int = 128,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, ranges, attention, calibration_samples=calibration_samples, **arguments)
        self.formats = replace(self.formats, weight_defaults={"symmetric": False, "granularity": "channel"})
        self.rule = RULE if ranges == RULE.name else self.rule
        if sinks is not None and sinks < 0:
            raise ValueError(f"sinks={sinks} must be at least 0, or None for no ranges by position")
        if mix not in ("ratio", "topk", None):
            raise ValueError(f"mix={mix!r} is none of 'ratio', 'topk', None")
        if gain and weight_scheme(weights, self.formats.weight_defaults).kind != "int":
            raise ValueError(f"weights={weights!r}: channels are scaled for a uniform grid; set gain=False for others")
        self.gain, self.sinks, self.position, self.mix = gain, sinks, position, mix

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {name: getattr(self, name) for name in ("gain", "sinks", "position", "mix")}
        return {**super().arguments, **own}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The formats, and which of them depend on the position."""
        plan = super().plan_for(model, graph)
        if self.sinks is not None:
            decoder, argument = decoder_of(model, graph.order, self.position) or (None, "")
            plan.positions = PositionPlan(decoder, argument, self.sinks)
            modulating = {pair.modulation.scale.linear for pair in graph.pairs if pair.modulation is not None}
            last = [name for name in graph.order if name in plan.layers][-1:]
            for name, layer in plan.layers.items():
                cost = graph.costs.get(name)
                tokens_first = cost is not None and len(cost.input) == 3 and name not in last
                if tokens_first and layer.inputs is not None and takes_positions(Scheme.parse(layer.inputs)):
                    assert cost is not None
                    tokens = cost.input[1]
                    plan.positions.owners[name] = tokens if name in modulating else min(tokens, self.sinks + 1)
        return plan

    def draw(self, batches: CalibrationBatches) -> Iterable[Any]:
        """One merged batch."""
        return [batches.merged()]

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Choose the samples, scale the channels, and find the ranges of what that gives."""
        batch = self.mixed(model, graph, next(iter(batches)), run)
        layers = plan.quantized_layers(model)
        pairs = [pair for pair in graph.pairs if all(name in layers for name in pair.linears)] if self.gain else []
        folded = [model.get_submodule(name) for pair in pairs for name in (_folded(pair), *pair.linears)]
        plan.created += [
            name for pair in pairs for name in (_folded(pair), *pair.linears) if _has_no_bias(model.get_submodule(name))
        ]
        with unfolded_on_failure(folded):
            with as_float(model):
                first = {pair.linears[0]: layers[pair.linears[0]] for pair in pairs}
                read = sampled_inputs(first, lambda: run(batch), ROWS, self.sinks or 0)
            for pair in pairs:
                self.scale_channels(model, pair, [layers[name] for name in pair.linears], read[pair.linears[0]])
            super().calibrate_plan(model, plan, graph, [batch], run)

    def mixed(self, model: nn.Module, graph: ModelGraph, batch: Any, run: Callable[[Any], Any]) -> Any:
        """Samples with and without their condition, in the proportion of what they tell."""
        if self.mix is None:
            return batch
        if not hasattr(model, "unconditional_batch"):
            raise ValueError(
                f"{type(model).__name__} does not tell what no condition looks like: define "
                f"unconditional_batch(batch), which gives the batch without it, or set mix=None"
            )
        without = model.unconditional_batch(batch)  # type: ignore[operator]
        count = sample_count(batch)
        with as_float(model):
            ours, others = (_first_tokens(model, graph.blocks, count, partial(run, one)) for one in (batch, without))
        chosen = chosen_samples(ours, others, pick=self.mix == "topk")
        share = sum(place < count for place in chosen) / count
        rank_zero_info(
            f"{type(self).__name__} calibrates on {count} samples, {share:.0%} of them with their condition."
        )
        return reordered(merge_batches([batch, without]), chosen)

    def scale_channels(self, model: nn.Module, pair: NormPair, linears: list[QuantizedLayer], x: Tensor) -> None:
        """Fold the scaling of one norm's output."""
        if len(x) == 0:
            raise ValueError(
                f"`{pair.linears[0]}` reads sequences of no more than sinks={self.sinks} tokens in calibration: define "
                f"calibration_step(batch) that feeds whole sequences at once, or set sinks=0"
            )
        quantizers = [(linear.weight_quantizer, linear.input_quantizer) for linear in linears]
        bits = [(w.scheme.bits, a.scheme.bits) for w, a in quantizers if w is not None and a is not None]
        if bits:
            found = gain_projection(x, [weight_rows(linear) for linear in linears], bits[0], self.rule)
            norm = model.get_submodule(_folded(pair))
            fold_pair(norm, linears, found.divisor.to(x.device), found.shift.to(x.device), pair.modulation)


def _folded(pair: NormPair) -> str:
    """What takes the fold: the norm, or the linear layer that modulates it."""
    return pair.norm if pair.modulation is None else pair.modulation.scale.linear


def _has_no_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", module) is None


def _first_tokens(model: nn.Module, blocks: list[str], count: int, run: Callable[[], Any]) -> Tensor:
    """The output of the last block for the first token of each sample (n, d)."""
    last = blocks[-1]
    with hooked_outputs({last: model.get_submodule(last)}) as outputs, torch.no_grad():
        run()
    found = outputs[last]
    return (found[0] if isinstance(found, tuple) else found)[:count, 0]
