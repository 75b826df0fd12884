"""How many samples a batch holds, its first few, and several batches as one: pure functions on nested batches.

A batch is a tensor, or tuples, lists, dicts and dataclasses of tensors and other things. A tensor whose first dimension
is the number of samples is a column of the batch. So is a list with one element per sample, like captions or the target
dicts of a detector; it is told from a list of columns by what is inside: columns all have the batch's first dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Column = Any  # a tensor, or a list or tuple with one element per sample


def sample_count(batch: Any) -> int:
    """The number of samples in a batch, as Lightning counts: the first dimension of the first tensor that has one.

    Lightning's own ``extract_batch_size`` gives the same number, but warns about captions and the boxes of a detector,
    and advises something about ``self.log``.

    Raises:
        ValueError: if the batch holds no tensor.

    Example:
        >>> sample_count({"image": torch.zeros(5, 3), "caption": ["a"] * 5})
        5
    """
    tensors = [tensor for tensor in _tensors(batch) if tensor.ndim > 0]
    if not tensors:
        raise ValueError(
            f"cannot tell how many samples a calibration batch of type {type(batch).__name__} holds: it has no tensor. "
            f"Let calibration_loader be a DataLoader over a dataset with a length, or put a tensor in the batch."
        )
    return len(tensors[0])


def first_samples(batch: Any, count: int) -> Any:
    """The batch cut down to its first ``count`` samples; what is not a column, or holds no tensor, stays as it is.

    Example:
        >>> first_samples({"image": torch.arange(3), "caption": ["a", "b", "c"], "scale": 0.5}, 2)
        {'image': tensor([0, 1]), 'caption': ['a', 'b'], 'scale': 0.5}
    """
    if next(_tensors(batch), None) is None or count >= (size := sample_count(batch)):
        return batch
    return _map_columns(lambda path, columns: columns[0][:count], lambda path, values: values[0], [batch], [size])


def merge_batches(batches: Sequence[Any]) -> Any:
    """Several batches of one structure as a single batch with all their samples, in order.

    Args:
        batches: at least one batch. Things that are no columns (a flag, a scale) must be the same in all.

    Raises:
        ValueError: if columns cannot be concatenated, for instance token sequences padded to different lengths.

    Example:
        >>> merge_batches([(torch.tensor([1, 2]), ["a", "b"]), (torch.tensor([3]), ["c"])])
        (tensor([1, 2, 3]), ['a', 'b', 'c'])
    """
    return _map_columns(_concatenated, _same_in_all, batches, [sample_count(batch) for batch in batches])


def reordered(batch: Any, order: Sequence[int]) -> Any:
    """The batch whose sample ``i`` is sample ``order[i]`` of the given one.

    Example:
        >>> reordered({"image": torch.tensor([10, 11, 12])}, [2, 0, 1])
        {'image': tensor([12, 10, 11])}
    """

    def permuted(path: str, columns: list[Column]) -> Column:
        column = columns[0]
        if isinstance(column, Tensor):
            return column[torch.tensor(order, device=column.device)]
        return type(column)(column[index] for index in order)

    return _map_columns(permuted, lambda path, values: values[0], [batch], [sample_count(batch)])


def _concatenated(path: str, columns: list[Column]) -> Column:
    if not isinstance(columns[0], Tensor):
        return type(columns[0])(element for column in columns for element in column)
    if len({column.shape[1:] for column in columns}) > 1:
        shapes = ", ".join(sorted({str(tuple(column.shape)) for column in columns}))
        raise ValueError(
            f"cannot merge the calibration batches into one: {path} has the shapes {shapes}. Pad to one length in "
            f"the collate function of calibration_loader, or let one batch hold all samples (batch_size >= "
            f"calibration_samples)."
        )
    return torch.cat(columns)


def _same_in_all(path: str, values: list[Any]) -> Any:
    first = values[0]
    for value in values[1:]:
        same = torch.equal(value, first) if isinstance(first, Tensor) and isinstance(value, Tensor) else value == first
        if not same:
            raise ValueError(
                f"cannot merge the calibration batches into one: {path} has no dimension for the samples and differs "
                f"between batches. Leave it out in the collate function of calibration_loader, or let one batch hold "
                f"all samples (batch_size >= calibration_samples)."
            )
    return first


def _map_columns(
    on_column: Callable[[str, list[Column]], Any],
    on_other: Callable[[str, list[Any]], Any],
    parts: Sequence[Any],
    sizes: Sequence[int],
    path: str = "the batch",
) -> Any:
    """Walk through batches of one structure side by side; ``path`` names where in the batch we are, for messages."""

    def walk(keyed: Iterable[tuple[str, list[Any]]]) -> list[Any]:
        return [_map_columns(on_column, on_other, values, sizes, f"{path}{key}") for key, values in keyed]

    first, whole = parts[0], path == "the batch"
    if isinstance(first, Tensor):
        is_column = all(part.ndim > 0 and len(part) == size for part, size in zip(parts, sizes, strict=True))
        return (on_column if is_column else on_other)(path, list(parts))
    if isinstance(first, Mapping):
        _check_alike(path, [sorted(map(str, part)) for part in parts])
        mapped = _shallow_copy(first)
        for key, value in zip(first, walk((f"[{key!r}]", [part[key] for part in parts]) for key in first), strict=True):
            mapped[key] = value
        return mapped
    if isinstance(first, (tuple, list)):
        if not whole and _one_per_sample(parts, sizes):
            return on_column(path, list(parts))
        _check_alike(path, [len(part) for part in parts])
        values = walk((f"[{index}]", list(items)) for index, items in enumerate(zip(*parts, strict=True)))
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        values = walk((f".{name}", [getattr(part, name) for part in parts]) for name in names)
        return dataclasses.replace(first, **dict(zip(names, values, strict=True)))
    return on_other(path, list(parts))


def _check_alike(path: str, outlines: list[Any]) -> None:
    for outline in outlines[1:]:
        if outline != outlines[0]:
            raise ValueError(
                f"cannot merge the calibration batches into one: {path} holds {outlines[0]} in one batch and {outline} "
                f"in another. Let the collate function of calibration_loader give batches that are alike."
            )


def _one_per_sample(parts: Sequence[Sequence[Any]], sizes: Sequence[int]) -> bool:
    """Whether the lists hold one element for each sample, and not columns."""
    if any(len(part) != size or hasattr(part, "_fields") for part, size in zip(parts, sizes, strict=True)):
        return False
    lengths = [{len(tensor) for tensor in _tensors(part) if tensor.ndim > 0} for part in parts]
    return any(found != {size} for found, size in zip(lengths, sizes, strict=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(tuple(vars(value).values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _shallow_copy(mapping: Mapping[Any, Any]) -> Any:
    copy = getattr(mapping, "copy", None)  # keeps the class: defaultdict, transformers' BatchEncoding
    return copy() if callable(copy) else dict(mapping)
