"""Memory that is not given back to the system between one layer and the next."""

from __future__ import annotations

import ctypes
import sys

# The parameters of glibc's mallopt, and the values at which its own adjustment ends.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_KEEP_ALL = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is asked for next; whether it can.

    glibc hands large blocks back to the system as soon as they are freed, which then clears their pages one by one when
    they are asked for again: for a network of integer layers that takes as long as the layers.
    """
    return _set(_TRIM_THRESHOLD, _KEEP_ALL) and _set(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def give_freed_memory_back() -> None:
    """Hand back what is kept, and let the C library do so from now on, as far as its own adjustment would end."""
    if _set(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD):
        ctypes.CDLL(None).malloc_trim(0)


def _set(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and mallopt(parameter, value) == 1
