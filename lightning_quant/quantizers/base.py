"""What all quantizers share: state in float32 buffers, the forward pass, and which elements share a scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.quantizers.groups import in_groups, out_of_groups
from lightning_quant.quantizers.own_precision import OwnPrecision
from lightning_quant.quantizers.ranges import Distribution, RangeRule, search
from lightning_quant.quantizers.scheme import Scheme

__all__ = ["Quantizer", "straight_through"]


class Quantizer(OwnPrecision, ABC):
    r"""A number format with its scale: maps a float tensor to the nearest tensor the format can hold.

    The state is float32 buffers, and an *empty* buffer means "not calibrated": there is no other flag. An uncalibrated
    quantizer, and a calibrated one while ``observer`` is set, hands on floats; a calibrated one hands on
    ``decode(encode(x))``, computed in float32 (float64 for float64 inputs) and returned in the dtype of the input.

    Subclasses state the maths as four pure functions of the state: :meth:`state_from_range`, :meth:`simulate`,
    :meth:`to_codes` and :meth:`from_codes`.

    Args:
        scheme: The number format, as a :class:`Scheme` or a string. What it leaves open is resolved to one scale per
            tensor, symmetric if signed.
        axis: The channel axis by role: 0 for a weight, -1 or 1 for an activation. Needed by ``_channel`` and ``_gN``.

    Attributes:
        observer: While set, ``forward(x)`` returns ``observer(x)``.
        keeps_range: Whether its scale is not to be learned.

    Raises:
        ValueError: If the scheme is not of this quantizer's kind or needs an axis that is not given.
    """

    kind: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ("scale",)

    scale: Tensor
    codes: Tensor | None
    observer: Callable[[Tensor], Tensor] | None
    keeps_range: bool = False

    def __init__(self, scheme: Scheme | str, axis: int | None = None) -> None:
        super().__init__()
        scheme = Scheme.parse(scheme)
        scheme = scheme.resolve(symmetric=scheme.signed, granularity="tensor")
        if scheme.kind != self.kind:
            raise ValueError(f'{type(self).__name__} takes formats of kind "{self.kind}", got "{scheme}".')
        if scheme.granularity == "channel" and axis is None:
            raise ValueError(
                f'"{scheme}" has one scale per channel; say which axis the channels are (axis=0, 1 or -1).'
            )
        if scheme.granularity == "group" and not scheme.dynamic and axis != 0:
            raise ValueError(
                f'"{scheme}" with axis={axis} is a static scale per group, which only weights with axis=0 have; '
                f'use "{scheme}_dynamic" for activations.'
            )
        self.scheme = scheme
        self.axis = axis
        self.observer = None
        for name in self.state_names:
            self.register_buffer(name, torch.empty(0, dtype=torch.float32))
        self.register_buffer("codes", None)

    # ------------------------------------------------------------------ the maths, stated by subclasses

    @abstractmethod
    def state_from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, ...]:
        """Turns ranges into state tensors (in the order of ``state_names``) of the same shape."""

    @abstractmethod
    def simulate(self, x: Tensor, *state: Tensor) -> Tensor:
        """Rounds ``x`` to the format, with state tensors that broadcast against ``x``."""

    @abstractmethod
    def to_codes(self, x: Tensor, *state: Tensor) -> Tensor:
        """The int32 codes of ``x``."""

    @abstractmethod
    def from_codes(self, codes: Tensor, *state: Tensor) -> Tensor:
        """The floats that ``codes`` stand for."""

    # ------------------------------------------------------------------ use

    @property
    def calibrated(self) -> bool:
        """Whether forward quantizes. A question of shapes only, so it does not break a compiled graph."""
        return self.scheme.dynamic or self.scale.numel() > 0

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` rounded to the format, or ``x`` itself while observed or uncalibrated."""
        return self.rounded(x) if self.observer is None else self.observer(x)

    @contextmanager
    def observed_by(self, observer: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let ``forward(x)`` return ``observer(x)`` for a while."""
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    def rounded(self, x: Tensor) -> Tensor:
        """What :meth:`forward` returns while nobody observes."""
        if not self.calibrated:
            return x
        if self.codes is not None:
            return self._solved(x)
        working = x if x.dtype in (torch.float32, torch.float64) else x.float()
        view = self._view(working)
        return self._unview(self.simulate(view, *self.state_for(view)), x.shape).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the integer codes of ``x``: int32, never negative, in the shape of ``x``.

        Raises:
            ValueError: If the quantizer is uncalibrated or dynamic, or ``x`` holds NaN, which has no code.
        """
        self._require_stored_state("encode")
        if self.codes is not None:
            return self.codes.to(torch.int32)
        if bool(x.isnan().any()):
            raise ValueError(f"{self!r} cannot encode NaN; check the tensor before encoding it.")
        view = self._view(x.float())
        return self._unview(self.to_codes(view, *self.state_for(view)), x.shape)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Returns the float32 values of ``codes``; ``decode(encode(x))`` equals ``forward(x)`` bit for bit.

        Raises:
            ValueError: If the quantizer is uncalibrated or dynamic.
        """
        self._require_stored_state("decode")
        view = self._view(codes)
        return self._unview(self.from_codes(view, *self.state_for(view)), codes.shape)

    # ------------------------------------------------------------------ state

    def fit(self, x: Tensor, rule: RangeRule | str = "minmax") -> None:
        """Searches the range on all of ``x`` and sets the state; a dynamic quantizer has none, so nothing is set.

        Args:
            x: A weight, or calibration data merged into one batch.
            rule: How the range is found.

        Raises:
            ValueError: If ``x`` is empty or holds NaN or infinity.
        """
        if self.scheme.dynamic:
            return
        rule = RangeRule.parse(rule)
        x = x.detach().float()
        lo, hi = search(Distribution.of(self.rows(x)), rule, self)
        shape = self._state_shape(self._view(x))
        self.freeze(lo.reshape(shape), hi.reshape(shape))

    @torch.no_grad()
    def freeze(self, lo: Tensor, hi: Tensor) -> None:
        """Sets the state from a known range; a dynamic quantizer has none, so nothing is set.

        Args:
            lo: Lower end, a scalar tensor or one entry per channel ``(channels,)`` or group ``(out, groups)``.
            hi: Upper end, in the same shape.

        Raises:
            ValueError: If the range is not finite, is upside down, or has another shape than the granularity asks for.
        """
        if self.scheme.dynamic:
            return
        lo, hi = (torch.as_tensor(bound, dtype=torch.float32, device=self.scale.device) for bound in (lo, hi))
        dims = {"tensor": 0, "channel": 1, "group": 2}[self.scheme.granularity or "tensor"]
        if lo.dim() != dims or lo.shape != hi.shape:
            raise ValueError(
                f'"{self.scheme}" takes a range of {dims} dimensions, '
                f"got lo {tuple(lo.shape)} and hi {tuple(hi.shape)}."
            )
        if not bool((lo.isfinite() & hi.isfinite() & (lo <= hi)).all()):
            raise ValueError(f'"{self.scheme}" takes a finite range with lo <= hi, got lo {lo} and hi {hi}.')
        self.codes = None
        for name, value in zip(self.state_names, self.state_from_range(lo, hi), strict=True):
            self._store(name, value)

    @torch.no_grad()
    def solve(self, codes: Tensor) -> None:
        """Sets the codes of a weight once and for all, where a solver knows better than to round to the nearest.

        From now on the quantizer gives back the values of these codes whatever it is given, so the float weight can
        stay as it is: it is still what the float model computes with.

        Args:
            codes: Integer codes in the shape of the weight, as :meth:`encode` returns them.

        Raises:
            ValueError: If the quantizer is uncalibrated or dynamic.

        Example:
            >>> from lightning_quant.quantizers import UniformQuantizer
            >>> quantizer, weight = UniformQuantizer("uint4_asym"), torch.tensor([0.0, 1.4, 2.6])
            >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(15.0))
            >>> quantizer(weight)
            tensor([0., 1., 3.])
            >>> quantizer.solve(torch.tensor([0, 2, 2]))
            >>> quantizer(weight)
            tensor([0., 2., 2.])
        """
        self._require_stored_state("solve")
        self.codes = codes.to(torch.uint8 if self.scheme.bits <= 8 else torch.int32)

    def _solved(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad and self.training:
            raise RuntimeError(
                f"the codes behind {self!r} were solved for, so training the float weight would change nothing: call "
                f"remove(model) of the callback that did it, or freeze the weight with requires_grad_(False)"
            )
        assert self.codes is not None
        return self.decode(self.codes).to(x.dtype)

    def reset(self) -> None:
        """Forgets the state, so that the quantizer is uncalibrated."""
        self.codes = None
        for name in self.state_names:
            self._store(name, torch.empty(0, dtype=torch.float32, device=getattr(self, name).device))

    def _store(self, name: str, value: Tensor) -> None:
        setattr(self, name, value)

    def _require_stored_state(self, verb: str) -> None:
        if self.scheme.dynamic:
            raise ValueError(f"{self!r} is dynamic and stores no scale; use a static format to {verb}.")
        if not self.calibrated:
            raise ValueError(f"{self!r} is not calibrated; call fit or freeze before {verb}.")

    # ------------------------------------------------------------------ which elements share a scale

    def _view(self, x: Tensor) -> Tensor:
        """Views ``x`` so that each group is the last axis; other granularities leave ``x`` alone."""
        if self.scheme.granularity != "group":
            return x
        assert self.scheme.group_size is not None
        x = x.flatten(1) if self.axis == 0 and x.dim() > 2 else x  # a convolution's (out, in, kh, kw)
        return in_groups(x, self.scheme.group_size)

    def _unview(self, view: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`_view`."""
        if self.scheme.granularity == "group":
            view = out_of_groups(view, math.prod(shape[1:]) if self.axis == 0 and len(shape) > 2 else shape[-1])
        return view.reshape(shape)

    def _state_shape(self, view: Tensor) -> tuple[int, ...]:
        if self.scheme.granularity == "channel":
            assert self.axis is not None
            return (view.shape[self.axis],)
        return tuple(view.shape[:-1]) if self.scheme.granularity == "group" else ()

    def rows(self, x: Tensor) -> Tensor:
        """Lays out ``x`` as (scales, elements that share the scale)."""
        view = self._view(x)
        if self.scheme.granularity == "channel":
            assert self.axis is not None
            return view.movedim(self.axis, 0).flatten(1) if view.dim() > 1 else view.unsqueeze(1)
        return view.flatten(0, -2) if self.scheme.granularity == "group" else view.reshape(1, -1)

    def row_state(self) -> tuple[Tensor, ...]:
        """The state of each of the :meth:`rows`, (rows, 1)."""
        return tuple(getattr(self, name).reshape(-1, 1) for name in self.state_names)

    def state_for(self, view: Tensor) -> tuple[Tensor, ...]:
        """The state in the shape that broadcasts against ``view``, found on the spot if dynamic."""
        if self.scheme.dynamic:
            lo, hi = self._extremes(view.detach())
            return self.state_from_range(lo.clamp(max=0), hi.clamp(min=0))
        state = tuple(getattr(self, name) for name in self.state_names)
        if self.scheme.granularity == "channel":
            assert self.axis is not None
            shape = [1] * view.dim()
            shape[self.axis] = -1
            return tuple(tensor.view(shape) for tensor in state)
        return tuple(tensor.unsqueeze(-1) for tensor in state) if self.scheme.granularity == "group" else state

    def _extremes(self, view: Tensor) -> tuple[Tensor, Tensor]:
        dims: tuple[int, ...] = (-1,)  # one scale per token or group
        if self.scheme.granularity == "tensor":
            dims = tuple(range(view.dim()))
        elif self.scheme.granularity == "channel":
            assert self.axis is not None
            dims = tuple(dim for dim in range(view.dim()) if dim != self.axis % view.dim())
        keep = self.scheme.granularity != "tensor"
        return view.amin(dims, keepdim=keep), view.amax(dims, keepdim=keep)

    # ------------------------------------------------------------------ nn.Module

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = {name: prefix + name for name in self.state_names}
        present = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        for name, stored in present.items():
            # The stored shape says how many scales there are; ours is empty until something is calibrated.
            own = getattr(self, name)
            if stored.shape != own.shape:
                self._store(name, torch.empty(stored.shape, dtype=torch.float32, device=own.device))
        codes = state_dict.get(f"{prefix}codes")
        self.codes = None if codes is None else torch.empty(codes.shape, dtype=codes.dtype, device=self.scale.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in present:
            if getattr(self, name).dtype != torch.float32:  # load_state_dict(assign=True) takes the stored tensor over
                self._store(name, getattr(self, name).float())
        if not present:  # a float checkpoint: nothing is missing, the quantizer is simply uncalibrated
            missing_keys[:] = [key for key in missing_keys if key not in keys.values()]
            self.reset()

    def extra_repr(self) -> str:
        """The format, the axis, and the scale or that there is none."""
        axis = "" if self.axis is None else f", axis={self.axis}"
        if self.scheme.dynamic:
            return f"{self.scheme}{axis}"
        if not self.calibrated:
            return f"{self.scheme}{axis}, uncalibrated"
        scale = (
            f"{self.scale.item():.4g}"
            if self.scale.numel() == 1 and not self.scale.is_meta
            else tuple(self.scale.shape)
        )
        return f"{self.scheme}{axis}, scale={scale}"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Returns ``quantized`` exactly, with the gradient of ``x`` (the straight-through estimator).

    Args:
        x: The tensor that gets the gradient.
        quantized: The tensor that gives the value.

    Example:
        >>> x = torch.tensor([0.3, 1.7], requires_grad=True)
        >>> straight_through(x, x.detach().round()).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    return _StraightThrough.apply(x, quantized)  # type: ignore[no-any-return, no-untyped-call]
