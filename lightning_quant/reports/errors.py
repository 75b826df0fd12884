"""How much each layer of a quantized model is in error, measured on batches that stream through it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.layers import QuantAttention, QuantizedLayer, QuantMultiheadAttention
from lightning_quant.metrics import SQNR
from lightning_quant.quantizers import Histogram, Mask, NoisyQuantizer, Quantizer, SplitQuantizer, levels, to_steps

# Each call of a layer is judged by so many of its elements, and keeps so many to be compared later: a quarter of a
# million tells an SQNR to a twentieth of a dB, and memory is bounded by the number of layers.
COUNTED, KEPT = 1 << 18, 1 << 14
BINS = 2048


class TensorError:
    """What rounding does to one tensor of a layer: its weight, its input, an operand of attention.

    Args:
        name: of the tensor, ``weight``, ``input``, ``query``.
        quantizer: what rounds it.

    Attributes:
        histogram: of where the values lie on the ruler of :func:`~lightning_quant.quantizers.levels`; those further
            from the grid than the grid is wide count as if they were just that far.
    """

    def __init__(self, name: str, quantizer: Quantizer) -> None:
        self.name, self.quantizer = name, quantizer
        self.histogram: Histogram | None = None
        self._sqnr = SQNR(sync_on_compute=False).to(quantizer.scale.device)
        self._seen = self._clipped = self._zeroed = 0
        marks = levels(quantizer)
        # Half a step beyond the last level is where rounding ends and clipping begins.
        ends = (1.5 * marks[[0, -1]] - 0.5 * marks[[1, -2]]).to(quantizer.scale.device)
        self._low: Tensor = ends[0]
        self._high: Tensor = ends[1]

    @property
    def scheme(self) -> str:
        """Its format."""
        return str(self.quantizer.scheme)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.quantizer.scheme.bits

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise ratio in dB, None if nothing was seen."""
        return _value(self._sqnr)

    @property
    def clipped(self) -> float:
        """Share of the values beyond the outermost levels, 0 to 1."""
        return self._clipped / max(1, self._seen)

    @property
    def zeroed(self) -> float:
        """Share of the values that are not 0 and are rounded to 0, 0 to 1."""
        return self._zeroed / max(1, self._seen)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add a tensor as it is before rounding."""
        if not x.numel():
            return
        scheme = self.quantizer.scheme
        by_channel = isinstance(self.quantizer, (NoisyQuantizer, SplitQuantizer))
        alike = scheme.granularity == "tensor" and not scheme.dynamic and not by_channel
        if alike:  # every element is rounded in the same way
            x = _sample(x, COUNTED)
        steps, rounded, x = (_sample(one, COUNTED) for one in (to_steps(self.quantizer, x), self.quantizer(x), x))
        self._sqnr.update(rounded, x)
        self._seen += len(steps)
        self._clipped += int(self._beyond(steps).sum())
        self._zeroed += int(((rounded == 0) & (x != 0)).sum())
        # A single outlier would make all bins so wide that nothing could be seen in them.
        width = self._high - self._low
        steps = steps[steps.isfinite()].float().clamp(self._low - width, self._high + width)
        if len(steps):
            new = Histogram.of(steps.unsqueeze(0), BINS)
            self.histogram = new if self.histogram is None else self.histogram.merge(new)

    def _beyond(self, steps: Tensor) -> Tensor:
        beyond: Tensor = steps > self._high
        if self.quantizer.scheme.kind == "log":  # what is too small becomes 0, which is no clipping
            return beyond
        return beyond | (steps < self._low)


@dataclass
class LayerError:
    """What quantization does to one layer, or to one call of attention.

    Args:
        name: of the module.
        kind: its float class, or ``attention``.
        weights: the errors of its weights.
        inputs: the errors of its inputs, or of the operands of attention.
        pruned: the pattern of its pruned weights.
        own: SQNR of its output where this layer alone is quantized, in dB; None if it did not run as a module.
        accumulated: SQNR of its output where the whole model is quantized, in dB; None likewise.
        depth: 1 for the layer that ran first; None if it did not run.
    """

    name: str
    kind: str
    weights: list[TensorError]
    inputs: list[TensorError]
    pruned: str | None = None
    own: float | None = None
    accumulated: float | None = None
    depth: int | None = None

    @property
    def tensors(self) -> list[TensorError]:
        """Weights, then inputs."""
        return [*self.weights, *self.inputs]

    @property
    def sqnr(self) -> float | None:
        """Its own SQNR in dB: of the output, or of the worst tensor where the output was not to be had."""
        if self.own is not None:
            return self.own
        return min((tensor.sqnr for tensor in self.tensors if tensor.sqnr is not None), default=None)

    @property
    def badness(self) -> float:
        """What layers are sorted by: an undefined SQNR is the worst there is, none at all the best."""
        if self.sqnr is None:
            return -math.inf
        return math.inf if math.isnan(self.sqnr) else -self.sqnr


@dataclass
class _Watched:
    """One layer while it is measured."""

    error: LayerError
    module: nn.Module
    quantizers: Sequence[Quantizer | Mask]
    own: SQNR
    accumulated: SQNR
    kept: deque[Tensor] = field(default_factory=deque)


class ModelErrors:
    r"""The errors of all quantized layers of a model, added up over batches.

    Each batch is run twice. The first run is that of the float twin: every layer hands on floats, and beside that
    computes its output once more from quantized operands, which gives its *own* error, the one it would cause if
    nothing else were quantized. The second run is quantized throughout; what arrives at each layer's output there,
    against the first run, is the *accumulated* error. Sums, histograms and a few elements of each output of one batch
    are all that is kept.

    Args:
        model: a model with quantized layers, found by their class.

    Example:
        >>> from lightning_quant.layers import quantize_layer
        >>> from lightning_quant.quantizers import Scheme
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> for layer in net:
        ...     twin = quantize_layer(layer, Scheme.parse("int4_sym_channel"), None)
        ...     twin.weight_quantizer.fit(twin.weight)
        >>> errors, x = ModelErrors(net), torch.randn(64, 4)
        >>> errors.add(lambda: net(x))
        >>> [(layer.name, layer.depth) for layer in errors.layers()]
        [('0', 1), ('1', 2)]
        >>> first, second = errors.layers()
        >>> first.own == first.accumulated, second.own > second.accumulated
        (True, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._output = SQNR(sync_on_compute=False)
        self._watched = list(_watched(model))
        self._order: dict[str, None] = {}
        self._again = False  # while a layer computes its output once more

    def __len__(self) -> int:
        return len(self._watched)

    @property
    def output_sqnr(self) -> float | None:
        """SQNR of the first float tensor that the model returns, in dB; None before any batch."""
        return _value(self._output)

    def add(self, run: Callable[[], Any]) -> None:
        """Measure on one batch.

        Args:
            run: feeds the batch forward and returns what the model gives; called twice, and both times it must compute
                the same from the same random numbers.
        """
        with torch.compiler.set_stance("force_eager"):
            try:
                with self._float_stream():
                    reference = first_tensor(run())
                with self._hooks(self._compare):
                    quantized = first_tensor(run())
            finally:
                for watched in self._watched:
                    watched.kept.clear()
        if reference is not None and quantized is not None and reference.shape == quantized.shape:
            self._output.to(reference.device).update(quantized.detach(), reference.detach())

    def layers(self) -> list[LayerError]:
        """The errors found so far, in the order in which the layers ran; those that did not run come last."""
        depths = {name: depth for depth, name in enumerate(self._order, 1)}
        for watched in self._watched:
            error = watched.error
            error.depth = depths.get(error.name)
            error.own, error.accumulated = _value(watched.own), _value(watched.accumulated)
            for tensor, quantizer_weight in zip(error.weights, _weights(watched.module), strict=True):
                if tensor.sqnr is None:
                    tensor.add(quantizer_weight)
        return sorted((watched.error for watched in self._watched), key=lambda error: error.depth or math.inf)

    # ---------------------------------------------------------------- the two runs

    @contextmanager
    def _float_stream(self) -> Iterator[None]:
        observers = {q: q.observer for watched in self._watched for q in watched.quantizers}
        try:
            for watched in self._watched:
                for quantizer in watched.quantizers:
                    quantizer.observer = _hand_on
                for tensor in watched.error.inputs:
                    tensor.quantizer.observer = partial(self._observe, watched, tensor)
            with self._hooks(self._compute_again):
                yield
        finally:
            for quantizer, observer in observers.items():
                quantizer.observer = observer

    def _observe(self, watched: _Watched, tensor: TensorError, x: Tensor) -> Tensor:
        if not self._again:
            self._order.setdefault(watched.error.name)
            with _unobserved([tensor.quantizer]):
                tensor.add(x.detach())
        return x

    def _compute_again(
        self, watched: _Watched, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        exact = first_tensor(output)
        if self._again or exact is None:
            return
        self._order.setdefault(watched.error.name)
        watched.kept.append(_sample(exact.detach(), KEPT).clone())
        self._again = True
        try:
            with _unobserved(watched.quantizers):
                rounded = first_tensor(type(module).forward(module, *args, **kwargs))
        finally:
            self._again = False
        if rounded is not None:
            watched.own.update(*(_sample(one.detach(), COUNTED) for one in (rounded, exact)))

    def _compare(self, watched: _Watched, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        rounded = first_tensor(output)
        if rounded is None or not watched.kept:
            return
        exact, rounded = watched.kept.popleft(), _sample(rounded.detach(), KEPT)
        if exact.shape == rounded.shape:  # shapes may depend on values
            watched.accumulated.update(rounded, exact)

    @contextmanager
    def _hooks(self, hook: Callable[..., None]) -> Iterator[None]:
        with ExitStack() as stack:
            for watched in self._watched:
                handle = watched.module.register_forward_hook(partial(hook, watched), with_kwargs=True)
                stack.callback(handle.remove)
            yield


def first_tensor(outputs: Any) -> Tensor | None:
    """The first float tensor with elements in what a model or a layer returns.

    >>> first_tensor({"ids": torch.tensor([1]), "logits": torch.tensor([0.5])})
    tensor([0.5000])
    """
    if isinstance(outputs, Tensor):
        return outputs if outputs.is_floating_point() and outputs.dim() else None
    items = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    return next((found for found in map(first_tensor, items) if found is not None), None)


def _watched(model: nn.Module) -> Iterator[_Watched]:
    inside: set[nn.Module] = set()  # nn.MultiheadAttention counts as one layer
    for name, module in model.named_modules():
        if isinstance(module, QuantMultiheadAttention):
            inside.add(module.attention_quantizers)
        if isinstance(module, QuantizedLayer):
            kind, weights, masks = module.float_class.__name__, module.weight_quantizers(), module.masks()
        elif isinstance(module, QuantAttention) and module not in inside:
            kind, weights, masks = "attention", {}, {}
        else:
            continue
        operands = module.activation_quantizers()
        states = [*weights.values(), *masks.values(), *operands.values()]
        if not states or not all(state.calibrated for state in states):
            continue
        pruned = next((str(mask.pattern) for mask in masks.values()), None)
        error = LayerError(name, kind, _tensors(weights), _tensors(operands), pruned)
        device = next(states[0].buffers()).device
        own, accumulated = (SQNR(sync_on_compute=False).to(device) for _ in range(2))
        yield _Watched(error, module, states, own, accumulated)


def _tensors(quantizers: Mapping[str, Quantizer]) -> list[TensorError]:
    return [
        TensorError(name.removeprefix("attention_quantizers.").removesuffix("_quantizer"), quantizer)
        for name, quantizer in quantizers.items()
    ]


def _weights(module: nn.Module) -> list[Tensor]:
    """The float weights that have a quantizer; output channels first."""
    if not isinstance(module, QuantizedLayer):
        return []
    return [module.weight_rows(name).detach() for name in module.weight_quantizers()]


def _value(metric: SQNR) -> float | None:
    return float(metric.compute()) if int(metric.elements) else None


def _sample(x: Tensor, limit: int) -> Tensor:
    """At most ``limit`` elements at even distances, the same ones each time, from all channels alike.

    >>> _sample(torch.arange(12).reshape(2, 6), limit=5)  # every third would be channel 0 and 3 only
    tensor([ 0,  5, 10])
    """
    flat = x.reshape(-1)
    stride = max(1, -(-flat.numel() // limit))
    while math.gcd(stride, flat.numel()) > 1:
        stride += 1
    return flat[::stride]


def _hand_on(x: Tensor) -> Tensor:
    return x


@contextmanager
def _unobserved(quantizers: Sequence[Quantizer | Mask]) -> Iterator[None]:
    """Let quantizers quantize for a moment."""
    observers = [quantizer.observer for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.observer = None
        yield
    finally:
        for quantizer, observer in zip(quantizers, observers, strict=True):
            quantizer.observer = observer
