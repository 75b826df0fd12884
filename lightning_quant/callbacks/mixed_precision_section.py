"""What the report tells of mixed precision: the front of loss against cost, what was chosen, and which bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_quant.callbacks.bit_allocation import Choice
from lightning_quant.reports import Html, Section, join, tag
from lightning_quant.solvers import Budget, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"bytes": ("MB", 1e6), "BitOps": ("GBitOps a sample", 1e9), "milliseconds": ("ms a sample", 1.0)}
Marks = dict[str, Point]


def mixed_precision_section(choice: Choice, budgets: Sequence[Budget], beside: Sequence[Html] = ()) -> Section:
    """The section about one choice.

    Args:
        choice: what was chosen.
        budgets: within which.
        beside: what a method has to add.
    """
    allocation = choice.allocation
    cost = next((budget.kind for budget in budgets if budget.kind in UNITS), "BitOps")
    widths = sorted({number for options in allocation.options for option in options for number in option if number})
    marks = {f"uniform {number}": allocation.uniform(number) for number in widths}
    front = allocation.front(cost)
    within = " and ".join(budget.text for budget in budgets) or "no budget"
    explained = (
        f"Loss is what the sensitivity says that rounding does to the output, added up over all products; the line is "
        f"the best there is for each cost. Chosen within {within}: {choice}."
    )
    legend = tag(
        "p",
        tag("span", tag("b", class_="key line"), "Pareto front"),
        tag("span", tag("b", class_="key attention"), "the same bits everywhere"),
        tag("span", tag("b", class_="key dot"), "chosen"),
        class_="legend",
    )
    plot = _plot(front, marks, choice.point, cost)
    body = join([tag("p", explained), legend, plot, *_tried(choice), *beside, _table(choice)])
    facts = {
        "budget": [budget.text for budget in budgets],
        "loss": choice.point.loss,
        "costs": dict(choice.point.costs),
        "bits": {str(slot): number for slot, number in choice.bits.items()},
        "front": [{"loss": point.loss, **point.costs} for point in front],
        "uniform": {name: {"loss": point.loss, **point.costs} for name, point in marks.items()},
        "trials": [{"bits": bits, str(choice.monitor): value} for bits, value in choice.trials],
    }
    scalars = {f"mixed_precision/{name.replace(' ', '_')}": value for name, value in choice.point.costs.items()}
    figure = partial(_figure, front, marks, choice.point, cost)
    return Section("mixed_precision", "Mixed precision", facts, body, scalars, figure)


def _table(choice: Choice) -> Html:
    rows = []
    for product in choice.allocation.products:
        cells = [
            tag("td", " and ".join(dict.fromkeys(f"{slot.part} {choice.bits[slot]}" for slot in side)) or "float")
            for side in (product.left, product.right)
        ]
        rows.append(tag("tr", tag("th", tag("code", product.name), scope="row"), *cells))
    head = tag("tr", *(tag("th", name, scope="col") for name in ("product", "bits of one factor", "of the other")))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="small")
    return tag("details", tag("summary", f"The bits of {len(rows)} products"), table)


def _tried(choice: Choice) -> list[Html]:
    if not choice.trials:
        return []
    told = "; ".join(f"{value:.4g} at {bits:.2f} bits" for bits, value in choice.trials)
    return [tag("p", f"{choice.monitor} is {choice.exact:.4g} in float. Tried: {told}.")]


def _plot(front: Sequence[Point], marks: Marks, chosen: Point, cost: str, width: int = 700, height: int = 300) -> Html:
    """Loss, logarithmic, against cost, as SVG."""
    left, right, top, bottom = 44, 12, 12, 34
    points = [point for point in (*front, *marks.values(), chosen) if point.loss > 0]
    if not points:
        return tag("p", "Nothing is lost by any choice.")
    unit, scale = UNITS[cost]
    xs, ys = [point.costs[cost] / scale for point in points], [math.log10(point.loss) for point in points]
    spans = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0

    def place(point: Point) -> tuple[float, float]:
        x = left + (point.costs[cost] / scale - min(xs)) / spans[0] * (width - left - right)
        y = top + (max(ys) - math.log10(max(point.loss, 10 ** min(ys)))) / spans[1] * (height - top - bottom)
        return x, y

    parts = []
    for exponent in range(math.ceil(min(ys)), math.floor(max(ys)) + 1):
        y = top + (max(ys) - exponent) / spans[1] * (height - top - bottom)
        parts.append(tag("line", x1=left, x2=width - right, y1=y, y2=y, class_="ruler"))
        parts.append(tag("text", f"1e{exponent}", x=left - 6, y=y + 4, class_="tick", text_anchor="end"))
    for end, anchor in ((min(xs), "start"), (max(xs), "end")):
        x = left + (end - min(xs)) / spans[0] * (width - left - right)
        parts.append(tag("text", f"{end:.3g} {unit}", x=x, y=height - 10, class_="tick", text_anchor=anchor))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, front))
    parts.append(tag("polyline", points=line, class_="accumulated"))
    for name, point in {**marks, "chosen": chosen}.items():
        x, y = place(point)
        told = tag("title", f"{name}: loss {point.loss:.3g}, {point.costs[cost] / scale:.3g} {unit}")
        parts.append(tag("circle", told, cx=x, cy=y, r=5.0, class_="dot" if point is chosen else "dot attention"))
        if point is not chosen:
            parts.append(tag("text", name.split()[-1], x=x + 8, y=y - 6, class_="note"))
    label = f"Loss against {unit}: the Pareto front, uniform bits and the choice"
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="plot", role="img", aria_label=label)


def _figure(front: Sequence[Point], marks: Marks, chosen: Point, cost: str) -> Figure:
    from matplotlib.figure import Figure

    unit, scale = UNITS[cost]

    def places(points: Sequence[Point]) -> tuple[list[Any], list[Any]]:
        return [point.costs[cost] / scale for point in points], [point.loss for point in points]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(*places(front), color="0.6", label="Pareto front")
    axis.scatter(*places(list(marks.values())), label="the same bits everywhere")
    axis.scatter(*places([chosen]), label="chosen", zorder=3)
    axis.set(xlabel=unit, ylabel="loss", yscale="log")
    axis.legend(frameon=False)
    return figure
