"""The position of a sequence that a decoder goes on from, read from how it is called, and tables that depend on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.quantizers import PositionQuantizer, Positions, Scheme

POSITION_NAMES = ("start", "start_pos", "cache_position", "past_key_values")


@dataclass
class PositionPlan:
    """Which inputs of layers have a scale for each position of a sequence, or for each of the first few.

    Args:
        decoder: name of the module whose argument says where a call goes on; ``None``: every call begins a sequence.
        argument: that argument: a number, a tensor that begins with it, or a cache that tells its length.
        sinks: how many of the first positions have a row of their own, where one more serves all others.
        owners: how many rows each layer's table has, by its name; more than one for each sink and the rest: one for
            each position, and there are no others.
    """

    decoder: str | None
    argument: str
    sinks: int
    owners: dict[str, int] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Put tables in the place of the uncalibrated quantizers, and watch the decoder."""
        positions = Positions()
        if self.decoder is not None:
            model.get_submodule(self.decoder).register_forward_pre_hook(
                PositionHook(positions, self.argument), with_kwargs=True
            )
        for name, rows in self.owners.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLayer) and layer.input_quantizer is not None
            plain = layer.input_quantizer
            table = PositionQuantizer(plain.scheme, plain.axis, positions, rows, rows == self.sinks + 1)
            layer.input_quantizer = table.to(plain.scale.device).train(plain.training)

    def undo(self, model: nn.Module) -> None:
        """Look at the decoder no longer."""
        decoder = dict(model.named_modules()).get(self.decoder) if self.decoder is not None else None
        if decoder is None:
            return
        for key, hook in list(decoder._forward_pre_hooks.items()):
            if isinstance(hook, PositionHook):
                del decoder._forward_pre_hooks[key]
                decoder._forward_pre_hooks_with_kwargs.pop(key, None)


class PositionHook:
    """The pre-hook on a decoder that tells its quantizers where the sequence goes on."""

    def __init__(self, positions: Positions, argument: str) -> None:
        self.positions, self.argument = positions, argument

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder is called."""
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments.get(self.argument)
        self.positions.start = start_of(given)


def start_of(given: Any) -> int:
    """The position that a call goes on from: a number, the first of a tensor, the length of a cache, or 0.

    >>> import torch
    >>> start_of(None), start_of(3), start_of(torch.arange(5, 7))
    (0, 3, 5)
    """
    if hasattr(given, "get_seq_length"):
        return int(given.get_seq_length())
    if isinstance(given, Tensor):
        return int(given.flatten()[0])
    return given if isinstance(given, int) else 0


def decoder_of(model: nn.Module, names: Iterable[str], argument: str | None = None) -> tuple[str, str] | None:
    """The first of some modules that is told where a sequence goes on, and by which argument.

    Args:
        model: which has them.
        names: in the order in which they run.
        argument: its name; default: one of those that are usual.
    """
    wanted = POSITION_NAMES if argument is None else (argument,)
    for name in names:
        taken = inspect.signature(model.get_submodule(name).forward).parameters
        found = next((one for one in wanted if one in taken), None)
        if found is not None:
            return name, found
    return None


def takes_positions(scheme: Scheme) -> bool:
    """Whether a format has a scale that could depend on the position: static and uniform, per tensor."""
    return scheme.kind == "int" and not scheme.dynamic and scheme.granularity == "tensor"
