"""The repeated blocks of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn


def repeated_blocks(module: nn.Module, order: Sequence[str]) -> list[str]:
    """Members of lists or sequences that hold two or more of one class, outermost only.

    Args:
        module: the model.
        order: names of the modules that ran, in the order of their first call.

    >>> net = nn.Sequential(nn.Linear(2, 2), *(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)))
    >>> repeated_blocks(net, ["", "0", "1", "1.0", "2", "2.0", "3", "3.0"])
    ['1', '2', '3']
    """
    modules = dict(module.named_modules())
    blocks: list[str] = []
    for name in order:
        parent, child = modules[name.rpartition(".")[0]], modules[name]
        if not name or not isinstance(parent, (nn.ModuleList, nn.Sequential)) or not list(child.children()):
            continue
        siblings = Counter(type(m) for m in parent.children())
        if siblings[type(child)] > 1 and not any(name.startswith(f"{block}.") for block in blocks):
            blocks.append(name)
    return blocks
