"""What is seen of one torch function call while a model runs, and the families of functions that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Call:
    """One call of a torch function.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        stack: names of the modules whose forward is running, outermost first.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    stack: tuple[str, ...]

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.func, "__name__", str(self.func))

    @property
    def inside(self) -> str | None:
        """The innermost module whose forward is running."""
        return self.stack[-1] if self.stack else None

    def argument(self, position: int, name: str) -> Any:
        """An argument, wherever it was given; ``None`` if it was not."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    def reads(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def gives(self) -> list[Tensor]:
        """Every tensor in the result."""
        return [x for x in tree_leaves(self.out) if isinstance(x, Tensor)]

    def linear(self) -> tuple[Tensor, Tensor] | None:
        """Input and weight of a linear function: ``F.linear``, or ``addmm`` as transformers' ``Conv1D`` calls it."""
        if self.func is F.linear:
            return self.argument(0, "input"), self.argument(1, "weight")
        if self.func is torch.addmm:
            return self.argument(1, "mat1"), self.argument(2, "mat2")
        return None


class Watcher:
    """Looks at a model while it runs."""

    def given(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is about to run, with these arguments."""

    def enter(self, name: str) -> None:
        """A module's forward begins."""

    def leave(self, name: str) -> None:
        """A module's forward ends."""

    def saw(self, call: Call) -> None:
        """A torch function returned tensors."""

    def finish(self, output: Any) -> None:
        """The run ended with this output."""
