"""The record of what was done to a model, kept with the model and inside its state dict.

Every state dict of a quantized model carries one extra entry: the plans as JSON bytes. Its *name* is the sentence
that torch prints when somebody loads the file into a plain float model. Loading a state dict into a model that has a
record first brings the structure in line with the file:

* the file has plans: the same structure is built, after all refusals;
* the file has none, so it is a float one: the model becomes float again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.kernels.layer_door import require_float_weights
from lightning_quant.layers import Plan, structure_kept
from lightning_quant.quantizers import build_quantizer
from lightning_quant.quantizers.packing import unpack

_ENTRY = "lightning_quant: "
_ATTRIBUTE = "_lightning_quant"


@dataclass
class Record:
    """What is known of a model's quantization.

    Args:
        plans: by the state key of the callback that made them.
        expected: arguments that the callbacks of the running Trainer insist on, by state key.
        handles: the hooks on the model.
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    expected: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)


def record_of(model: nn.Module) -> Record | None:
    """The model's record, if it has one."""
    record: Record | None = model.__dict__.get(_ATTRIBUTE)
    return record


def attach_record(model: nn.Module) -> Record:
    """The model's record; made, and hooked into saving and loading, where there is none."""
    record = record_of(model)
    if record is None:
        record = Record()
        record.handles = [
            model.register_state_dict_post_hook(_write_plans),
            model.register_load_state_dict_pre_hook(_bring_in_line),
        ]
        object.__setattr__(model, _ATTRIBUTE, record)
    return record


def detach_record(model: nn.Module) -> None:
    """Remove a record that says nothing any more, and its hooks."""
    record = record_of(model)
    if record is not None and not record.plans and not record.expected:
        for handle in record.handles:
            handle.remove()
        delattr(model, _ATTRIBUTE)


def read_plans(state_dict: dict[str, Any], prefix: str = "") -> dict[str, Plan]:
    """The plans inside a state dict, by state key; empty for a float one."""
    entry = next((key for key in state_dict if key.startswith(prefix + _ENTRY)), None)
    if entry is None:
        return {}
    stored = json.loads(bytes(state_dict[entry].tolist()))
    return {key: Plan.from_dict(plan) for key, plan in stored["plans"].items()}


