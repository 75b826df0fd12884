"""Watch a model while calibration batches run through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_quant.calibration.ranks import from_other_ranks
from lightning_quant.quantizers import (
    Observer,
    PositionObserver,
    PositionQuantizer,
    Quantizer,
    RangeRule,
    StepObserver,
    StepQuantizer,
)


@contextmanager
def reached(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """The names of the modules that run meanwhile.

    >>> import torch
    >>> layers = {"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)}
    >>> with reached(layers) as names:
    ...     _ = layers["used"](torch.ones(1, 2))
    >>> names
    {'used'}
    """
    names: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.add(name)) for name, module in modules.items()
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observed(quantizers: Mapping[str, Quantizer], rule: RangeRule) -> Iterator[None]:
    """Let quantizers observe the float stream; at the end the ranks' statistics are merged and the scales frozen.

    A quantizer that nothing reached on any rank stays uncalibrated. After an exception nothing is frozen.
    """
    observers = {
        name: _observer(quantizer, rule, name) for name, quantizer in quantizers.items() if not quantizer.calibrated
    }
    try:
        for name, observer in observers.items():
            quantizers[name].observer = observer
        yield
    finally:
        for name in observers:
            quantizers[name].observer = None
    others = from_other_ranks({name: observer.state() for name, observer in observers.items()})
    for name, observer in observers.items():
        for states in others:
            observer.merge(states[name])
        if observer.seen:
            observer.freeze()


def _observer(quantizer: Quantizer, rule: RangeRule, name: str) -> Observer | StepObserver | PositionObserver:
    if isinstance(quantizer, StepQuantizer):
        return StepObserver(quantizer, rule, name)
    if isinstance(quantizer, PositionQuantizer):
        return PositionObserver(quantizer, rule, name)
    return Observer(quantizer, rule, name)


@contextmanager
def fitted_in_stream(quantizers: Mapping[str, Quantizer], rule: RangeRule) -> Iterator[None]:
    """Let each quantizer fit itself to the first tensor it meets, so that those behind it meet quantized inputs."""

    def fit_first(name: str, quantizer: Quantizer) -> None:
        def observer(x: Tensor) -> Tensor:
            quantizer.observer = None
            try:
                quantizer.fit(x, rule)
            except ValueError as error:
                raise ValueError(f"`{name}`: {error}") from error
            quantized: Tensor = quantizer(x)
            return quantized

        quantizer.observer = observer

    try:
        for name, quantizer in quantizers.items():
            fit_first(name, quantizer)
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
