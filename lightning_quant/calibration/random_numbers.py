"""A stream of random numbers apart from the run's."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """Where the global random number generators of Python, NumPy, torch and CUDA stand."""

    python: tuple[Any, ...]
    numpy: dict[str, Any] | tuple[Any, ...]
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """Read the generators.

        Example:
            >>> state = RandomState.now()
            >>> first = torch.rand(2)
            >>> state.restore()
            >>> torch.equal(first, torch.rand(2))
            True
        """
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class OwnRandomNumbers:
    """A context whose random numbers are its own; the run's go on afterwards as if it had not been there.

    Entered again, it goes on where it ended. Exceptions and Ctrl-C give the run's numbers back too.

    Args:
        state: where its random numbers start; by default where the run's stand now.

    Example:
        >>> state, own = RandomState.now(), OwnRandomNumbers()
        >>> with own:
        ...     first = torch.rand(1)
        >>> with own:
        ...     second = torch.rand(1)
        >>> bool(first == second), all(map(torch.equal, [state.torch], [torch.get_rng_state()]))
        (False, True)
    """

    def __init__(self, state: RandomState | None = None) -> None:
        self._own = state or RandomState.now()
        self._outside = self._own

    def __enter__(self) -> None:
        self._outside = RandomState.now()
        self._own.restore()

    def __exit__(self, *exception: object) -> None:
        self._own = RandomState.now()
        self._outside.restore()
