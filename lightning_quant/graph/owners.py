"""Which layer owns a parameter, and which parameters are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class Owners:
    """Finds the layer that owns a parameter by the parameter's identity.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._names: dict[int, list[str]] = {}
        for name, child in module.named_modules():
            for key, parameter in child.named_parameters(recurse=False):
                self._names.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)

    def of(self, parameter: Any, running: Sequence[str] = ()) -> str | None:
        """The name of the layer that owns a parameter; ``None`` for other tensors.

        Of several layers that share it, the one that is ``running``, else the first.
        """
        layers = [name.rpartition(".")[0] for name in self._names.get(id(parameter), ())]
        return next((layer for layer in layers if layer in running), layers[0] if layers else None)

    def is_tied(self, parameter: Any) -> bool:
        """Whether several layers share the parameter."""
        return len(self._names.get(id(parameter), ())) > 1

    def tied_groups(self) -> list[tuple[str, ...]]:
        """The names of every shared parameter."""
        return [tuple(names) for names in self._names.values() if len(names) > 1]
