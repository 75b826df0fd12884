"""In which order callbacks may work on the same layers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_quant.layers import Plan, QuantizedLayer

# What a callback does to float weights, in the order in which it has to happen. Callbacks of one step come in any
# order, each in slots of its own: formats of weights, formats of inputs, pruning.
ORDER = {
    "rewrite": "scales, shifts or rotates weights",  # which a mask, or codes that were solved for, would not follow
    "absorb": "moves weights along directions that no input has",  # which would fill what is pruned
    "decide": "rounds or prunes weights",
}


def check_callbacks(callbacks: Sequence[Any], own: Any) -> None:
    """Refuse a list of callbacks that would work on the same layers in an order that cannot be right.

    Args:
        callbacks: of the Trainer.
        own: the one that is being set up.

    Raises:
        ValueError: naming both callbacks, and the order.
    """
    for other in callbacks[: callbacks.index(own)] if own in callbacks else ():
        ours = getattr(other, "step", None) in ORDER
        if ours and _overlap(own, other) and set(own.slots).isdisjoint(other.slots):  # the same slot is refused anyway
            _check(type(own).__name__, own.step, type(other).__name__, other.step, other.slots)


def check_order(plan: Plan, key: str, plans: Mapping[str, Plan], reconstructs: bool = False) -> None:
    """Refuse to work on layers on which an earlier callback did what has to come later.

    Args:
        plan: what a callback is going to do.
        key: its state key.
        plans: what was done, by state key.
        reconstructs: whether the callback learns how weights are rounded.

    Raises:
        ValueError: naming both callbacks, the order and a layer.
    """
    for other_key, other in plans.items():
        shared = _shared(plan, other)
        if other_key == key or shared is None:
            continue
        slots = other.layers[shared].slots
        _check(plan.method, plan.step, other.method, other.step, slots, f", and has done so with `{shared}`")
        if reconstructs and other.layers[shared].pruned is not None:
            raise ValueError(
                f"{plan.method}(reconstruct=...) would round pruned weights of `{shared}` away from 0: put "
                f"{plan.method} before {other.method} in the Trainer's callbacks"
            )


def check_last(method: str, key: str, plans: Mapping[str, Plan]) -> None:
    """Refuse to take back what another callback has built upon.

    Args:
        method: the callback's class name.
        key: its state key.
        plans: what was done, by state key, in the order in which it was.

    Raises:
        ValueError: naming the callback that came later.
    """
    later = list(plans)[list(plans).index(key) + 1 :] if key in plans else []
    for other in (plans[name] for name in reversed(later)):
        shared = _shared(plans[key], other)
        if shared is not None:
            raise ValueError(
                f"{other.method} came after {method} and works on what that made of `{shared}`: "
                f"call {other.method}.remove(model) before {method}.remove(model)"
            )


def earlier(one: str, other: str) -> str:
    """Of two steps the one that has to come first."""
    return min(one, other, key=list(ORDER).index)


def _check(name: str, step: str, other: str, other_step: str, slots: Sequence[str], done: str = "") -> None:
    """Refuse what comes too late, behind a callback that worked on these slots."""
    if step == other_step == "rewrite" and slots:
        raise ValueError(
            f"{name} {ORDER[step]}, and the scales that {other} finds before would be void: let {other} quantize "
            f"neither weights nor activations, or give each another target="
        )
    # what is known of inputs holds for any weight that gives the same outputs
    harmed = set(slots) if step == "rewrite" else set(slots) - {QuantizedLayer.INPUTS}
    if list(ORDER).index(step) < list(ORDER).index(other_step) and harmed:
        raise ValueError(
            f"{name} {ORDER[step]}, which has to come before {other}, which {ORDER[other_step]}{done}: "
            f"put {name} before {other} in the Trainer's callbacks"
        )


def _shared(plan: Plan, other: Plan) -> str | None:
    return next((name for name in plan.layers if name in other.layers), None)


def _overlap(one: Any, other: Any) -> bool:
    """Whether the parts of the model that two callbacks work on have a part in common."""
    first, second = (getattr(callback, "target", None) or "" for callback in (one, other))
    return not first or not second or f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")
