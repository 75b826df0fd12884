"""Range statistics gathered while batches stream by, in memory that does not grow with their number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_quant.quantizers.base import Quantizer
from lightning_quant.quantizers.histogram import Histogram
from lightning_quant.quantizers.ranges import Distribution, RangeRule, histogram_bins, search

__all__ = ["Observer", "refuse_nonfinite"]


def refuse_nonfinite(x: Tensor, name: str) -> None:
    """Raises if ``x`` holds NaN or infinity, which would spoil every scale calibrated from it.

    Args:
        x: A tensor of the calibration stream.
        name: The layer's name, for the message.

    Raises:
        ValueError: If an element is NaN or infinite.

    Example:
        >>> refuse_nonfinite(torch.tensor([0.0, float("nan")]), "blocks.0.fc1")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: blocks.0.fc1 met NaN or infinity in a calibration batch; check the calibration data ...
    """
    # Extremes carry NaN, and one fused pass is cheaper than a mask.
    if x.numel() and not all(bool(extreme.isfinite()) for extreme in torch.aminmax(x)):
        raise ValueError(
            f"{name or 'a quantizer'} met NaN or infinity in a calibration batch; "
            "check the calibration data (calibration_loader) and the float model."
        )


class Observer:
    """Watches an activation and freezes the quantizer's range at the end.

    It keeps exact extremes and, for the rules that search, a :class:`Histogram`; ``running`` keeps the extremes of each
    batch. What it keeps depends only on the data, so ranks that each saw a part and exchanged their :meth:`state` once,
    in any order, freeze identical scales, and the same ones as a single process. For ``running`` the i-th batches of
    all ranks count as one global batch.

    Args:
        quantizer: The quantizer to set. Its scheme is static, per tensor or per channel.
        rule: How the range is found.
        name: The layer's name, for messages.

    Raises:
        ValueError: If the quantizer's granularity cannot be observed.

    Example:
        >>> from lightning_quant.quantizers import UniformQuantizer
        >>> quantizer = UniformQuantizer("uint8_asym")
        >>> quantizer.observer = observer = Observer(quantizer, "minmax", name="blocks.0.fc1")
        >>> for batch in torch.tensor([[0.0, 25.0], [-0.5, 3.0]]):
        ...     _ = quantizer(batch)  # hands on the floats
        >>> observer.freeze()
        >>> quantizer.observer = None
        >>> quantizer.scale
        tensor(0.1000)
    """

    def __init__(self, quantizer: Quantizer, rule: RangeRule | str = "minmax", name: str = "") -> None:
        if quantizer.scheme.dynamic or quantizer.scheme.granularity not in ("tensor", "channel"):
            raise ValueError(
                f'{name or "a quantizer"} has format "{quantizer.scheme}", which has no range to observe; '
                "observe static formats per tensor or per channel."
            )
        self.quantizer = quantizer
        self.rule = RangeRule.parse(rule)
        self.name = name
        self.seen = 0
        self._lo: Tensor | None = None  # (rows,)
        self._hi: Tensor | None = None
        self._histogram: Histogram | None = None
        self._batches: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Takes one batch into account and returns it unchanged.

        Raises:
            ValueError: If the batch holds NaN or infinity.
        """
        if x.numel() == 0:
            return x
        rows = self.quantizer.rows(x.detach().float())
        lo, hi = rows.amin(1), rows.amax(1)  # several times faster than torch.aminmax along an axis
        refuse_nonfinite(torch.cat([lo, hi]), self.name)
        if self.rule.name == "running":
            self._batches.append((lo, hi))
        elif self.rule.name != "minmax":
            self._add(Histogram.of(rows, histogram_bins(len(rows))))
        self._widen(lo, hi)
        self.seen += x.numel()
        return x

    def freeze(self) -> None:
        """Sets the quantizer from what was seen.

        Raises:
            ValueError: If nothing was seen.
        """
        if self._lo is None or self._hi is None:
            raise ValueError(
                f"{self.name or 'a quantizer'} saw no calibration data; "
                "leave the layer out (skip) or give batches that reach it (calibration_loader)."
            )
        lo, hi = self._running_extremes() if self._batches else (self._lo, self._hi)
        if self._histogram is not None:
            distribution = Distribution.of_histogram(self._histogram)
        else:
            distribution = Distribution(torch.stack([lo, hi], 1), None, lo, hi)
        lo, hi = search(distribution, self.rule, self.quantizer)
        if self.quantizer.scheme.granularity == "tensor":
            lo, hi = lo.squeeze(0), hi.squeeze(0)
        self.quantizer.freeze(lo, hi)

    def state(self) -> dict[str, Any]:
        """Returns everything that was gathered, as plain tensors and numbers, to send to other ranks or to save."""
        state: dict[str, Any] = {"seen": self.seen}
        if self._lo is not None and self._hi is not None:
            state |= {"lo": self._lo, "hi": self._hi}
        if self._histogram is not None:
            state |= {"exponent": self._histogram.exponent, "counts": self._histogram.counts}
        if self._batches:
            lows, highs = zip(*self._batches, strict=True)
            state |= {"batch_lo": torch.stack(lows), "batch_hi": torch.stack(highs)}  # (batches, rows)
        return state

    def merge(self, state: dict[str, Any]) -> None:
        """Adds what another rank gathered over other data, exactly, whatever the order of merging.

        Args:
            state: The :meth:`state` of an observer of the same quantizer with the same rule. An observer's own state
                counts twice if it is merged back into it: to bring all ranks together, merge all states into a new one.
        """
        if not state["seen"]:
            return
        device = self.quantizer.scale.device if self._lo is None else self._lo.device
        other = {key: value.to(device) for key, value in state.items() if isinstance(value, Tensor)}
        if "counts" in other:
            self._add(Histogram(other["lo"], other["hi"], other["exponent"], other["counts"]))
        if "batch_lo" in other:
            self._merge_batches(list(zip(other["batch_lo"], other["batch_hi"], strict=True)))
        self._widen(other["lo"], other["hi"])
        self.seen += int(state["seen"])

    def _widen(self, lo: Tensor, hi: Tensor) -> None:
        self._lo = lo if self._lo is None else torch.minimum(self._lo, lo)
        self._hi = hi if self._hi is None else torch.maximum(self._hi, hi)

    def _add(self, histogram: Histogram) -> None:
        self._histogram = histogram if self._histogram is None else self._histogram.merge(histogram)

    def _merge_batches(self, others: list[tuple[Tensor, Tensor]]) -> None:
        both = zip(self._batches, others, strict=False)
        merged = [(torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in both]
        self._batches = merged + self._batches[len(merged) :] + others[len(merged) :]

    def _running_extremes(self) -> tuple[Tensor, Tensor]:
        lo, hi = self._batches[0]
        for batch_lo, batch_hi in self._batches[1:]:
            lo = torch.lerp(lo, batch_lo, self.rule.momentum)
            hi = torch.lerp(hi, batch_hi, self.rule.momentum)
        return lo, hi
