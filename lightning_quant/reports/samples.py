"""What the report shows of a sampler: its images beside those of the float twin, and the error from step to step."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_quant.modules import DiffusionMixin
from lightning_quant.reports.html import Html, join, tag
from lightning_quant.reports.numbers import decibels
from lightning_quant.reports.plots import curve_plot
from lightning_quant.reports.section import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # samples in a row


def sample_sections(model: nn.Module) -> list[Section]:
    """The section about the samples that the last validation drew, if the model samples and they were compared.

    Args:
        model: a :class:`~lightning_quant.DiffusionModule`, or anything else.
    """
    judge = getattr(model, "judge", None) if isinstance(model, DiffusionMixin) else None
    if judge is None or judge.shown is None:
        return []
    own, twin = (images[:SHOWN] for images in judge.shown)
    ratios = [float(metric.compute()) for metric in judge.steps]
    rows = _rows(own, twin)
    pictures = [
        tag("figure", tag("figcaption", tag("b", name), f" {told}"), _picture(image, name, difference))
        for (name, told), image, difference in zip(
            (
                ("float", "the float twin's samples"),
                ("quantized", "the model's, from the same seeds"),
                ("difference", "the second minus the first, red above and blue below"),
            ),
            rows,
            (False, False, True),
            strict=True,
        )
    ]
    told = (
        f"After each of {len(ratios)} steps the model's samples are compared with those of its float twin, from the "
        f"same seeds; the last ones keep {decibels(ratios[-1])}."
    )
    body = join([*pictures, tag("p", told), curve_plot(ratios, "SQNR after each step of the trajectory", "step")])
    facts = {"sqnr": [ratio if math.isfinite(ratio) else None for ratio in ratios]}
    return [Section("samples", "Samples", facts, body, {"samples/sqnr": ratios[-1]}, lambda: _figure(rows, ratios))]


def _rows(own: Tensor, twin: Tensor) -> list[Tensor]:
    """Each side by side: the twin's, the model's, and the difference; (H, N W) or (H, N W, 3)."""
    low, high = float(twin.min()), float(twin.max())
    scaled = [(images - low) / max(high - low, 1e-12) for images in (twin, own)]
    return [_strip(images) for images in (*scaled, 0.5 + (scaled[1] - scaled[0]).mean(1, keepdim=True))]


def _strip(images: Tensor) -> Tensor:
    images = images if images.shape[1] == 3 else images[:, :1]  # of a latent the first channel
    strip = torch.cat(list(images), dim=2).clamp(0, 1)  # (C, H, N W)
    return strip.permute(1, 2, 0) if len(strip) == 3 else strip[0]


def _picture(strip: Tensor, name: str, difference: bool) -> Html:
    from matplotlib.image import imsave

    written = io.BytesIO()
    imsave(written, strip.numpy(), format="png", cmap="seismic" if difference else "gray", vmin=0, vmax=1)
    source = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    return tag("img", src=source, alt=f"{name} samples", style="width:100%;max-width:1040px;image-rendering:pixelated")


def _figure(rows: list[Tensor], ratios: list[float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(4, 1, height_ratios=[1, 1, 1, 2])
    for axis, strip, name in zip(axes, rows, ("float", "quantized", "difference"), strict=False):
        axis.imshow(strip.numpy(), cmap="seismic" if name == "difference" else "gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    axes[3].plot(range(1, len(ratios) + 1), ratios)
    axes[3].set(xlabel="step", ylabel="SQNR in dB")
    axes[3].grid(axis="y", alpha=0.3)
    return figure
