"""Which is faster for the model at hand, torch's kernels or OpenVINO: found out on a few batches while predict runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

SETTLING, TIMED = 1, 2  # batches: the first one compiles or measures, of the others the fastest counts
WORTH = 30.0  # seconds that must be left for torch's kernels; compiling takes a few

Who = Literal["torch", "openvino"]


class Trial:
    """Times torch's kernels on the first batches, then OpenVINO on the next ones.

    Args:
        clock: tells seconds.

    Attributes:
        turn: whose turn it is; ``None`` when it is known who is faster.
        seconds: of the fastest batch, by turn.

    >>> seconds = iter([0, 9, 10, 13, 20, 23, 30, 39, 40, 41, 50, 51])
    >>> trial = Trial(clock=lambda: next(seconds))
    >>> for _ in range(6):
    ...     trial.began()
    ...     if answers := trial.ended(among=100):
    ...         print(answers, end=";")
    openvino;openvino;
    >>> trial.turn, trial.seconds
    (None, {'torch': 3, 'openvino': 1})
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.turn: Who | None = "torch"
        self.seconds: dict[Who, float] = {}
        self.batches = 0
        self._latest: list[float] = []
        self._began = 0.0

    def began(self) -> None:
        """A batch begins."""
        self._began = self.clock()

    def ended(self, among: float) -> Who | None:
        """A batch has ended, among so many. Says who shall answer from now on, where that is news."""
        self.batches += 1
        self._latest.append(self.clock() - self._began)
        if self.turn is None or len(self._latest) < SETTLING + TIMED:
            return None
        self.seconds[self.turn], self._latest = min(self._latest[SETTLING:]), []
        if self.turn == "torch" and (among - self.batches) * self.seconds["torch"] > WORTH:
            self.turn = "openvino"
            return "openvino"
        self.turn = None
        return min(self.seconds, key=lambda who: self.seconds[who])

    def __str__(self) -> str:
        """What was found, in a line."""
        timed = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in self.seconds.items())
        if "openvino" not in self.seconds:
            return f"a batch took {timed}: what is left is over before OpenVINO would have compiled"
        return f"the fastest batch of two took {timed}"
