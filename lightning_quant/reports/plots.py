"""The plots of the HTML report as inline SVG; their colours are those of the page, light or dark."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from lightning_quant.reports.bars import Bars
from lightning_quant.reports.errors import LayerError
from lightning_quant.reports.html import Html, join, tag
from lightning_quant.reports.numbers import MINUS, decibels, figure, share

# What a ratio of signal to noise means: the noise as a share of the signal, in root mean square.
LANDMARKS = {20: "10 % error", 40: "1 % error"}
WIDE, NARROW = (1040, 330), (350, 300)  # the same plot for a desk and for a pocket


def depth_plot(layers: Sequence[LayerError], worst: Mapping[str, int]) -> Html:
    """SQNR of each layer along the depth of the model, in two widths of which the page shows one.

    Args:
        layers: in the order in which they ran.
        worst: ranks to be marked, by name.
    """
    return join(_depth_plot(layers, worst, *size, kind) for size, kind in ((WIDE, "wide"), (NARROW, "narrow")))


def _depth_plot(layers: Sequence[LayerError], worst: Mapping[str, int], width: int, height: int, kind: str) -> Html:
    left, right, top, bottom = 34, 10, 12, 30
    found = [v for layer in layers for v in (layer.sqnr, layer.accumulated) if v is not None and math.isfinite(v)]
    low, high = _limits(found)
    step = (width - left - right) / max(1, len(layers))

    def x(index: float) -> float:
        return left + (index + 0.5) * step

    def y(value: float) -> float:
        value = low if math.isnan(value) else min(max(value, low), high)
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = [
        _blocks(layers, x, top, height - bottom, step),
        _ruler(low, high, left, width - right, y, kind == "wide"),
        _line([(x(i), y(layer.accumulated)) for i, layer in enumerate(layers) if layer.accumulated is not None]),
    ]
    radius = min(3.6, max(1.8, step * 0.36))
    for index, layer in enumerate(layers):
        if layer.sqnr is not None:
            rank = worst.get(layer.name)
            shape = "dot bad" if rank else "dot attention" if layer.kind == "attention" else "dot"
            dot = tag(
                "circle", tag("title", _told(layer)), cx=x(index), cy=y(layer.sqnr), r=radius + bool(rank), class_=shape
            )
            number = tag("text", rank, x=x(index), y=y(layer.sqnr) + 15, class_="rank") if rank else None
            parts.append(join([dot, number]))
    title = f"SQNR of {len(layers)} layers in the order in which they run, own and accumulated"
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_=f"plot {kind}", role="img", aria_label=title)


def histogram_plot(bars: Bars, title: str, width: int = 460, height: int = 160) -> Html:
    """A histogram, its height logarithmic, with the grid drawn over it; what lies beyond the grid is marked.

    Args:
        bars: what to draw.
        title: what they are of, for those who cannot see them.
        width: in pixels.
        height: in pixels.
    """
    left, right, top, bottom = 6, 6, 24, 22
    floor = height - bottom
    scale = (width - left - right) / (bars.end - bars.start)
    tallest = math.log1p(max([*bars.counts, 1]))

    def x(place: float) -> float:
        return left + (place - bars.start) * scale

    def y(count: int) -> float:
        return floor - math.log1p(count) / tallest * (floor - top)

    gap = (bars.levels[1] - bars.levels[0]) / 2, (bars.levels[-1] - bars.levels[-2]) / 2
    first, last = bars.levels[0] - gap[0], bars.levels[-1] + gap[1]
    tall = floor - top + 4
    parts: list[Html | None] = [
        tag("rect", x=x(first), y=top - 4, width=(last - first) * scale, height=tall, class_="range")
    ]
    centres = [bars.start + (index + 0.5) * bars.width for index in range(len(bars.counts))]
    below = "zeroed" if bars.logarithmic else "outside"
    kinds = [below if centre < first else "inside" if centre <= last else "outside" for centre in centres]
    for kind in ("inside", "outside", "zeroed"):
        path = _outline(bars, x, y, floor, [kind == one for one in kinds])
        parts.append(tag("path", d=path, class_=kind) if path else None)
    # Lines nearer than that to each other would be a grey area.
    nearest = min(after - before for before, after in zip(bars.levels, bars.levels[1:], strict=False)) * scale
    if nearest >= 3:
        comb = "".join(f"M{x(level):.1f} {top - 4}V{floor}" for level in bars.levels)
        parts.append(tag("path", d=comb, class_="grid"))
    parts.append(tag("line", x1=left, x2=width - right, y1=floor, y2=floor, class_="axis"))
    parts += _ticks(bars, x, floor, width)
    total = sum(bars.counts) + bars.below + bars.above
    for count, where, anchor, arrow, loud in (
        (bars.below, left, "start", "← {} further out", not bars.logarithmic),
        (bars.above, width - right, "end", "{} further out →", True),
    ):
        if count:
            note = arrow.format(share(count / total))
            parts.append(tag("text", note, x=where, y=12, class_="beyond" if loud else None, text_anchor=anchor))
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="plot", role="img", aria_label=title)


def curve_plot(values: Sequence[float], title: str, unit: str, width: int = 1040, height: int = 260) -> Html:
    """Ratios in decibels, one after the other, as a line.

    Args:
        values: what is infinite is left out.
        title: of the plot.
        unit: what is counted from left to right.
        width: of the drawing.
        height: of the drawing.
    """
    left, right, top, bottom = 34, 10, 12, 30
    low, high = _limits([value for value in values if math.isfinite(value)])
    step = (width - left - right) / max(1, len(values) - 1)

    def y(value: float) -> float:
        return top + (high - min(max(value, low), high)) / (high - low) * (height - top - bottom)

    places = [(left + i * step, y(value)) for i, value in enumerate(values) if math.isfinite(value)]
    ends = [(left, "start", f"{unit} 1"), (width - right, "end", f"{unit} {len(values)}")]
    labels = [tag("text", text, x=x, y=height - 8, class_="tick", text_anchor=anchor) for x, anchor, text in ends]
    parts = [_ruler(low, high, left, width - right, y, True), _line(places), *labels]
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="plot", role="img", aria_label=title)


# ---------------------------------------------------------------- pieces


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """From 0, or lower where there is more noise than signal, to at most 80 dB; in tens."""
    high = min(80, max(10, 10 * math.ceil(max(values, default=30) / 10 + 0.05)))
    low = max(-20, min(0, 10 * math.floor(min(values, default=0) / 10)))
    return low, high


def _ruler(low: float, high: float, left: float, right: float, y: Callable[[float], float], wide: bool) -> Html:
    parts = []
    for value in range(int(low), int(high) + 1, 10):
        landmark = LANDMARKS.get(value)
        parts.append(tag("line", x1=left, x2=right, y1=y(value), y2=y(value), class_="mark" if landmark else "ruler"))
        parts.append(tag("text", value, x=left - 6, y=y(value) + 4, class_="tick", text_anchor="end"))
        if landmark and wide:
            parts.append(tag("text", landmark, x=right, y=y(value) - 4, class_="note", text_anchor="end"))
    return join(parts)


def _blocks(layers: Sequence[LayerError], x: Callable[[float], float], top: float, floor: float, step: float) -> Html:
    """Stripes behind the repeated blocks of a model, and their numbers below."""
    runs: list[tuple[str, list[int]]] = [
        (key, [i for i, _ in run])
        for key, run in groupby(enumerate(layers), key=lambda item: block_of(item[1].name))
        if key
    ]
    stems = {key.rpartition(".")[0] for key, _ in runs}
    parts, free = [], 0.0
    for number, (key, indices) in enumerate(runs):
        begin, end = x(indices[0]) - step / 2, x(indices[-1]) + step / 2
        if number % 2 == 0:
            parts.append(tag("rect", x=begin, y=top, width=end - begin, height=floor - top, class_="stripe"))
        label = key.rpartition(".")[2] if len(stems) == 1 else ".".join(key.split(".")[-2:])
        middle, half = (begin + end) / 2, 3.4 * len(label) + 3
        if middle - half >= free:
            parts.append(tag("text", label, x=middle, y=floor + 18, class_="tick", text_anchor="middle"))
            free = middle + half
    return join(parts)


def block_of(name: str) -> str | None:
    """The repeated block that a layer is in: its name up to the first number.

    >>> block_of("net.blocks.3.attn.qkv"), block_of("net.head")
    ('net.blocks.3', None)
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found[0] if found else None


