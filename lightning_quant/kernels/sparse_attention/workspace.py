"""Memory for what is made on the way to an answer, used again by the next call."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Tensors that are overwritten by whoever asks for the same name next.

    Pages that are fresh from the system cost a CPU up to a third of the time of sparse attention itself. Nothing is
    kept on a GPU, whose allocator keeps pages anyway.

    >>> workspace = Workspace()
    >>> x = workspace.empty("scores", (2, 3), torch.ones(1))
    >>> x.shape, workspace.empty("scores", (4,), x).data_ptr() == x.data_ptr()
    (torch.Size([2, 3]), True)
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor with the type and device of another one."""
        if like.is_cuda:
            return like.new_empty(shape)
        needed, kept = prod(shape), self._kept.get(name)
        if (
            kept is None
            or kept.numel() < needed
            or (kept.dtype, kept.device) != (like.dtype, like.device)
            or (kept.is_inference() and not torch.is_inference_mode_enabled())  # must not be written to
        ):
            kept = self._kept[name] = like.new_empty(needed)
        return kept[:needed].view(shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()

    def rows(self, name: str, x: Tensor, dim: int, index: Tensor) -> Tensor:
        """``x.index_select(dim, index)``."""
        shape = (*x.shape[:dim], len(index), *x.shape[dim + 1 :])
        return torch.index_select(x, dim, index, out=self.empty(name, shape, x))
