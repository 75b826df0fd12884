"""What a kernel will answer once it is known who reads it, so that norm, activation and rounding cost nothing.

A convolution's float answer goes to a BatchNorm, from there to an activation, and from there to the next quantized
layer, which rounds it to codes again. Each is a pass over memory that takes longer than the convolution. A
:class:`Pending` answer has not been computed yet: whoever calls ``F.batch_norm`` on it gets another one, whose norm is
part of the kernel's scale and bias; whoever clamps that gets one that ends in the clamp; and a kernel that reads it is
handed codes on its own grid, straight from the integers.

Nobody else can tell. To every other function a pending answer is a float tensor, which is computed when it is asked
for, whether that is a residual sum, a hook, or a network that takes another way than in the batch before.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_quant.kernels.codes import Grid
from lightning_quant.kernels.epilogue import Epilogue
from lightning_quant.kernels.kernel import Kernel, sharing

_CPU = torch.device("cpu")
_TOLERANCE = 1e-4  # of floats, as a share of the largest


class PatientKernel(Kernel):
    """A kernel that can take what follows it into its own product.

    Attributes:
        patient: whether its answers wait; not where the first one was read as it is.
        trusted: whether one step was seen to answer like one after the other, by what these are.
        absorbed: names of what it was seen to take over.
        hands_on: whether it was seen to answer in codes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patient = True
        self.trusted: dict[Any, bool] = {}
        self.absorbed: tuple[str, ...] = ()
        self.hands_on = False
        self._folded: tuple[_Norm, list[int] | None, Epilogue] | None = None

    @abstractmethod
    def finish(self, codes: Tensor, epilogue: Epilogue, grid: Grid | None = None) -> Tensor:
        """The product of uint8 codes and all that the epilogue says, as floats or as the uint8 codes of a grid."""

    @abstractmethod
    def layout_of(self, codes: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of that."""

    def sharing(self) -> Self:
        """Another kernel with the same tensors, which has not seen anything yet."""
        found = sharing(self)
        found.trusted, found.absorbed, found.hands_on, found._folded = {}, (), False, None
        return found

    @property
    @abstractmethod
    def bare(self) -> Epilogue:
        """What follows the sum of integers in the layer itself."""

    @property
    def in_words(self) -> str:
        """Its name with what it took over."""
        return " + ".join([self.name, *self.absorbed]) + " -> codes" * self.hands_on

    def folded(self, norm: _Norm) -> Epilogue | None:
        """With a norm behind the layer, if that is the same for every batch; computed once for the same norm."""
        if norm.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        known, state, epilogue = self._folded or (None, None, None)
        now = norm.state()
        if known is None or now is None or state != now or any(a is not b for a, b in zip(known, norm, strict=True)):
            if not norm.is_plain():
                return None
            bare, (scale, shift) = self.bare, norm.scale_and_shift()
            bias = shift if bare.bias is None else torch.addcmul(shift, bare.bias, scale)
            epilogue = bare._replace(scale=bare.scale * scale, bias=bias)
            self._folded = norm, now, epilogue
        return epilogue

    def answer(self, codes: Tensor) -> Tensor:
        """What the layer answers to codes, now or when it is asked for."""
        waits = self.patient and codes.numel() and not torch.is_grad_enabled()
        return Pending(self, codes, self.bare) if waits else self.finish(codes, self.bare)


class _Norm(NamedTuple):
    """The arguments of ``F.batch_norm``."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def is_plain(self) -> bool:
        """Whether it is of float32 on the CPU, with means and variances of its own."""
        tensors = [x for x in self[:4] if x is not None]
        own = self.running_mean is not None and self.running_var is not None
        return own and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """In the order in which torch computes them."""
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            scale = (self.running_var + self.eps).sqrt_().reciprocal_()
            scale = scale if self.weight is None else scale * self.weight
            shift = -self.running_mean * scale
            return scale, shift if self.bias is None else shift + self.bias

    def state(self) -> list[int] | None:
        """What changes with the values of its tensors; ``None`` if that cannot be known."""
        tensors = [x for x in self[:4] if x is not None]
        if any(x.is_inference() for x in tensors):  # which have no version
            return None
        return [number for x in tensors for number in (x._version, x.data_ptr())]


class Pending(Tensor):
    """A float tensor (B, out, H, W) that nobody has looked at yet.

    Args:
        kernel: computes it.
        codes: what the kernel multiplies.
        epilogue: what follows the product.
        steps: the same as calls of torch functions, one after the other.

    >>> from lightning_quant.kernels.int8_conv import Int8Conv
    >>> from lightning_quant.kernels.layer_door import run_on
    >>> from lightning_quant.layers import quantize_layer
    >>> from lightning_quant.quantizers import Scheme
    >>> layer = quantize_layer(torch.nn.Conv2d(3, 8, 3), Scheme.parse("int8_sym_channel"), Scheme.parse("int7_asym"))
    >>> layer.weight_quantizer.fit(layer.weight)
    >>> layer.input_quantizer.freeze(torch.tensor(-1.0), torch.tensor(1.0))
    >>> run_on(layer, Int8Conv.of(layer))
    >>> with torch.no_grad():
    ...     out = F.relu(layer(torch.rand(1, 3, 6, 6)))
    >>> out.shape, out.epilogue.operation(), type(out + 1).__name__
    (torch.Size([1, 8, 4, 4]), ('relu', [], ''), 'Tensor')
    """

    kernel: PatientKernel
    codes: Tensor
    epilogue: Epilogue
    steps: tuple[_Step, ...]
    _value: Tensor | None
    _on_grid: tuple[Grid, Tensor] | None

    def __new__(
        cls, kernel: PatientKernel, codes: Tensor, epilogue: Epilogue, steps: tuple[_Step, ...] = ()
    ) -> Pending:
        """A tensor without memory."""
        shape, strides = kernel.layout_of(codes)
        self: Pending = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=epilogue.dtype, device=_CPU)
        self.kernel, self.codes, self.epilogue, self.steps = kernel, codes, epilogue, steps
        self._value = self._on_grid = None
        return self

    def value(self) -> Tensor:
        """The floats."""
        if self._value is None:
            fused = bool(self.steps) and self._is_fused(None)
            self._value = self.kernel.finish(self.codes, self.epilogue) if fused else self.one_by_one(self.codes)
        return self._value

    def codes_on(self, grid: Grid) -> Tensor:
        """What a quantizer makes of it: uint8 (B, out, H, W), channels last."""
        if self._on_grid is None or self._on_grid[0] != grid:
            if self._value is None and self.epilogue.reaches(grid) and self._is_fused(grid):
                codes = self.kernel.finish(self.codes, self.epilogue, grid)
            else:
                x = self.value()
                x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
                codes = grid.unsigned(x, exact=x.dtype != torch.bfloat16)
            self._on_grid = grid, codes
        return self._on_grid[1]

    def few(self, samples: int) -> Pending:
        """The first samples."""
        return Pending(self.kernel, self.codes[:samples], self.epilogue, self.steps)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take what the kernel can take over; ask for the floats otherwise."""
        kwargs = kwargs or {}
        follows = None if "out" in kwargs else _FOLLOWS.get(func)
        if follows is not None and args and isinstance(args[0], Pending) and args[0]._value is None:
            taken = follows(args[0], _Step(func, args[1:], kwargs))
            if taken is not None:
                return taken
        elif func in _ABOUT_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*map(_floats, args), **{name: _floats(x) for name, x in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Code that is not Python asks for the floats, too."""
        return func(*map(_floats, args), **{name: _floats(x) for name, x in (kwargs or {}).items()})

    def _is_fused(self, grid: Grid | None) -> bool:
        """Whether the kernel does it all at once, which the first time is compared with one step after the other."""
        names = tuple(step.name for step in self.steps)
        trusted = self.kernel.trusted.get((names, grid is None))
        if trusted is None:
            trusted = self.kernel.trusted[names, grid is None] = self._agrees(grid)
            if trusted:
                self.kernel.absorbed = max(self.kernel.absorbed, names, key=len)
                self.kernel.hands_on |= grid is not None
        return trusted

    def _agrees(self, grid: Grid | None) -> bool:
        few = self.codes[:1]
        want, found = self.one_by_one(few), self.kernel.finish(few, self.epilogue, grid)
        compact = self.epilogue.dtype == torch.bfloat16
        if grid is None:
            near = _TOLERANCE if not compact else torch.finfo(torch.bfloat16).eps
            return not bool((found - want).abs().max() > near * want.abs().max())
        return not bool((found.int() - grid.unsigned(want).int()).abs().max() > (2 if compact else 1))

    def one_by_one(self, codes: Tensor) -> Tensor:
        """The floats of these codes, by one step after the other."""
        out = self.kernel.finish(codes, self.kernel.bare)
        for step in self.steps:
            out = step(out)
        return out


