"""What the report tells of sparse attention: by layer and head how much was kept, how near it stayed, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from lightning_quant.kernels.sparse_attention import AttentionFacts, SiteFacts
from lightning_quant.reports import Html, Section, join, tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FINEST = 48  # cells per side of a picture
COLUMNS = {
    "kept_share": "keys kept",
    "kept_mass": "their attention",
    "error": "error",
    "plain_error": "error if not rectified",
}


def sparse_attention_section(sites: Mapping[str, SiteFacts]) -> Section:
    """The section about these sites.

    Args:
        sites: from ``RectifiedSparseAttention.facts()``.
    """
    compared = {name: site.sampled for name, site in sites.items() if site.sampled is not None}
    rows = [_row(name, sampled, sites[name]) for name, sampled in compared.items()]
    head = tag("tr", *(tag("th", name, scope="col") for name in ("layer", *COLUMNS.values())))
    told = (
        "Means over the heads, each head in the tip. Kept keys include the text that everyone sees; the attention they "
        "have and the error relative to dense attention are those of sampled queries of the first sparse call."
    )
    pictures = [
        tag("figure", _picture(sampled), tag("figcaption", tag("code", name))) for name, sampled in compared.items()
    ]
    body = join(
        [
            tag("table", tag("caption", told), tag("thead", head), tag("tbody", *rows), class_="layers"),
            tag("p", "Kept blocks, queries downwards, keys to the right; the darker, the more heads keep them."),
            tag("div", *pictures, style="display:flex;flex-wrap:wrap;gap:12px"),
            _dense(sites),
        ]
    )
    means = {column: [float(getattr(x, column).mean()) for x in compared.values()] for column in COLUMNS}
    scalars = {f"sparse_attention/{column}": sum(x) / len(x) if x else None for column, x in means.items()}
    facts = {name: _facts(site) for name, site in sites.items()}
    return Section("sparse_attention", "Sparse attention", facts, body, scalars, partial(_figure, compared))


def _row(name: str, sampled: AttentionFacts, site: SiteFacts) -> Html:
    cells = []
    for column in COLUMNS:
        heads: Tensor = getattr(sampled, column)
        each = ", ".join(f"{float(x):.1%}" for x in heads)
        cells.append(tag("td", f"{float(heads.mean()):.1%}", class_="number", title=each))
    return tag("tr", tag("th", tag("code", name), tag("span", site.layouts[0], class_="kind"), scope="row"), *cells)


def _picture(sampled: AttentionFacts, size: int = 150) -> Html:
    """One path per shade: a report of sixty layers stays small."""
    shades = _shades(sampled)
    count = shades.size(0)
    paths = []
    for low in (0.01, 0.34, 0.67):  # drawn over each other
        cells = ((shades >= low).nonzero()).tolist()
        runs: list[list[int]] = []
        for y, x in cells:
            if runs and runs[-1][0] == y and runs[-1][1] + runs[-1][2] == x:
                runs[-1][2] += 1
            else:
                runs.append([y, x, 1])
        path = "".join(f"M{x} {y}h{length}v1h-{length}z" for y, x, length in runs)
        paths.append(tag("path", d=path, fill="currentColor", fill_opacity=0.35))
    box = {"viewBox": f"0 0 {count} {count}", "width": size, "height": size, "role": "img", "aria-label": "kept blocks"}
    return tag("svg", *paths, style="border:1px solid currentColor", **box)


def _shades(sampled: AttentionFacts) -> Tensor:
    """Share of heads and samples that keep a block, at most :data:`FINEST` cells on a side."""
    kept = sampled.kept.mean(0)
    if kept.size(0) > FINEST:
        kept = F.adaptive_avg_pool2d(kept[None, None], FINEST)[0, 0]
    return kept


def _dense(sites: Mapping[str, SiteFacts]) -> Html | None:
    calls = [
        f"{name}: {count} ({reason})" for name, site in sites.items() for reason, count in site.dense_calls.items()
    ]
    return tag("p", f"Calls that stayed dense: {'; '.join(calls)}.") if calls else None


def _facts(site: SiteFacts) -> dict[str, Any]:
    sampled = {} if site.sampled is None else {column: getattr(site.sampled, column).tolist() for column in COLUMNS}
    return {
        "layouts": site.layouts,
        "sparse_calls": site.sparse_calls,
        "dense_calls": dict(site.dense_calls),
        "mean_kept_share": None if site.kept_share is None else site.kept_share.tolist(),
        **sampled,
    }


def _figure(compared: Mapping[str, AttentionFacts]) -> Figure:
    from matplotlib.figure import Figure

    columns = min(6, max(1, len(compared)))
    figure = Figure(figsize=(2 * columns, 2.2 * max(1, -(-len(compared) // columns))), layout="constrained")
    axes = list(figure.subplots(max(1, -(-len(compared) // columns)), columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, sampled) in zip(axes, compared.items(), strict=False):
        axis.imshow(_shades(sampled).numpy(), cmap="Greys", vmin=0, vmax=1)
        axis.set_title(name, fontsize=6)
    return figure