def entry_for(plans: dict[str, Plan]) -> tuple[str, Tensor]:
    """The state dict entry that holds the plans."""
    methods = ", ".join(sorted({plan.method for plan in plans.values()}))
    name = (
        f"{_ENTRY}this model is quantized; load it with the callback that made it ({methods}) in the Trainer, "
        "into a LightningModule with CalibrationMixin, or by lightning_quant's load_quantized(model, path)"
    ).replace(".", "")
    text = json.dumps({"format": 1, "plans": {key: plan.to_dict() for key, plan in plans.items()}})
    return name, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _write_plans(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    record = record_of(model)
    if record is not None and record.plans:
        name, value = entry_for(record.plans)
        state_dict[prefix + name] = value


def _bring_in_line(model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before any tensor is loaded: refuse, or rebuild the structure that the state dict belongs to."""
    record = record_of(model)
    if record is None:
        return
    require_float_weights(model)
    plans = read_plans(state_dict, prefix)
    _refuse_another_plan(plans, record.expected)
    with rebuilt_or_as_it_was(model, record):
        if _structure(plans) != _structure(record.plans):  # one that stands is kept: an optimizer may hold its scales
            make_float(model, record)
            for plan in plans.values():
                plan.check(model)
            for key, plan in plans.items():
                plan.apply(model)
                record.plans[key] = plan
        for key, plan in plans.items():
            record.plans[key].calibration = plan.calibration
            decode_weights(model, plan, state_dict, prefix)
        _refuse_other_tensors(model, plans, state_dict, prefix)
    for key in [key for key in state_dict if key.startswith(prefix + _ENTRY)]:
        del state_dict[key]


def decode_weights(model: nn.Module, plan: Plan, state_dict: dict[str, Any], prefix: str = "") -> None:
    """Put float weights into a state dict in the place of packed codes.

    A model whose float weights were dropped saves those instead. The model already has the plan's structure.
    """
    for name, layer in plan.quantized_layers(model).items():
        for weight, quantizer in layer.weight_quantizers().items():
            key = f"{prefix}{name}.{weight}"
            codes = state_dict.pop(f"{key}.codes", None)
            if codes is None:
                continue
            twin, rows = build_quantizer(quantizer.scheme, quantizer.axis), layer.weight_rows(weight)
            state = {f"{key}_quantizer.{part}": part for part in twin.state_names}
            twin.load_state_dict({part: state_dict[long] for long, part in state.items() if long in state_dict})
            decoded = twin.decode(unpack(codes, twin.scheme.bits, tuple(rows.shape))).to(rows.dtype)
            state_dict[key] = decoded.t() if layer.transposed else decoded


@contextmanager
def rebuilt_or_as_it_was(model: nn.Module, record: Record) -> Iterator[None]:
    """Give a model its structure and plans back if rebuilding it fails."""
    plans = dict(record.plans)
    with structure_kept(model):
        try:
            yield
        except BaseException:
            record.plans = plans
            raise


def _structure(plans: dict[str, Plan]) -> dict[str, Any]:
    parts = ("layers", "attention", "created", "rotations", "steps", "positions")
    return {key: tuple(getattr(plan, part) for part in parts) for key, plan in plans.items()}


def make_float(model: nn.Module, record: Record, drop_created: bool = True) -> None:
    """Undo every plan's structure; the values of the Parameters stay as they are."""
    for plan in record.plans.values():
        plan.undo(model)
        if drop_created:
            plan.forget_created(model)
    record.plans.clear()


def _refuse_another_plan(plans: dict[str, Plan], expected: dict[str, tuple[str, dict[str, Any]]]) -> None:
    for key, (method, arguments) in expected.items() if plans else ():
        if key not in plans:
            made_by = ", ".join(f"{plan.method}({_listed(plan.arguments)})" for plan in plans.values())
            raise ValueError(
                f"this checkpoint was quantized by {made_by}, but the Trainer has {method}({_listed(arguments)}): "
                f"use the callback that made it, or start from the float checkpoint"
            )
        stored = plans[key].arguments
        differing = sorted(name for name in {*stored, *arguments} if stored.get(name) != arguments.get(name))
        if differing:
            raise ValueError(
                f"this checkpoint is from another plan: "
                f"{method} there has {_listed({name: stored.get(name) for name in differing})}, "
                f"here {_listed({name: arguments.get(name) for name in differing})}; "
                f"give the callback the same arguments, or start from the float checkpoint"
            )


def _refuse_other_tensors(model: nn.Module, plans: dict[str, Plan], state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse a state dict that lacks tensors of a planned layer, or whose weights have another shape."""
    own = {key: value for key, value in model.state_dict(prefix=prefix).items() if isinstance(value, Tensor)}
    for plan in plans.values():
        names = [
            *plan.layers,
            *(f"{name}.attention_quantizers" if name else "attention_quantizers" for name in plan.attention),
        ]
        planned = tuple(f"{prefix}{name}." for name in names)
        # these are there only if a solver found them
        solved = ("_quantizer.codes", "_pruning.offset", "_pruning.correction", "_pruning.before")
        keys = [key for key in own if key.startswith(planned) and not key.endswith(solved)]
        lacking = [key for key in keys if key not in state_dict]
        if lacking:
            raise ValueError(
                f"this checkpoint is truncated: its plan ({plan.method}) needs `{lacking[0]}`, "
                f"which it lacks ({len(lacking)} keys in all)"
            )
        for key in keys:
            stored, here = tuple(state_dict[key].shape), tuple(own[key].shape)
            adopts = any(
                part in key for part in ("_quantizer", "_pruning.", "_low_rank.")
            )  # it takes the stored shape over
            if not adopts and stored != here:
                raise ValueError(f"this checkpoint is of another model: `{key}` is {stored} there and {here} here")


def _listed(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
