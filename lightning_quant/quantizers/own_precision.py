"""State whose precision is a method's choice, whatever precision the model is moved to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

__all__ = ["OwnPrecision"]


class OwnPrecision(nn.Module):
    """Buffers that follow their module to another device, and keep their dtype.

    Lightning's ``"bf16-true"`` casts every floating buffer; a scale in bfloat16 would move the grid by up to 0.4 %.

    Example:
        >>> import torch
        >>> class State(OwnPrecision):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("scale", torch.ones(1))
        >>> State().to(torch.bfloat16).scale.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
