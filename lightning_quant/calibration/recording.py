"""What goes into one unit of a model and what comes out, sample by sample.

A unit is any module. Its arguments are whatever its parent passes: several tensors, keywords, masks, rotary tables.
Running it once on two samples and once on one tells which tensors have an entry per sample, along which axis, and which
are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass
class Call:
    """One call of a unit: its flat arguments and results, and the outputs of the layers inside."""

    inputs: list[Any]
    spec: TreeSpec
    outputs: list[Any] = field(default_factory=list)
    inner: dict[str, Tensor] = field(default_factory=dict)


class _Enough(Exception):
    """The unit has run; what lies behind it need not."""


def record(
    unit: nn.Module, run: Callable[[], Any], calls: int | None = None, inner: Mapping[str, nn.Module] | None = None
) -> list[Call]:
    """Run a model and write down the calls of one of its modules.

    Args:
        unit: the module.
        run: runs the model.
        calls: stop the model after so many calls of the unit; ``None`` runs it to the end.
        inner: layers inside the unit whose outputs are written down too, of their last call within each.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> call = record(net[1], lambda: net(torch.ones(4, 3)))[0]
    >>> [x.shape for x in call.inputs], [x.shape for x in call.outputs]
    ([torch.Size([4, 2])], [torch.Size([4, 2])])
    """
    found: list[Call] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        # A later module may change its input in place.
        found.append(Call([x.clone() if isinstance(x, Tensor) else x for x in leaves], spec))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found[-1].outputs = [x.clone() if isinstance(x, Tensor) else x for x in tree_flatten(output)[0]]
        if calls is not None and len(found) == calls:
            raise _Enough

    def look_inside(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if found and not found[-1].outputs and isinstance(output, Tensor):
                found[-1].inner[name] = output.clone()

        return hook

    handles = [
        unit.register_forward_pre_hook(enter, with_kwargs=True),
        unit.register_forward_hook(leave, with_kwargs=True),
        *(module.register_forward_hook(look_inside(name)) for name, module in (inner or {}).items()),
    ]
    try:
        run()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


class Axis(NamedTuple):
    """Where a tensor has its samples: along which axis, and how many entries for each (windows of an image: many)."""

    position: int
    rows: int

    def first(self, x: Tensor) -> Tensor:
        """The tensor with samples first: (samples, ...), or (samples, rows, ...)."""
        x = x.movedim(self.position, 0)
        return x if self.rows == 1 else x.unflatten(0, (-1, self.rows))

    def back(self, x: Tensor) -> Tensor:
        """The way back."""
        return (x if self.rows == 1 else x.flatten(0, 1)).movedim(0, self.position)


@dataclass(frozen=True)
class Signature:
    """How the calls of a unit look: which leaves have an entry per sample.

    Args:
        calls: how often one forward of the model calls the unit.
        spec: the tree of its arguments.
        inputs: for each argument leaf the axis of the samples, or ``None`` where it has none.
        outputs: the same for the leaves of the result.
        constants: the argument leaves without samples.
        inner: the axis of the samples in the outputs of the layers inside.
    """

    calls: int
    spec: TreeSpec
    inputs: list[Axis | None]
    outputs: list[Axis | None]
    constants: list[Any]
    inner: dict[str, Axis]

    def arguments(self, columns: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments out of the leaves that have samples; those come with samples first."""
        filled, remaining = list(self.constants), iter(columns)
        for position, axis in enumerate(self.inputs):
            if axis is not None:
                filled[position] = axis.back(next(remaining))
        args, kwargs = tree_unflatten(filled, self.spec)
        return args, kwargs

    def columns(self, call: Call) -> list[Tensor]:
        """The argument leaves that have samples, samples first."""
        return [axis.first(leaf) for leaf, axis in zip(call.inputs, self.inputs, strict=True) if axis is not None]

    def results(self, output: Any) -> list[Tensor]:
        """The floating tensors with samples in what the unit returned, samples first."""
        return self._outputs(tree_flatten(output)[0])

    def results_of(self, call: Call) -> list[Tensor]:
        """The same of a recorded call."""
        return self._outputs(call.outputs)

    def _outputs(self, leaves: Sequence[Any]) -> list[Tensor]:
        return [axis.first(leaf) for leaf, axis in zip(leaves, self.outputs, strict=True) if axis is not None]


def signature(name: str, two: Sequence[Call], one: Sequence[Call]) -> Signature:
    """Compare the calls on two samples with those on one.

    Args:
        name: of the unit, for errors.
        two: its calls in a forward of two samples.
        one: its calls in a forward of one sample.

    Raises:
        ValueError: if the unit cannot be fed sample by sample.
    """
    if not two or len(two) != len(one):
        raise ValueError(
            f"`{name}` cannot be reconstructed: it ran {len(two)} times for two samples, {len(one)} for one"
        )
    first = two[0]
    inputs = _axes(name, first.inputs, one[0].inputs)
    outputs = [
        axis if isinstance(leaf, Tensor) and leaf.is_floating_point() else None
        for leaf, axis in zip(first.outputs, _axes(name, first.outputs, one[0].outputs), strict=True)
    ]
    for call in two[1:]:
        if call.spec != first.spec or _shapes(call.inputs) != _shapes(first.inputs):
            raise ValueError(
                f"`{name}` cannot be reconstructed: one forward calls it {len(two)} times with different arguments; "
                f"reconstruct the layers inside it, or what is around it, with granularity=[...]"
            )
    if all(axis is None for axis in inputs) or all(axis is None for axis in outputs):
        raise ValueError(
            f"`{name}` cannot be reconstructed: no tensor that goes in or comes out has an entry for each sample; "
            f"name other units with granularity=[...]"
        )
    constants = [None if axis is not None else leaf for leaf, axis in zip(first.inputs, inputs, strict=True)]
    inner = {
        key: axis
        for key, leaf in first.inner.items()
        if key in one[0].inner and (axis := _axes(name, [leaf], [one[0].inner[key]])[0]) is not None
    }
    return Signature(len(two), first.spec, inputs, outputs, constants, inner)


def _axes(name: str, two: Sequence[Any], one: Sequence[Any]) -> list[Axis | None]:
    axes: list[Axis | None] = []
    for a, b in zip(two, one, strict=True):
        if not isinstance(a, Tensor) or a.shape == b.shape:
            axes.append(None)
            continue
        differing = [axis for axis, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(differing) != 1 or a.shape[differing[0]] != 2 * b.shape[differing[0]]:
            raise ValueError(
                f"`{name}` cannot be reconstructed: for two samples it has a tensor of shape {tuple(a.shape)}, "
                f"for one of shape {tuple(b.shape)}, which is not one entry per sample; "
                f"name other units with granularity=[...]"
            )
        axes.append(Axis(differing[0], b.shape[differing[0]]))
    return axes


def _shapes(leaves: Sequence[Any]) -> list[Any]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


@contextmanager
def hooked_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The outputs of layers while a unit runs, with their gradients."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def same_constants(name: str, before: Sequence[Any], now: Sequence[Any]) -> None:
    """Refuse arguments that differ from batch to batch although they have no entry per sample."""
    for a, b in zip(before, now, strict=True):
        if isinstance(a, Tensor) and (not isinstance(b, Tensor) or a.shape != b.shape or not torch.equal(a, b)):
            raise ValueError(
                f"`{name}` cannot be reconstructed: one of its arguments, of shape {tuple(a.shape)}, differs "
                f"from batch to batch but has no entry per sample; name other units with granularity=[...]"
            )
