"""A uniform grid in parts: tensors that were joined along their channels keep a scale each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_quant.quantizers.observers import Observer
from lightning_quant.quantizers.ranges import RangeRule
from lightning_quant.quantizers.scheme import Scheme
from lightning_quant.quantizers.uniform import UniformQuantizer

__all__ = ["SplitObserver", "SplitQuantizer"]


class SplitQuantizer(UniformQuantizer):
    r"""Integers times a scale that depends on which part of a concatenation a channel comes from.

    .. math:: \hat x = [Q(x_1; \; s_1, z_1), \; Q(x_2; \; s_2, z_2), \; \ldots]

    where :math:`Q` is the :class:`UniformQuantizer` and :math:`x = [x_1, x_2]` was joined along the channels: in
    a U-Net the stream and a skip connection, whose ranges have nothing to do with each other. In front of a layer there
    is one scale for each part, (parts,). The weight of that layer is cut along its *input* channels at the same places;
    with a scale per output channel its scales are (out, parts), so that

    .. math:: y = \hat W_1 \hat x_1 + \hat W_2 \hat x_2 + b .

    Args:
        scheme: A static ``intN`` or ``uintN`` format, per tensor, or per channel for a weight; see :class:`Scheme`.
        axis: The channel axis by role; see :class:`Quantizer`.
        parts: How many channels each part has.

    Raises:
        ValueError: If the format is none of these, or there are fewer than two parts.

    Example:
        >>> quantizer = SplitQuantizer("uint4_asym", axis=-1, parts=[1, 2])
        >>> x = torch.tensor([[15.0, 1.5, 0.26]])
        >>> quantizer.fit(x)
        >>> quantizer.scale
        tensor([1.0000, 0.1000])
        >>> quantizer(x)
        tensor([[15.0000,  1.5000,  0.3000]])
    """

    def __init__(self, scheme: Scheme | str, axis: int | None, parts: Sequence[int]) -> None:
        super().__init__(scheme, axis)
        allowed = ("tensor", "channel") if axis == 0 else ("tensor",)
        if self.scheme.dynamic or self.scheme.granularity not in allowed or axis is None:
            raise ValueError(
                f'"{self.scheme}" with axis={axis} has no scale for each part of a concatenation: it needs a static '
                f"format, per tensor, or per channel for a weight (axis=0)."
            )
        if len(parts) < 2 or min(parts) < 1:
            raise ValueError(f"a concatenation has two parts or more, each of some channels, got {list(parts)}.")
        self.parts = list(parts)
        self.along = 1 if axis == 0 else axis  # a weight is cut along its input channels

    def cut(self, x: Tensor) -> list[Tensor]:
        """The parts of a tensor.

        Raises:
            ValueError: If it has another number of channels.
        """
        if x.shape[self.along] != sum(self.parts):
            raise ValueError(
                f"{self!r} cuts {sum(self.parts)} channels into {self.parts}, and was given a tensor of shape "
                f"{tuple(x.shape)} with {x.shape[self.along]}; leave the layer in one piece with split=False"
            )
        return list(x.split(self.parts, self.along))

    def plain(self) -> UniformQuantizer:
        """An uncalibrated quantizer for one part."""
        return UniformQuantizer(self.scheme, self.axis).to(self.scale.device)

    def fit(self, x: Tensor, rule: RangeRule | str = "minmax") -> None:
        """Searches a range for each part."""
        found = [self.plain() for _ in self.parts]
        for quantizer, part in zip(found, self.cut(x), strict=True):
            quantizer.fit(part, rule)
        self.join(found)

    @torch.no_grad()
    def join(self, found: Sequence[UniformQuantizer]) -> None:
        """Takes the state of one calibrated quantizer for each part over."""
        self.codes = None
        for name in self.state_names:
            self._store(name, torch.stack([getattr(quantizer, name) for quantizer in found], -1))

    def freeze(self, lo: Tensor, hi: Tensor) -> None:
        """Sets every part from one range."""
        found = self.plain()
        found.freeze(lo, hi)
        self.join([found] * len(self.parts))

    def rows(self, x: Tensor) -> Tensor:
        """Lays ``x`` out so that all elements of a row share a scale: one input channel of a weight's output channel.

        Several rows have the same scale, see :meth:`row_state`.
        """
        view = x.movedim(self.along, 0) if self.axis != 0 else x.flatten(0, 1)
        return view.flatten(1) if view.dim() > 1 else view.unsqueeze(1)

    def row_state(self) -> tuple[Tensor, ...]:
        """The state of each of the :meth:`rows`, (rows, 1)."""
        return tuple(self._by_channel(getattr(self, name)).reshape(-1, 1) for name in self.state_names)

    def state_for(self, view: Tensor) -> tuple[Tensor, ...]:
        """The state of every channel, in the shape that broadcasts against ``view``."""
        shape = [1] * view.dim()
        shape[self.along] = -1
        if self.scheme.granularity == "channel":
            shape[0] = view.shape[0]
        return tuple(self._by_channel(getattr(self, name)).reshape(shape) for name in self.state_names)

    def _by_channel(self, state: Tensor) -> Tensor:
        return torch.cat([state[..., i : i + 1].expand(*state.shape[:-1], n) for i, n in enumerate(self.parts)], -1)

    def extra_repr(self) -> str:
        """The format, the parts, and the shape of the scale or that there is none."""
        return f"{super().extra_repr()}, parts={self.parts}"


class SplitObserver:
    """Watches an activation and freezes a :class:`SplitQuantizer`: an :class:`Observer` for every part.

    Args:
        quantizer: The quantizer to set.
        rule: How the ranges are found.
        name: The layer's name, for messages.
    """

    def __init__(self, quantizer: SplitQuantizer, rule: RangeRule | str = "minmax", name: str = "") -> None:
        self.quantizer, self.name = quantizer, name
        self.each = [Observer(quantizer.plain(), rule, name) for _ in quantizer.parts]

    @property
    def seen(self) -> int:
        """How many elements were seen."""
        return sum(observer.seen for observer in self.each)

    def __call__(self, x: Tensor) -> Tensor:
        """Takes one batch into account and returns it unchanged."""
        for observer, part in zip(self.each, self.quantizer.cut(x), strict=True):
            observer(part)
        return x

    def freeze(self) -> None:
        """Sets the quantizer from what was seen."""
        found = []
        for observer in self.each:
            observer.freeze()
            assert isinstance(observer.quantizer, UniformQuantizer)
            found.append(observer.quantizer)
        self.quantizer.join(found)

    def state(self) -> dict[str, Any]:
        """What was seen, for other ranks."""
        return {"parts": [observer.state() for observer in self.each]}

    def merge(self, state: dict[str, Any]) -> None:
        """Takes what another rank has seen into account."""
        for observer, seen in zip(self.each, state["parts"], strict=True):
            observer.merge(seen)
