"""Which layers of a model a method works on, and why not on the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_quant.graph.patterns import attention_name, matches, matching
from lightning_quant.graph.trace import ModelGraph
from lightning_quant.layers import AttentionSite, QuantizedLayer, twin_of, why_not_swappable


@dataclass
class Selection:
    """Names of the layers and attention sites to quantize, in call order, and why others stay float.

    ``doors`` are modules whose forward would pass quantized layers by if it were not watched: it reads their weights
    itself, or takes one of torch's fused fast paths.
    """

    layers: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    doors: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def select(
    model: nn.Module,
    graph: ModelGraph,
    target: str | None = None,
    skip: Sequence[str] = (),
    attention: bool = True,
    slots: Collection[str] = (QuantizedLayer.WEIGHTS, QuantizedLayer.INPUTS),
) -> Selection:
    """Choose what is quantized: layers of known type within ``target`` that are not skipped.

    A layer that one traced batch did not reach is chosen too: another batch may reach it, and calibration gives back
    those that none did.

    Args:
        model: the float model.
        graph: what one forward told about it.
        target: name of the submodule to stay within; default: the whole model.
        skip: name patterns of what stays float; each must match something.
        attention: whether to choose attention sites as well.
        slots: what is wanted of the layers; another method may have the rest.

    Raises:
        ValueError: if ``target`` or a pattern names nothing, a layer is quantized (or pruned) already or cannot be
            swapped, or nothing is left.
    """
    modules = dict(model.named_modules())
    if target is not None:  # what its author wrote as `net.head` is `net._orig_mod.head` once `net` is compiled
        target = next((name for name in modules if name.replace("_orig_mod.", "") == target), target)
    if target is not None and target not in modules:
        matching([name for name in modules if name], target, "target")
        raise ValueError(f"target: there is no submodule named {target!r}; give its full name")
    inside = [name for name in modules if target is None or name == target or name.startswith(f"{target}.")]
    taken = next((name for name in inside if _is_taken(modules[name], slots, attention)), None)
    if taken is not None:
        done = "pruned" if QuantizedLayer.PRUNED in slots else "quantized"
        raise ValueError(f"`{taken}` is {done} already: call remove(model) of the callback that did it, or set target=")
    ran = {name: position for position, name in enumerate(graph.order)}
    inside.sort(key=lambda name: ran.get(name, len(ran)))
    known = [name for name in inside if twin_of(modules[name]) is not None or _looks_like_one(modules[name])]
    sites = [name for name in inside if name in graph.attention or isinstance(modules[name], nn.MultiheadAttention)]
    for pattern in skip:
        matching({*known, *map(attention_name, sites)}, pattern, "skip")

    chosen = Selection()
    for name in known:
        why = _why_float(modules[name], name, skip, name in ran)
        if why is None:
            chosen.layers.append(name)
        else:
            chosen.skipped[name] = why
    if attention:
        chosen.attention = [
            name
            for name in sites
            if name in ran and not any(matches(attention_name(name), pattern) for pattern in skip)
        ]
    chosen.doors = [name for name in ran if name in inside and _passes_by(modules[name], name, graph, chosen.layers)]
    if not chosen.layers:
        found = "; ".join(f"{name}: {why}" for name, why in list(chosen.skipped.items())[:3])
        raise ValueError(
            f"nothing to quantize in {type(model).__name__}"
            + (f" ({found})" if found else "")
            + ": check target= and skip="
        )
    return chosen


def _is_taken(module: nn.Module, slots: Collection[str], attention: bool) -> bool:
    """Whether another method has what is wanted of a module."""
    if isinstance(module, QuantizedLayer):
        return not module.filled().isdisjoint({*slots, "attention"} if attention else slots)
    return attention and isinstance(module, AttentionSite) and len(module.attention_quantizers) > 0


def _passes_by(module: nn.Module, name: str, graph: ModelGraph, layers: Sequence[str]) -> bool:
    """Whether a module's forward would not call the quantized layers inside it."""
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
        return any(layer.startswith(f"{name}.") for layer in layers)
    return any(layer in layers for layer in graph.functional.get(name, ()))


def _looks_like_one(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)) and not isinstance(
        module, QuantizedLayer
    )


def _why_float(layer: nn.Module, name: str, skip: Sequence[str], ran: bool) -> str | None:
    """Why a layer stays float, or ``None``; refuses a layer that would be quantized but must not be touched."""
    for pattern in skip:
        if matches(name, pattern):
            return f"skip={pattern!r}"
    refusal = why_not_swappable(layer)
    if refusal and not ran:
        return f"it did not run, and {refusal}"
    if refusal:
        raise ValueError(
            f"`{name}` cannot be quantized: {refusal}; undo that, or leave the layer float with skip=[{name!r}]"
        )
    if twin_of(layer) is None:
        return f"its class {type(layer).__name__} has a forward that is not known here"
    return None
