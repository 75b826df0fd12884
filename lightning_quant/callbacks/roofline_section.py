"""What the report tells of the roofline: a table of operators for each stage, and where they stand below the roof."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_quant.graph import Machine, Work
from lightning_quant.reports import Html, Section, join, tag
from lightning_quant.reports.numbers import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 330, 64, 40, 14, 14
LARGEST = 12  # operators in a table


@dataclass(frozen=True)
class Comparison:
    """The operators of one stage, in float and as quantized.

    Args:
        machine: on which.
        stage: which.
        batch: samples.
        tokens: of the prompt.
        before: the operators in float.
        after: the same as quantized.
    """

    machine: Machine
    stage: str
    batch: int
    tokens: int
    before: list[Work]
    after: list[Work]

    @property
    def speedup(self) -> float:
        """How many times as fast the quantized model is at best."""
        after = sum(each.seconds for each in self.after)
        return sum(each.seconds for each in self.before) / after if after else 1.0


def roofline_section(comparisons: Sequence[Comparison], cache: float) -> Section:
    """The section about these stages.

    Args:
        comparisons: one for each stage.
        cache: bytes of the keys and values of the prompt in 16 bits.
    """
    first = comparisons[0]
    told = (
        f"Lower bounds on {first.machine.name} ({first.machine.bandwidth / 1e9:.0f} GB/s, "
        f"{first.machine.peak / 1e12:.4g} TOPS in 16 bits), batch {first.batch}, prompt of {first.tokens} tokens; "
        f"its keys and values take {size(cache)} in 16 bits. Only relations mean something."
    )
    body = join([tag("p", told), *(part for comparison in comparisons for part in _stage(comparison))])
    return Section(
        "roofline",
        "Roofline",
        {comparison.stage: _facts(comparison) for comparison in comparisons},
        body,
        {f"roofline/{comparison.stage}_seconds": _total(comparison.after) for comparison in comparisons},
        partial(_figure, comparisons),
    )


def _stage(comparison: Comparison) -> Iterable[Html]:
    yield tag("h3", f"{comparison.stage.capitalize()}: at best {comparison.speedup:.2f} times as fast")
    yield tag(
        "figure",
        _plot(comparison),
        tag("figcaption", "Each operator by what it computes for a byte; open in 16 bits, filled as quantized."),
    )
    names = ("operator", "kind", "OPs", "bytes", "OPs a byte", "bound by", "time", "in 16 bits")
    rows = sorted(zip(comparison.before, comparison.after, strict=True), key=lambda pair: -pair[0].seconds)
    caption = f"The {min(LARGEST, len(rows))} of {len(rows)} operators that take longest in 16 bits, and all of them."
    sums = [
        tag("th", "all", scope="row"),
        tag("td", ""),
        tag("td", _count(sum(w.ops for w in comparison.after)), class_="number"),
        tag("td", size(sum(w.bytes for w in comparison.after)), class_="number"),
        tag("td", ""),
        tag("td", ""),
        tag("td", _time(_total(comparison.after)), class_="number"),
        tag("td", _time(_total(comparison.before)), class_="number"),
    ]
    yield tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names))),
        tag("tbody", *(_row(before, after) for before, after in rows[:LARGEST]), tag("tr", *sums)),
        class_="layers",
    )


def _row(before: Work, after: Work) -> Html:
    numbers = [_count(after.ops), size(after.bytes), f"{after.intensity:.3g}"]
    return tag(
        "tr",
        tag("th", tag("code", after.name), scope="row"),
        tag("td", after.kind),
        *(tag("td", number, class_="number") for number in numbers),
        tag("td", after.bound),
        tag("td", _time(after.seconds), class_="number"),
        tag("td", _time(before.seconds), class_="number"),
    )


def _plot(comparison: Comparison) -> Html:
    """Attainable operations a second over operations a byte, both logarithmic."""
    machine = comparison.machine
    x_range, y_range = _ranges(comparison)

    def x(value: float) -> float:
        low, high = x_range
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        low, high = y_range
        return HEIGHT - BOTTOM - (math.log10(value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = [_axes(x, y, x_range, y_range)]
    roofs = {"16 bits": False} | ({"8 bits": True} if machine.peak_int8 is not None else {})
    for label, low_bits in roofs.items():
        peak = machine.peak_at(low_bits)
        start, ridge = 10 ** x_range[0], peak / machine.bandwidth
        points = [(start, start * machine.bandwidth), (ridge, peak), (10 ** x_range[1], peak)]
        path = " ".join(f"{x(a):.1f},{y(max(b, 10 ** y_range[0])):.1f}" for a, b in points)
        parts.append(tag("polyline", points=path, fill="none", stroke="currentColor", stroke_width=1.5, opacity=0.7))
        parts.append(
            tag("text", label, x=WIDTH - RIGHT - 4, y=y(peak) - 5, text_anchor="end", font_size=11, fill="currentColor")
        )
    for filled, done in ((False, comparison.before), (True, comparison.after)):
        for each in done:
            if each.ops > 0 and each.bytes > 0:
                title = tag("title", f"{each.name} ({each.kind}): {each.intensity:.3g} OPs a byte, {each.bound}")
                fill = {"fill": "currentColor"} if filled else {"fill": "none", "stroke": "currentColor"}
                parts.append(
                    tag("circle", title, cx=x(each.intensity), cy=y(each.ops / each.seconds), r=4, opacity=0.55, **fill)
                )
    label = f"roofline of {comparison.stage} on {machine.name}"
    box = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label, "style": "max-width:100%"}
    return tag("svg", *parts, **box)


def _axes(x: Any, y: Any, x_range: tuple[float, float], y_range: tuple[float, float]) -> Html:
    parts = []
    for power in range(math.ceil(x_range[0]), math.floor(x_range[1]) + 1):
        at, line = x(10.0**power), {"stroke": "currentColor", "opacity": 0.15}
        parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, **line))
        parts.append(
            tag(
                "text",
                f"{10.0**power:g}",
                x=at,
                y=HEIGHT - BOTTOM + 16,
                text_anchor="middle",
                font_size=11,
                fill="currentColor",
            )
        )
    for power in range(math.ceil(y_range[0]), math.floor(y_range[1]) + 1):
        at, line = y(10.0**power), {"stroke": "currentColor", "opacity": 0.15}
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, **line))
        parts.append(
            tag(
                "text",
                _count(10.0**power) + "/s",
                x=LEFT - 6,
                y=at + 4,
                text_anchor="end",
                font_size=11,
                fill="currentColor",
            )
        )
    parts.append(
        tag(
            "text",
            "operations a byte",
            x=(LEFT + WIDTH) / 2,
            y=HEIGHT - 6,
            text_anchor="middle",
            font_size=12,
            fill="currentColor",
        )
    )
    return join(parts)


def _ranges(comparison: Comparison) -> tuple[tuple[float, float], tuple[float, float]]:
    """Powers of ten between which everything lies."""
    machine = comparison.machine
    done = [w for w in (*comparison.before, *comparison.after) if w.ops > 0 and w.bytes > 0]
    peak = machine.peak_at(True)
    intensities = [*(w.intensity for w in done), peak / machine.bandwidth]
    rates = [*(w.ops / w.seconds for w in done), peak, machine.peak]
    low, high = math.log10(min(intensities)) - 0.2, math.log10(max(intensities)) + 0.4
    return (low, high), (math.log10(min(rates)) - 0.2, math.log10(max(rates)) + 0.2)


def _figure(comparisons: Sequence[Comparison]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(comparisons), 3.6), layout="constrained")
    for axis, comparison in zip(figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons, strict=True):
        machine = comparison.machine
        (low, high), _ = _ranges(comparison)
        steps = [10 ** (low + (high - low) * i / 200) for i in range(201)]
        for low_bits in (False, True):
            axis.plot(steps, [machine.attainable(step, low_bits) for step in steps], color="0.4", linewidth=1)
        for done, face in ((comparison.before, "none"), (comparison.after, "C0")):
            points = [(w.intensity, w.ops / w.seconds) for w in done if w.ops > 0 and w.bytes > 0]
            axis.scatter(*zip(*points, strict=True), facecolors=face, edgecolors="C0", s=18)
        axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
        axis.set_title(f"{comparison.stage} on {machine.name}: {comparison.speedup:.2f}x", fontsize=9)
    return figure


def _facts(comparison: Comparison) -> dict[str, Any]:
    return {
        "hardware": comparison.machine.name,
        "batch": comparison.batch,
        "tokens": comparison.tokens,
        "speedup": comparison.speedup,
        "operators": [
            {"float": before._asdict(), "quantized": after._asdict()}
            for before, after in zip(comparison.before, comparison.after, strict=True)
        ],
    }


def _total(done: Sequence[Work]) -> float:
    return sum(each.seconds for each in done)


def _count(value: float) -> str:
    """Operations, with their unit.

    >>> _count(68_719_476_736.0), _count(12.0)
    ('68.7 G', '12 ')
    """
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    """A short time.

    >>> _time(0.00000123), _time(0.5)
    ('1.23 µs', '500 ms')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError
