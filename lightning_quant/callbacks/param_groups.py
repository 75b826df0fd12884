"""Scales in an optimizer: without weight decay, with a learning rate of their own if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

# What a scheduler keeps for each parameter group: learning rates, and other things.
_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_OTHERS = ("lr_lambdas", "base_momentums", "max_momentums")


def group_scales(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    scales: Mapping[str, tuple[nn.Parameter, nn.Parameter | None]],
    lr: float | None = None,
) -> None:
    """See to it that every scale is trained, and without weight decay.

    A scale that an optimizer holds stays in its group, unless that group has weight decay or ``lr`` is given. Else it
    moves to a group of its own, which is like the one it comes from, and which the schedulers treat alike. A scale
    that no optimizer holds joins the optimizer that trains its layer, or else the first one.

    Args:
        optimizers: those of the run.
        schedulers: their learning rate schedulers.
        scales: each scale with a weight of its layer, by name.
        lr: learning rate of the scales where a schedule stands at 1 (at its peak, for ``OneCycleLR``); ``None``: that
            of their layer.

    >>> import torch
    >>> weight, scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))
    >>> optimizer = torch.optim.AdamW([weight], lr=0.01)
    >>> group_scales([optimizer], [], {"scale": (scale, weight)})
    >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    [(0.01, 0.01), (0.01, 0.0)]
    """
    if not optimizers:
        return
    held = {
        id(parameter): (optimizer, index)
        for optimizer in optimizers
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    moves: dict[tuple[Optimizer, int], dict[str, nn.Parameter]] = {}
    for name, (scale, weight) in scales.items():
        home = held.get(id(scale))
        if home is None or lr is not None or home[0].param_groups[home[1]].get("weight_decay", 0):
            source = home or held.get(id(weight), (optimizers[0], 0))
            moves.setdefault(source, {})[name] = scale
    for (optimizer, index), parameters in moves.items():
        factor = _split_off(optimizer, index, parameters, lr)
        for scheduler in schedulers:
            if scheduler.optimizer is optimizer:
                _extend(scheduler, index, factor)


def _split_off(optimizer: Optimizer, index: int, parameters: Mapping[str, nn.Parameter], lr: float | None) -> float:
    """Move parameters to a new group that is like the given one; returns how its learning rate compares."""
    group = optimizer.param_groups[index]
    moving = {id(parameter) for parameter in parameters.values()}
    stay = [position for position, parameter in enumerate(group["params"]) if id(parameter) not in moving]
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][position] for position in stay]
    usual = group.get("max_lr") or group.get("initial_lr") or group["lr"]  # whatever a warm-up makes of it just now
    factor = 1.0 if lr is None or not usual else float(lr / usual)
    new = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    new |= {key: new[key] * factor for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in new}
    new |= {"weight_decay": 0.0} if "weight_decay" in new else {}
    new["params"] = list(parameters.items() if "param_names" in group else parameters.values())
    optimizer.add_param_group(new)
    return factor


def _extend(scheduler: Any, index: int, factor: float) -> None:
    """Let a scheduler drive the newest group of its optimizer as it drives an older one."""
    for name in (*_RATES, *_OTHERS):
        values = getattr(scheduler, name, None)
        if isinstance(values, list):
            setattr(scheduler, name, [*values, values[index] * factor if name in _RATES else values[index]])
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _extend(inner, index, factor)
