"""Plain post-training quantization: any uniform or float format, any range search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from lightning_quant.calibration import observed, reached
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.formats import Formats
from lightning_quant.callbacks.step_tables import check_groups, step_plan
from lightning_quant.graph import ModelGraph
from lightning_quant.layers import Plan
from lightning_quant.quantizers import RangeRule, StepQuantizer

# A denoiser is fed its own answers. An outlier of the noise that the range of the sample cuts off is never predicted,
# so it stays, and grows from step to step; and the few samples of one step seldom show how far the next one reaches.
# Room for that costs little with 8 bits.
ROOM, WIDE = 1.3, 8


class PostTrainingQuantization(QuantizationCallback):
    r"""Rounds weights and activations to a grid whose range is searched on a few calibration samples.

    .. math:: \hat x = s \, (\text{clamp}(\lfloor x / s \rceil + z, \, q_{min}, \, q_{max}) - z)

    where :math:`s` and :math:`z` come from the range that ``ranges`` finds: the extremes, a percentile, or the range
    of least error. Weights are symmetric per output channel, activations asymmetric per tensor, unless the format's
    suffixes say otherwise. Activations are observed on the float model, batch after batch, with memory that does not
    grow.

    Args:
        weights: format of the weights, ``None`` for float.
        activations: format of the layers' inputs and of the attention operands, ``None`` for weight-only quantization.
        ranges: how ranges are found: ``"minmax"``, ``"percentile"``, ``"mse"``, ``"lp"``, ``"percentile_mse"``,
            ``"running"``, ``"kl"``.
        attention: whether q, k, v and the attention probabilities are quantized.
        first_last: format of the first and the last layer, ``None`` for no exemption.
        embeddings: format of embedding tables, ``None`` leaves them float.
        overrides: format of single layers by name pattern, ``{"blocks.0.*": "int8"}``, for weights and inputs.
        per_step: of a model that samples (:class:`~lightning_quant.DiffusionModule`): ``True`` gives every activation a
            range for each step of the trajectory, a number one for each of so many groups of steps that follow each
            other; what the calibration data does not meet shares the range of the nearest step that it does. Ranges
            for another schedule are refused.
        common: ``target``, ``skip``, ``calibration_samples``, ``calibration_loader``, ``during_fit``,
            ``reconstruct``: see :class:`~lightning_quant.callbacks.base.QuantizationCallback`.

    Raises:
        ValueError: for an unknown format, rule or pattern, NaN in the calibration data, or a layer that must not be
            touched.

    >>> callback = PostTrainingQuantization(weights="int8", activations="int8", first_last=None)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    rewrites_alone: ClassVar[bool] = False  # whether it does something when no format is given

    def __init__(
        self,
        weights: str | None = "int8",
        activations: str | None = "int8",
        ranges: str = "mse",
        attention: bool = True,
        first_last: str | None = None,
        embeddings: str | None = None,
        overrides: Mapping[str, str] | None = None,
        per_step: bool | int = False,
        **common: Any,
    ) -> None:
        formats = Formats(
            weights, activations, None, first_last, embeddings, dict(overrides or {}), required=not self.rewrites_alone
        )
        super().__init__(formats, attention, **common)
        check_groups(per_step)
        self.per_step = per_step
        self.ranges = ranges
        self.rule = RangeRule.parse(ranges)

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "ranges": self.ranges, "per_step": self.per_step}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """Choose the formats, and what depends on the step."""
        plan = super().plan_for(model, graph)
        plan.steps = step_plan(model, plan, self.per_step)
        return plan

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Observe the float stream, batch after batch, and freeze; then search the ranges of the weights."""
        self.find_ranges(model, plan, batches, run, self.rule)

    def find_ranges(
        self, model: nn.Module, plan: Plan, batches: Iterable[Any], run: Callable[[Any], Any], rule: RangeRule
    ) -> None:
        """The same by any rule."""
        self.observe_activations(model, plan, batches, run, rule)
        self.fit_weights(plan.quantized_layers(model), rule)

    def observe_activations(
        self, model: nn.Module, plan: Plan, batches: Iterable[Any], run: Callable[[Any], Any], rule: RangeRule
    ) -> None:
        """Find the ranges of activations; layers that no batch reaches are float again."""
        found = plan.activation_quantizers(model)
        fed_back = {name for name in found if (layer := plan.layers.get(name.rpartition(".")[0])) and layer.fed_back}
        tables = {name for name, q in found.items() if isinstance(q, StepQuantizer) and q.scheme.bits >= WIDE}
        with ExitStack() as stack:
            for names, how in (
                (fed_back, replace(RangeRule.parse("minmax"), room=ROOM)),
                (tables - fed_back, replace(rule, room=ROOM)),
                ({*found} - tables - fed_back, rule),
            ):
                stack.enter_context(observed({name: found[name] for name in names}, how))
            names = stack.enter_context(reached(plan.modules(model)))
            for batch in batches:
                run(batch)
        self.give_back_unreached(model, plan, names)
