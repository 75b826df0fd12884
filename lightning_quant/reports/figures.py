"""The plots of the report as matplotlib figures, for loggers. matplotlib is imported only where one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lightning_quant.reports.bars import Bars
from lightning_quant.reports.errors import LayerError, TensorError
from lightning_quant.reports.numbers import decibels

# No pyplot: it would keep figures in a global list and choose a backend for the whole process.


def depth_figure(layers: Sequence[LayerError], ranks: Mapping[str, int]) -> Figure:
    """SQNR along the depth of the model.

    Args:
        layers: in the order in which they ran.
        ranks: which of them are marked, by name.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.add_subplot()
    own = _finite({i: layer.sqnr for i, layer in enumerate(layers, 1)})
    accumulated = _finite({i: layer.accumulated for i, layer in enumerate(layers, 1)})
    axis.plot([*accumulated], [*accumulated.values()], color="0.6", label="everything quantized")
    axis.scatter([*own], [*own.values()], s=14, label="this layer alone quantized")
    for index, layer in enumerate(layers, 1):
        if layer.name in ranks and index in own:
            axis.annotate(layer.name, (index, own[index]), fontsize=7, color="tab:red", rotation=20)
    axis.set(xlabel="layer, in the order in which they run", ylabel="SQNR in dB")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False)
    return figure


def worst_figure(shown: Sequence[tuple[LayerError, Sequence[tuple[TensorError, Bars | None]]]]) -> Figure:
    """The histograms of the worst layers, one row each, with the levels of the grid.

    Args:
        shown: layers, with their tensors and what is to be drawn of them.
    """
    columns = max((len(drawn) for _, drawn in shown), default=1)
    figure = Figure(figsize=(4 * columns, 1.8 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), columns, squeeze=False)
    for row, (layer, drawn) in zip(axes, shown, strict=False):
        for axis in row[len(drawn) :]:
            axis.set_axis_off()
        for axis, (tensor, cut) in zip(row, drawn, strict=False):
            axis.set_title(f"{layer.name} {tensor.name}, {decibels(tensor.sqnr)}", fontsize=7)
            axis.tick_params(labelsize=6)
            if cut is not None:
                edges = [cut.start + cut.width * i for i in range(len(cut.counts) + 1)]
                axis.stairs(cut.counts, edges, fill=True, alpha=0.6)
                axis.set_yscale("symlog")
                if len(cut.levels) <= 32:
                    axis.vlines(cut.levels, 0, 1, transform=axis.get_xaxis_transform(), color="0.4", linewidth=0.4)
    return figure


def _finite(values: Mapping[int, float | None]) -> dict[int, float]:
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
