"""Tensors with one row per sample, kept in memory or in a file that is mapped into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class SampleCache:
    """Columns of equal length, written batch by batch and read in any order.

    Memory is taken when the first batch tells the shapes, for all samples at once. On disk a column is a file in
    ``folder`` that is removed by :meth:`close`; a full disk is an error then, not in the middle of a training step.

    Args:
        samples: how many rows.
        folder: where the files go; ``None`` keeps the columns in memory.

    Example:
        >>> cache = SampleCache(4)
        >>> cache.put(0, [torch.arange(8).view(2, 4)])
        >>> cache.put(2, [torch.arange(8, 16).view(2, 4)])
        >>> cache.take(torch.tensor([3, 0]))
        [tensor([[12, 13, 14, 15],
                [ 0,  1,  2,  3]])]
    """

    def __init__(self, samples: int, folder: Path | None = None) -> None:
        self.samples = samples
        self.folder = folder
        self.columns: list[Tensor] = []
        self.files: list[Path] = []

    @property
    def nbytes(self) -> int:
        """The size of all columns."""
        return sum(column.nbytes for column in self.columns)

    def put(self, start: int, columns: Sequence[Tensor]) -> None:
        """Write rows, from ``start`` on.

        Raises:
            OSError: if the disk is too full for the columns.
            ValueError: if rows have another shape than those before.
        """
        if not self.columns:
            for number, column in enumerate(columns):
                self.columns.append(self._allocate(number, column))
        for kept, column in zip(self.columns, columns, strict=True):
            if kept.shape[1:] != column.shape[1:]:
                raise ValueError(
                    f"samples of shape {tuple(kept.shape[1:])} and {tuple(column.shape[1:])} cannot be kept together: "
                    f"pad or crop the calibration samples to one size"
                )
            kept[start : start + len(column)] = column

    def take(self, rows: Tensor) -> list[Tensor]:
        """The given rows of every column."""
        return [column[rows.to(column.device)] for column in self.columns]

    def close(self) -> None:
        """Let go of the columns, and remove their files."""
        self.columns = []
        for file in self.files:
            file.unlink(missing_ok=True)
        self.files = []

    def _allocate(self, number: int, like: Tensor) -> Tensor:
        shape = (self.samples, *like.shape[1:])
        if self.folder is None:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{id(self):x}-{number}.bin"
        self.files.append(file)
        elements = int(torch.Size(shape).numel())
        size = elements * like.element_size()
        try:
            with file.open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, max(1, size))  # writing to a mapped file on a full disk kills
        except OSError as error:
            self.close()
            raise OSError(
                error.errno,
                f"no room for {size / 2**20:.0f} MB of cached samples in {self.folder}; "
                f"use fewer samples=, cache='recompute', or another state_dir=",
            ) from error
        flat = torch.from_file(str(file), shared=True, size=elements, dtype=like.dtype)
        return flat.view(shape)