class _Step(NamedTuple):
    """A call of a function on the answer so far."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.func(x, *self.args, **self.kwargs)
        return out

    @property
    def name(self) -> str:
        """As tables show it."""
        if self.func is F.hardtanh and (self.kwargs.get("min_val"), self.kwargs.get("max_val")) == (0, 6):
            return "relu6"  # as torch spells it, too
        name = self.func.__name__.strip("_")
        return "BatchNorm" if name == "batch_norm" else name

    @property
    def in_place(self) -> bool:
        """Whether it changes what it is given."""
        return self.func.__name__.endswith("_") or bool(self.kwargs.get("inplace"))


def _read(x: Any) -> Any:
    """The floats of a pending answer, which whoever reads them may change."""
    if not isinstance(x, Pending):
        return x
    if not x.steps and not x.kernel.absorbed:
        x.kernel.patient = False
    x._on_grid = None
    return x.value()


def _floats(x: Any) -> Any:
    """The same for what is inside an argument."""
    return tree_map(_read, x) if isinstance(x, (list, tuple, dict)) else _read(x)


def plain(x: Any) -> Any:
    """The floats of a pending answer for one who only looks at them; anything else as it is."""
    return x.value() if isinstance(x, Pending) else x


# ---------------------------------------------------------------- what a kernel takes over


def _take(pending: Pending, step: _Step, epilogue: Epilogue) -> Pending:
    if not step.in_place:
        return Pending(pending.kernel, pending.codes, epilogue, (*pending.steps, step))
    pending.epilogue, pending.steps, pending._on_grid = epilogue, (*pending.steps, step), None
    return pending


def _batch_norm(pending: Pending, step: _Step) -> Pending | None:
    epilogue = None if pending.steps else pending.kernel.folded(_Norm(*step.args, **step.kwargs))
    return None if epilogue is None else _take(pending, step, epilogue)


def _clamp(bounds: Callable[..., tuple[Any, Any]]) -> Callable[[Pending, _Step], Pending | None]:
    def follow(pending: Pending, step: _Step) -> Pending | None:
        low, high = (math.nan if isinstance(x, Tensor) else x for x in bounds(*step.args, **step.kwargs))
        low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
        if pending.epilogue.activated or not low <= high:
            return None
        return _take(pending, step, pending.epilogue._replace(low=low, high=high))

    return follow


def _curve(name: str) -> Callable[[Pending, _Step], Pending | None]:
    def follow(pending: Pending, step: _Step) -> Pending | None:
        return None if pending.epilogue.activated else _take(pending, step, pending.epilogue._replace(curve=name))

    return follow


def _gelu(pending: Pending, step: _Step) -> Pending | None:
    """Only between floats of bfloat16: that of oneDNN has other last bits than torch's."""
    if pending.epilogue.activated or pending.epilogue.dtype != torch.bfloat16:
        return None
    approximate = step.args[0] if step.args else step.kwargs.get("approximate", "none")
    return _take(pending, step, pending.epilogue._replace(curve=f"gelu {approximate}"))


def _nothing(pending: Pending, step: _Step) -> Pending | None:
    training = step.args[1] if len(step.args) > 1 else step.kwargs.get("training", True)
    return None if training else pending


_relu = _clamp(lambda inplace=False: (0.0, math.inf))
_relu6 = _clamp(lambda inplace=False: (0.0, 6.0))
_hardtanh = _clamp(lambda min_val=-1.0, max_val=1.0, inplace=False: (min_val, max_val))
_bounds = _clamp(lambda min=None, max=None: (min, max))

_FOLLOWS: dict[Any, Callable[[Pending, _Step], Pending | None]] = {
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    F.relu6: _relu6,
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **dict.fromkeys((torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_), _bounds),
    F.hardswish: _curve("hardswish"),
    F.silu: _curve("swish"),
    F.gelu: _gelu,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d), _nothing),
}

_ABOUT_SHAPE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_sparse", "is_meta", "is_leaf", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.is_contiguous, Tensor.is_inference, Tensor.__len__),
}