def _line(points: Sequence[tuple[float, float]]) -> Html | None:
    if len(points) < 2:
        return None
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_="accumulated")


def _told(layer: LayerError) -> str:
    words = [f"{layer.name} ({layer.kind}): {decibels(layer.sqnr)} of its own"]
    if layer.accumulated is not None:
        words.append(f"{decibels(layer.accumulated)} accumulated")
    return ", ".join(words)


def _outline(
    bars: Bars,
    x: Callable[[float], float],
    y: Callable[[int], float],
    floor: float,
    drawn: Sequence[bool],
) -> str:
    """The bars as one path; empty ones, and those of the other colour, are gaps."""
    path, open_ = [], False
    for index, count in enumerate(bars.counts):
        begin = bars.start + index * bars.width
        if count and drawn[index]:
            path.append(f"{'' if open_ else f'M{x(begin):.1f} {floor}'}V{y(count):.1f}H{x(begin + bars.width):.1f}")
            open_ = True
        elif open_:
            path.append(f"V{floor}Z")
            open_ = False
    return "".join(path) + (f"V{floor}Z" if open_ else "")


def _ticks(bars: Bars, x: Callable[[float], float], floor: float, width: float) -> list[Html]:
    """What the ends of the grid, and 0, stand for."""
    ends = bars.levels[0], bars.levels[-1]
    labels = [(place, figure(value, 3)) for place, value in bars.values or ()]
    labels = labels or [(level, f"level {level:g}".replace("-", MINUS)) for level in ends]
    parts, taken = [], [-math.inf]
    for place, label in sorted(labels, key=lambda item: item[0] not in ends):
        at = min(max(x(place), 5 * len(label)), width - 5 * len(label))  # also in the larger letters of a phone
        if all(abs(at - other) > 48 for other in taken):
            parts.append(tag("line", x1=x(place), x2=x(place), y1=floor, y2=floor + 4, class_="axis"))
            parts.append(tag("text", label, x=at, y=floor + 17, class_="tick", text_anchor="middle"))
            taken.append(at)
    return parts
