"""The structure of a model, kept while it is rebuilt: which class, children, Parameters and buffers each module has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Parameters, buffers, children and all kinds of hooks: what torch keeps in containers of its own.
_CONTAINERS = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]


@contextmanager
def structure_kept(model: nn.Module) -> Iterator[None]:
    """Give a model its structure back if the block fails, however far the block came.

    Every module that is in the model now has its class, its attributes and the very same children, Parameters, buffers
    and hooks afterwards; the values of Parameters and buffers are not looked at.

    Args:
        model: the model that is rebuilt inside.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> layer, weight = net[0], net[0].weight
        >>> try:
        ...     with structure_kept(net):
        ...         net[0].weight, net[0] = None, nn.Identity()
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     net[0] is layer, layer.weight is weight
        (True, True)
    """
    kept = [
        (
            module,
            type(module),
            dict(vars(module)),
            {name: vars(module)[name].copy() for name in _CONTAINERS if name in vars(module)},
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, own_class, attributes, containers in kept:
            module.__class__ = own_class
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in containers.items():  # the containers themselves stay: handles of hooks point to them
                vars(module)[name].clear()
                vars(module)[name].update(content)
        raise
