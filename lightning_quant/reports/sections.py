"""The sections that every report has, in the order in which they tell their story."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from lightning_quant.quantizers import Scheme
from lightning_quant.reports.bars import Bars, bars
from lightning_quant.reports.errors import LayerError, TensorError
from lightning_quant.reports.findings import Findings, main_cause, spare
from lightning_quant.reports.html import Html, join, tag
from lightning_quant.reports.numbers import change, decibels, figure, share, size
from lightning_quant.reports.numbers import sizes as sizes_of
from lightning_quant.reports.plots import depth_plot, histogram_plot
from lightning_quant.reports.section import Section


def standard_sections(found: Findings, extra: Iterable[Section] = ()) -> list[Section]:
    """All sections of a report.

    Args:
        found: what there is to tell.
        extra: what others have to tell; it stands behind the table of layers.
    """
    own = [summary(found)]
    if found.after:
        own.append(metrics(found))
    if found.layers:
        own += [depth(found), worst(found), table(found)]
    return [*own, *extra, left_float(found), made(found)]


def title_of(found: Findings) -> str:
    """The title of a report: method, bits, model."""
    if not found.layers:
        return f"Nothing is quantized: {found.model}"
    return f"{found.method} {found.bits}: {found.model}"


# ---------------------------------------------------------------- the headline


def summary(found: Findings) -> Section:
    """What was done, what it saved and what it cost, at a glance."""
    sizes, metric = found.sizes, found.headline_metric
    facts = {
        "model": found.model,
        "method": found.method,
        "bits": found.bits,
        "bytes_before": sizes.before,
        "bytes_after": sizes.after,
        "parameters": sizes.parameters,
        "bits_per_parameter": sizes.bits,
        "quantized": len(found.layers),
        "left_float": len(found.skipped),
        "output_sqnr": found.output,
        "headline_metric": metric,
        "weights_loaded_as_codes": found.loaded,
    }
    heading = tag(
        "header",
        tag("p", "Quantization report", class_="eyebrow"),
        tag("h1", found.method if found.layers else "Nothing is quantized", " ", tag("em", found.bits)),
        tag("p", found.model, class_="model"),
    )
    if not found.layers:
        advice = (
            "No layer of this model is quantized, so there is nothing to compare. Add a quantization callback beside "
            "QuantReport (in trainer.fit with during_fit=True), or load a quantized checkpoint."
        )
        return Section("summary", "", facts, join([heading, tag("p", advice, class_="lead")]))
    tiles = [
        _tile(
            "Size",
            _from_to(*sizes_of(sizes.before, sizes.after)),
            f"{sizes.ratio:.1f}\u00d7 smaller, {sizes.bits:.1f} bits a parameter",
        )
    ]
    if metric is not None:
        before, after = found.before.get(metric), found.after[metric]
        told = figure(after, 3) if before is None else _from_to(figure(before, 3), figure(after, 3))
        tiles.append(_tile(metric, told, "float not measured" if before is None else change(before, after)))
    if found.output is not None:
        tiles.append(_tile("Output SQNR", decibels(found.output), _as_error(found.output)))
    sites = sum(layer.kind == "attention" for layer in found.layers)
    layers = f"{len(found.layers) - sites}" + (f" + {sites} attention" if sites else "")
    tiles.append(_tile("Quantized layers", layers, f"{len(found.skipped) or 'none'} left float"))
    scalars = {
        "bytes_before": float(sizes.before),
        "bytes_after": float(sizes.after),
        "bits_per_parameter": sizes.bits,
        "output_sqnr": found.output,
        "worst_layer_sqnr": found.worst_layers[0].sqnr if found.worst_layers else None,
    }
    body = join([heading, tag("div", *tiles, class_="tiles"), _lead(found)])
    return Section("summary", "", facts, body, scalars)


def _from_to(before: str, after: str) -> Html:
    return join([before, tag("i", "→"), after], " ")


def _tile(label: str, value: object, note: str) -> Html:
    return tag("div", tag("p", label, class_="label"), tag("p", value, class_="value"), tag("p", note, class_="sub"))


def _lead(found: Findings) -> Html | None:
    if not found.worst_layers:
        return None
    first = found.worst_layers[0]
    return tag(
        "p",
        tag("code", _shown(first)),
        f" is hit hardest: quantized alone, its output keeps {decibels(first.sqnr)}",
        _blame(first),
        ".",
        class_="lead",
    )


def _blame(layer: LayerError) -> str:
    cause = main_cause(layer)
    return "" if cause is None else f", {share(round(cause[1], 2))} of the noise from its {cause[0].name}"


def _as_error(value: float) -> str:
    if not math.isfinite(value):
        return "the same as in float" if value > 0 else "not a number"
    return f"noise of {share(float(f'{10 ** (-value / 20):.2g}'))} of the signal"


# ---------------------------------------------------------------- metrics


def metrics(found: Findings) -> Section:
    """Every metric of the run, before and after."""
    facts = {
        name: {"before": found.before.get(name), "after": value}
        for name, value in sorted(found.after.items(), key=lambda item: (item[0].startswith("fidelity/"), item[0]))
    }
    known = any(name in found.before for name in facts)
    if known and len(facts) == 1:  # the headline has told it
        return Section("metrics", "", facts, Html())
    rows = []
    for name in facts:
        before, after = found.before.get(name), found.after[name]
        cells = [tag("th", name, scope="row")]
        if known:
            cells.append(tag("td", "–" if before is None else figure(before), class_="number"))
        cells.append(tag("td", figure(after), class_="number"))
        if known:
            cells.append(tag("td", "" if before is None else change(before, after), class_="number"))
        rows.append(tag("tr", *cells))
    names = ("metric", "float", "quantized", "change") if known else ("metric", "quantized")
    head = tag("tr", *(tag("th", name, scope="col", class_="number" if i else None) for i, name in enumerate(names)))
    note = None
    if not known:
        note = tag("p", "The float model was not measured: ", tag("code", "QuantReport(float_metrics=True)"), " does.")
    body = join([tag("table", tag("thead", head), tag("tbody", *rows), class_="small"), note])
    return Section("metrics", "Metrics", facts, body)


# ---------------------------------------------------------------- where the error is


def depth(found: Findings) -> Section:
    """SQNR along the depth of the model."""
    ran = [layer for layer in found.layers if layer.depth is not None]
    ranks = {layer.name: rank for rank, layer in enumerate(found.worst_layers, 1)}
    legend = [
        tag("span", tag("b", class_="key dot"), "a layer, if it alone is quantized"),
        tag("span", tag("b", class_="key attention"), "attention") if _has_attention(ran) else None,
        tag("span", tag("b", class_="key bad"), f"the worst {len(ranks)}"),
        tag("span", tag("b", class_="key line"), "if everything is: what has accumulated at its output"),
    ]
    explained = (
        "Signal to quantization noise at the output of each layer, in dB, from the first layer to run to the last. "
        "Higher is better; 6 dB is one bit."
    )
    facts = [{"name": layer.name, "own": layer.sqnr, "accumulated": layer.accumulated} for layer in ran]
    if not ran:
        body = tag("p", "No batch ran, so only the weights are known: see the table.")
        return Section("depth", "Where the error is", facts, body)
    note = None
    if found.loaded:
        told = "The weights were loaded as codes, so what rounding did to them cannot be seen: this is of inputs alone."
        note = tag("p", tag("strong", told))
    body = join([tag("p", explained), note, tag("p", *legend, class_="legend"), depth_plot(ran, ranks)])
    return Section("depth", "Where the error is", facts, body, figure=partial(_depth_figure, ran, ranks))


def _has_attention(layers: list[LayerError]) -> bool:
    return any(layer.kind == "attention" for layer in layers)


def _depth_figure(layers: list[LayerError], ranks: dict[str, int]) -> Any:
    from lightning_quant.reports.figures import depth_figure

    return depth_figure(layers, ranks)


# ---------------------------------------------------------------- the worst layers


def worst(found: Findings) -> Section:
    """The layers of lowest SQNR: what is rounded in them, and how the grid lies over it."""
    shown = [(layer, [(tensor, bars(tensor)) for tensor in layer.tensors]) for layer in found.worst_layers]
    cards = [_card(rank, layer, drawn) for rank, (layer, drawn) in enumerate(shown, 1)]
    facts = [
        {**layer_facts(layer), "histograms": {tensor.name: cut.facts for tensor, cut in drawn if cut is not None}}
        for layer, drawn in shown
    ]
    explained = (
        "Values as bars, their height logarithmic; the levels of the grid as lines over them. "
        "What lies beyond the grid is clipped to its ends."
    )
    advice = tag("p", "To spare them: ", tag("code", spare(found.worst_layers)), class_="advice")
    body = join([tag("p", explained), tag("div", *cards, class_="cards"), advice])
    title = f"The {len(cards)} worst layers" if len(cards) > 1 else "The worst layer"
    return Section("worst", title, facts, body, figure=partial(_worst_figure, shown))


def _card(rank: int, layer: LayerError, drawn: list[tuple[TensorError, Bars | None]]) -> Html:
    heading = tag(
        "h3",
        tag("span", rank, class_="number-in-ring"),
        tag("code", _shown(layer)),
        tag("span", decibels(layer.sqnr), class_="score"),
    )
    blame = _blame(layer).removeprefix(", ")
    about = f"{layer.kind}; {blame}" if blame else layer.kind
    figures = [_histogram(layer, tensor, cut) for tensor, cut in drawn]
    return tag("article", heading, tag("p", about, class_="about"), tag("div", *figures, class_="pair"))


def _histogram(layer: LayerError, tensor: TensorError, cut: Bars | None) -> Html:
    told = [decibels(tensor.sqnr)]
    if tensor.clipped:
        told.append(f"{share(tensor.clipped)} clipped")
    if tensor.zeroed:
        told.append(f"{share(tensor.zeroed)} rounded to 0")
    caption = tag("figcaption", tag("b", tensor.name), " ", tag("code", tensor.scheme), tag("br"), ", ".join(told))
    if cut is None:
        return tag("figure", caption, tag("p", "nothing finite was seen", class_="sub"))
    title = f"Histogram of the {tensor.name} of {layer.name}, format {tensor.scheme}: {', '.join(told)}"
    return tag("figure", caption, histogram_plot(cut, title))


def _worst_figure(shown: list[tuple[LayerError, list[tuple[TensorError, Bars | None]]]]) -> Any:
    from lightning_quant.reports.figures import worst_figure

    return worst_figure(shown)


# ---------------------------------------------------------------- all layers


def layer_facts(layer: LayerError) -> dict[str, Any]:
    """One layer, for programs."""
    return {
        "name": layer.name,
        "kind": layer.kind,
        "pruned": layer.pruned,
        "depth": layer.depth,
        "sqnr": layer.sqnr,
        "sqnr_accumulated": layer.accumulated,
        "tensors": {
            tensor.name: {
                "format": tensor.scheme,
                "bits": tensor.bits,
                "sqnr": tensor.sqnr,
                "clipped": tensor.clipped,
                "rounded_to_zero": tensor.zeroed,
            }
            for tensor in layer.tensors
        },
    }


def table(found: Findings) -> Section:
    """Every quantized layer, the worst first."""
    ordered = sorted(found.layers, key=lambda layer: -layer.badness)
    top = max((layer.sqnr for layer in ordered if layer.sqnr is not None and math.isfinite(layer.sqnr)), default=1.0)
    columns = {
        "layer": "",
        "format": "format",
        "SQNR": "number",
        "accumulated": "number wide",
        "weight": "number wide",
        "input": "number wide",
        "size": "number wide",
    }
    head = [
        tag("th", tag("button", name, type="button"), scope="col", class_=classes or None)
        for name, classes in {"#": "number wide", **columns}.items()
    ]
    rows = [_row(layer, found.sizes.layers.get(layer.name), max(top, 1.0)) for layer in ordered]
    facts = []
    for layer in ordered:
        before, after = found.sizes.layers.get(layer.name, (None, None))
        facts.append({**layer_facts(layer), "bytes_before": before, "bytes_after": after})
    told = "SQNR in dB: of the layer's output if it alone is quantized, if everything is (accumulated), of its tensors."
    caption = tag("caption", told)
    body = tag("table", caption, tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="layers sortable")
    return Section("layers", "All layers", facts, body)


def _row(layer: LayerError, sizes: tuple[int, int] | None, top: float) -> Html:
    part = 0.0 if layer.sqnr is None or math.isnan(layer.sqnr) else min(1.0, max(0.0, layer.sqnr / top))
    name = tag("th", tag("code", _shown(layer)), tag("span", layer.kind, class_="kind"), scope="row")
    weight = min((t.sqnr for t in layer.weights if t.sqnr is not None), default=None)
    operand = min((t.sqnr for t in layer.inputs if t.sqnr is not None), default=None)
    saved = "" if sizes is None else _from_to(*sizes_of(*sizes))
    bar = tag("span", tag("b", style=f"width:{100 * part:.0f}%"), class_="bar", aria_hidden="true")
    return tag(
        "tr",
        tag("td", "–" if layer.depth is None else layer.depth, class_="number wide", data_key=layer.depth or 10**6),
        name,
        tag("td", _formats(layer), class_="format"),
        tag(
            "td",
            bar,
            tag("span", decibels(layer.sqnr, unit=False)),
            class_="number sqnr",
            data_key=_sortable(layer.sqnr),
        ),
        *(
            tag("td", decibels(value, unit=False), class_="number wide", data_key=_sortable(value))
            for value in (layer.accumulated, weight, operand)
        ),
        tag("td", saved, class_="number wide", data_key=0 if sizes is None else sizes[0]),
    )


def _formats(layer: LayerError) -> Html:
    """``int4 / int4``, in full when one points at it."""
    pruned = [] if layer.pruned is None else [f"pruned {layer.pruned}"]
    brief = dict.fromkeys([*pruned, *(_brief(tensor.scheme) for tensor in layer.tensors)])
    full = ", ".join([*pruned, *(f"{tensor.name} {tensor.scheme}" for tensor in layer.tensors)])
    return tag("span", " · ".join(brief), title=full)


def _brief(text: str) -> str:
    scheme = Scheme.parse(text)
    words = text.split("_")
    return words[0] if scheme.kind == "int" else "_".join(words[:2])


def _sortable(value: float | None) -> str:
    return "1e9" if value is None else "-1e9" if math.isnan(value) else str(max(-1e8, min(1e8, value)))


def _shown(layer: LayerError) -> str:
    """The name as people think of it: attention is part of the module that attends."""
    name = layer.name.replace("_orig_mod.", "")
    return name.replace(".attention_quantizers.0", "").replace("attention_quantizers.", "call ")


# ---------------------------------------------------------------- what stayed float, and how it was made


def left_float(found: Findings) -> Section:
    """Which layers stayed float and why, and what else is stored in floats."""
    rest = found.sizes.after - sum(after for _, after in found.sizes.layers.values())
    facts = {"layers": found.skipped, "bytes_of_everything_else": rest}
    reasons: dict[str, list[str]] = {}
    for name, why in found.skipped.items():
        reasons.setdefault(why, []).append(name)
    rows = [
        tag("tr", tag("th", join([tag("code", name) for name in names], ", "), scope="row"), tag("td", why))
        for why, names in reasons.items()
    ]
    parts: list[Html] = []
    if rows:
        head = tag("tr", tag("th", "layer", scope="col"), tag("th", "why", scope="col"))
        parts.append(tag("table", tag("thead", head), tag("tbody", *rows), class_="small"))
    else:
        parts.append(tag("p", "Every layer that can be quantized is."))
    told = "norms, biases, embeddings of positions, scales of activations and buffers"
    if found.layers:
        parts.append(tag("p", f"Beside the weights above, {size(rest)} are stored as they were: {told}."))
    return Section("left_float", "What stayed float", facts, join(parts))


def made(found: Findings) -> Section:
    """Versions, arguments, data: enough to make it again."""
    methods = [{"method": plan.method, "part": part, "arguments": plan.arguments} for part, plan in found.plans]
    calibrations = dict.fromkeys(plan.calibration for _, plan in found.plans if plan.calibration)
    facts = {**found.made, "calibration": list(calibrations), "methods": methods}
    rows = [*((name, str(value)) for name, value in found.made.items()), *(("calibrated", on) for on in calibrations)]
    terms = [join([tag("dt", name), tag("dd", value)]) for name, value in rows]
    for part, plan in found.plans:
        given = {name: value for name, value in plan.arguments.items() if value not in (None, [], {})}
        written = f"{plan.method}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
        terms.append(join([tag("dt", f"method on {part}" if part else "method"), tag("dd", tag("code", written))]))
    return Section("made", "How this was made", facts, tag("dl", *terms))
