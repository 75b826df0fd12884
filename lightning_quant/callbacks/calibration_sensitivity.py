"""CalibrationSensitivity: how much a quantized model depends on what it was calibrated with (2024)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_quant.calibration import CalibrationBatches, feed, undisturbed
from lightning_quant.calibration.activation_statistics import ActivationStatistics, activation_statistics, jaccard
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.bit_allocation import Monitor
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import WeightsAsTheyWere, twin_of
from lightning_quant.reports import Section, join, tag
from lightning_quant.reports.numbers import share

Loader = Literal["auto", "train", "val"] | Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass
class CalibratedWith:
    """What came of one calibration set.

    Args:
        name: of the set; what stands before a ``/`` is its group.
        value: the metric of the model that was calibrated with it; NaN if calibration failed.
        degradation: how much worse that is than in float.
        statistics: of what the layers of the float model read of the set, by name.
    """

    name: str
    value: float
    degradation: float
    statistics: dict[str, ActivationStatistics] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What stands before a ``/`` in the name."""
        return self.name.partition("/")[0]


class CalibrationSensitivity(Callback):
    r"""Quantizes the model once with each of several calibration sets, validates each time, and compares.

    .. math::
        S = \frac{\max_i q_i - \min_i q_i}{|\operatorname{mean}_i D_i|}, \qquad D_i = q_i - q_{float}

    where :math:`q_i` is the metric of the model that was calibrated with set i. Sets named ``"text/1"``, ``"text/2"``
    are draws of one group, whose own spread is the noise floor; the first group is the reference, and the *gap* of
    another one is how much worse its mean is. All sets have as many samples as the method asks for.

    Of what every layer reads in float, the share of outliers (magnitudes above 6), the channels that have one in a
    quarter of the samples, and how much these have in common with those of the reference, are noted beside it: they
    say whether outliers are to blame.

    The weights are put back after each set, bit by bit; afterwards the validation goes on with the float model.

    Reference: Paglieri et al., *Outliers and Calibration Sets have Diminishing Effect on Quantization of Modern LLMs*,
    2024.

    Args:
        method: the callback that quantizes; it need not be in the Trainer.
        sets: a calibration loader by name, as ``calibration_loader`` of the method; the first is the reference.
        monitor: name of the metric; ``None``: the only one there is.
        mode: ``"min"`` if smaller values are better, as of a perplexity, ``"max"`` otherwise.
        skip_first: leave the first token of each sample out of the statistics.

    Attributes:
        results: one :class:`CalibratedWith` for each set, in order.

    Raises:
        ValueError: for fewer than two sets, or a metric that is not logged.

    >>> sets = {"text": wikitext, "nonsense": punctuation}  # doctest: +SKIP
    >>> study = CalibrationSensitivity(PostTrainingQuantization(), sets, "perplexity")  # doctest: +SKIP
    >>> L.Trainer(callbacks=[study]).validate(model, datamodule=dm)  # doctest: +SKIP
    >>> print(study.sensitivity, study.gap("nonsense"))  # doctest: +SKIP
    """

    def __init__(
        self,
        method: QuantizationCallback,
        sets: Mapping[str, Loader],
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        skip_first: bool = False,
    ) -> None:
        if len(sets) < 2:
            raise ValueError(f"a sensitivity needs two calibration sets at least, found {len(sets)}: {list(sets)}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} is neither 'min' nor 'max'")
        self.method, self.sets, self.monitor, self.skip_first = method, dict(sets), monitor, skip_first
        self.mode: Literal["min", "max"] = mode
        self.results: list[CalibratedWith] = []
        self.name = monitor or ""

    # ---------------------------------------------------------------- what was found

    @property
    def sensitivity(self) -> float:
        """Spread of the metric over all sets, in parts of the mean degradation; 0 where all are alike."""
        values = [result.value for result in self.results]
        spread = max(values) - min(values)
        mean = abs(sum(result.degradation for result in self.results) / len(self.results))
        return 0.0 if spread == 0 else spread / mean if mean else math.inf

    def spread(self, group: str | None = None) -> float:
        """Spread of the metric over the sets of a group; default: the reference."""
        values = self._values(group or self.results[0].group)
        return max(values) - min(values)

    def gap(self, group: str) -> float:
        """How much worse the mean of a group is than that of the reference."""
        own, reference = self._values(group), self._values(self.results[0].group)
        difference = sum(own) / len(own) - sum(reference) / len(reference)
        return -difference if self.mode == "max" else difference

    def overlap(self, name: str) -> float:
        """What the outlier channels of a set and of the reference have in common, in the mean over the layers."""
        reference, own = self.results[0].statistics, self._result(name).statistics
        both = [jaccard(own[layer].outlier_channels, reference[layer].outlier_channels) for layer in own]
        return sum(both) / len(both)

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize and validate once with each set, and leave the float model."""
        if trainer.sanity_checking or trainer.state.fn == TrainerFn.FITTING:
            return
        record = record_of(pl_module)
        if record is not None and record.plans:
            raise ValueError(
                f"{type(pl_module).__name__} is quantized already: call remove(model) of the callback that did it; "
                f"CalibrationSensitivity quantizes by itself"
            )
        monitor = Monitor(trainer, pl_module, self.monitor, self.mode)
        self.name, self.results = monitor.name, []
        start = WeightsAsTheyWere(pl_module)
        for name, loader in self.sets.items():
            method = copy.copy(self.method)
            method.calibration_loader = loader
            statistics = self._look(trainer, pl_module, method)
            value = self._value(trainer, pl_module, method, monitor, start, name)
            worse = monitor.exact - value if self.mode == "max" else value - monitor.exact
            self.results.append(CalibratedWith(name, value, worse, statistics))
            rank_zero_info(f"CalibrationSensitivity: calibrated with {name}, {monitor.name} is {value:.4g}.")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sensitivity."""
        if self.results and not trainer.sanity_checking:
            pl_module.log("calibration_sensitivity", self.sensitivity, batch_size=1, sync_dist=True)

    # ---------------------------------------------------------------- the report

    def report_sections(self, trainer: Trainer, pl_module: LightningModule) -> Iterable[Section]:
        """One row for each set."""
        if not self.results:
            return []
        names = ("calibrated with", self.name, "worse by", "largest", "outliers", "outlier channels in common")
        rows = [
            tag(
                "tr",
                tag("th", result.name, scope="row"),
                tag("td", f"{result.value:.4g}", class_="number"),
                tag("td", f"{result.degradation:.3g}", class_="number"),
                tag("td", f"{max(s.absmax for s in result.statistics.values()):.3g}", class_="number"),
                tag("td", share(_mean(s.outlier_share for s in result.statistics.values())), class_="number"),
                tag("td", share(self.overlap(result.name)), class_="number"),
            )
            for result in self.results
        ]
        told = f"The spread is {self.sensitivity:.3g} of the mean degradation."
        body = join(
            [
                tag("p", told),
                tag(
                    "table",
                    tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names))),
                    tag("tbody", *rows),
                    class_="layers",
                ),
            ]
        )
        facts = {result.name: {"value": result.value, "degradation": result.degradation} for result in self.results}
        return [
            Section(
                "calibration_sensitivity",
                "Calibration sensitivity",
                {"sensitivity": self.sensitivity, "sets": facts},
                body,
                {"calibration_sensitivity": self.sensitivity},
            )
        ]

    # ---------------------------------------------------------------- private

    def _look(
        self, trainer: Trainer, pl_module: LightningModule, method: QuantizationCallback
    ) -> dict[str, ActivationStatistics]:
        layers: dict[str, nn.Module] = {
            name: module
            for name, module in pl_module.named_modules()
            if twin_of(module) is not None and isinstance(module, nn.Linear)
        }
        run = partial(feed, trainer, pl_module)
        with undisturbed(pl_module), activation_statistics(layers, self.skip_first) as found, torch.no_grad():
            for batch in CalibrationBatches(trainer, pl_module, method.calibration_loader, method.calibration_samples):
                run(batch)
        return {name: statistics for name, statistics in found.items() if statistics.count}

    def _value(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        method: QuantizationCallback,
        monitor: Monitor,
        start: WeightsAsTheyWere,
        name: str,
    ) -> float:
        try:
            method.calibrate(trainer, pl_module)
            return monitor.value()
        except (ValueError, RuntimeError) as error:
            rank_zero_warn(f"CalibrationSensitivity: calibrating with {name} failed, which counts as NaN: {error}")
            return math.nan
        finally:
            record = record_of(pl_module)
            if record is not None and method.state_key in record.plans:
                with warnings.catch_warnings():  # what is folded is put back in a moment
                    warnings.simplefilter("ignore")
                    method.remove(pl_module)
            start.put_back(pl_module)

    def _result(self, name: str) -> CalibratedWith:
        found = {result.name: result for result in self.results}
        if name not in found:
            raise ValueError(f"there is no calibration set {name!r}; there are {', '.join(map(repr, found)) or 'none'}")
        return found[name]

    def _values(self, group: str) -> list[float]:
        values = [result.value for result in self.results if result.group == group]
        if not values:
            raise ValueError(f"there is no group {group!r}; there are {', '.join({r.group for r in self.results})}")
        return values


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan
