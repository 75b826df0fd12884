"""The door through which OpenVINO comes into a module that holds quantized layers, and goes again.

Like a layer that a kernel answers for, the module gets a subclass of its own class. Copies and pickles are originals.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, cast

from torch import nn

Answer = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class AnsweredModule(nn.Module):
    """A module whose ``forward`` is answered by ``answer``, which is handed the module's own."""

    own_class: ClassVar[type[nn.Module]]
    answer: Answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Ask for the answer."""
        return self.answer(self, super().forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the original: the subclass is made on the fly and has no import path."""
        make, args, state, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        state = {name: value for name, value in state.items() if name != "answer"}
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, args = _new, (self.own_class,)
        return (make, args, state, *rest)


def answer_by(module: nn.Module, answer: Answer) -> None:
    """Let a function answer for a module; it is handed the module, its own ``forward``, and the arguments of a call.

    >>> double = nn.Identity()
    >>> answer_by(double, lambda module, forward, args, kwargs: 2 * forward(*args, **kwargs))
    >>> double(3)
    6
    >>> answer_itself(double)
    >>> double(3)
    3
    """
    module.__class__ = _answered_class(cast(Hashable, type(module)))
    module.__dict__["answer"] = answer


def answer_itself(module: nn.Module) -> None:
    """Let a module answer for itself again."""
    if isinstance(module, AnsweredModule):
        del module.__dict__["answer"]
        module.__class__ = module.own_class  # type: ignore[assignment]


@functools.cache
def _answered_class(own_class: type[nn.Module]) -> type[AnsweredModule]:
    return type(f"Answered{own_class.__name__}", (AnsweredModule, own_class), {"own_class": own_class})


def _new(own_class: type[nn.Module]) -> nn.Module:
    return own_class.__new__(own_class)
