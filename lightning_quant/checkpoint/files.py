"""A quantized model on disk, without pickle: packed codes in safetensors, everything else in JSON."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_quant.checkpoint.manifest import (
    attach_record,
    detach_record,
    entry_for,
    read_plans,
    rebuilt_or_as_it_was,
    record_of,
)
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.quantizers import SplitQuantizer, build_quantizer
from lightning_quant.quantizers.packing import pack, unpack

TENSORS, DESCRIPTION = "model.safetensors", "quantization.json"


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a calibrated model as ``model.safetensors`` (weights as packed integer codes) and ``quantization.json``.

    Of a layer that is only pruned the kept weights are written, and one bit for each weight that tells which they are.

    Args:
        model: the LightningModule that a callback has quantized.
        folder: is made if it does not exist.

    Raises:
        ValueError: if the model is not quantized, not calibrated yet, or holds a weight that is no plain Parameter.

    >>> save_quantized(model, "deit_w4a4")  # doctest: +SKIP
    >>> load_quantized(DeiT(), "deit_w4a4")  # doctest: +SKIP
    """
    record = record_of(model)
    if record is None or not record.plans:
        raise ValueError(
            f"{type(model).__name__} is not quantized: run trainer.validate with a quantization callback first"
        )
    for plan in record.plans.values():
        for name in plan.lacking(model):
            raise ValueError(f"`{name}` is not calibrated: run trainer.validate with {plan.method} first")
    state = dict(model.state_dict())
    del state[entry_for(record.plans)[0]]
    packed = {key: value for layer in _packable(model) for key, value in _pack_layer(model, *layer, state).items()}
    tied = _split_tied(state)
    plans = {key: plan.to_dict() for key, plan in record.plans.items()}
    description = json.dumps({"format": 1, "plans": plans, "packed": packed, "tied": tied}, indent=1)
    tensors = {key: value.contiguous() for key, value in state.items()}
    _write_both(Path(folder), description, tensors)


def load_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what :func:`save_quantized` wrote, or a checkpoint of a quantized model, into a float model, in place.

    Args:
        model: the same LightningModule, with float weights of any values.
        path: the folder of :func:`save_quantized`, or a ``.ckpt`` file.

    Raises:
        FileNotFoundError: if there is no such file, or the folder lacks one of its two files.
        ValueError: if a file is damaged or lacks tensors, or belongs to another model.

    Whatever is raised, the model is left as it was.
    """
    path = Path(path)
    if path.is_file():
        stored = torch.load(path, map_location="cpu", weights_only=True)
        state = stored.get("state_dict", stored)
        if not read_plans(state):
            raise ValueError(f"{path.name} holds a float model: load it with load_state_dict or load_from_checkpoint")
    else:
        state = _read_folder(path)
    record = attach_record(model)
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in model.state_dict().items()}
    try:
        with rebuilt_or_as_it_was(model, record):
            model.load_state_dict(state)
    except Exception:
        model.load_state_dict(before)  # torch complains of missing keys after it has loaded all others
        raise
    finally:
        detach_record(model)


def _packable(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and (layer.weight_quantizers() or layer.masks())
    ]


def _pack_layer(model: nn.Module, name: str, layer: QuantizedLayer, state: dict[str, Tensor]) -> dict[str, Any]:
    """Replace a layer's float weights in ``state`` by packed codes, or by those that are kept where it is only pruned.

    A weight that a float layer reads too stays.
    """
    described, quantizers, masks = {}, layer.weight_quantizers(), layer.masks()
    for weight_name in {**quantizers, **masks}:
        weight, quantizer, mask = getattr(layer, weight_name), quantizers.get(weight_name), masks.get(weight_name)
        if sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
            continue
        key = f"{name}.{weight_name}"
        rows = layer.weight_rows(weight_name).detach()  # (out, ...)
        described[key] = {
            "scheme": None if quantizer is None else str(quantizer.scheme),
            "parts": quantizer.parts if isinstance(quantizer, SplitQuantizer) else None,
            "pruned": mask is not None,
            "shape": list(rows.shape),
            "transposed": layer.transposed,
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
        if mask is not None:
            state[f"{key}_pruning.keep"] = pack(mask.keep.int(), 1)
            for solved in ("offset", "before"):  # what is stored knows it
                state.pop(f"{key}_pruning.{solved}", None)
        if f"{key}.codes" in state:  # its float weight was dropped
            continue
        if key not in state:
            raise ValueError(
                f"`{key}` is recomputed in every forward, by a pruning mask or a weight norm: "
                f"make it permanent before saving its codes, as torch.nn.utils.prune.remove does"
            )
        stored = state.pop(key)
        if quantizer is None:
            assert mask is not None
            stored = stored.t() if layer.transposed else stored  # by name: its float weight may have been dropped
            offset = 0 if mask.offset is None else mask.offset
            state[f"{key}.kept"] = (stored + offset).to(stored.dtype)[mask.keep]
            continue
        try:
            codes = quantizer.encode(rows)
        except ValueError as error:
            raise ValueError(f"`{key}`: {error}") from error
        state.pop(f"{key}_quantizer.codes", None)  # the packed ones are the same
        state[f"{key}.codes"] = pack(codes, quantizer.scheme.bits)
    return described


def _split_tied(state: dict[str, Tensor]) -> dict[str, str]:
    """Keep one of several names of the same tensor, and part tensors that overlap, as safetensors demands.

    Returns {dropped: kept}.
    """
    kept: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for key, value in list(state.items()):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"`{key}` is a {type(value).__name__}, and save_quantized stores tensors only: "
                f"use trainer.save_checkpoint"
            )
        place = (value.data_ptr(), value.shape, value.stride())
        if place in kept and value.numel():
            tied[key] = kept[place]
            del state[key]
            continue
        kept[place] = key
        if value.untyped_storage().nbytes() > value.nbytes:
            state[key] = value.clone()
    return tied


def _read_folder(folder: Path) -> dict[str, Any]:
    """The state dict out of a folder, weights decoded from their codes."""
    description, state = _read_both(folder)
    state |= {key: state[kept] for key, kept in description["tied"].items() if kept in state}
    for key, how in description["packed"].items():
        rows = _unpacked(folder, key, how, state).to(getattr(torch, how["dtype"]))
        factor = state.get(f"{key.rpartition('.')[0]}.input_dilation.factor")
        if factor is not None:  # the codes are of the dilated weight
            rows = rows / factor.to(rows).view(-1, *[1] * (rows.dim() - 2))
        state[key] = rows.t() if how["transposed"] else rows
    name, value = entry_for({key: Plan.from_dict(plan) for key, plan in description["plans"].items()})
    state[name] = value
    return state


def _unpacked(folder: Path, key: str, how: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """The weight out of what is stored of it, output channels first: (out, ...)."""
    shape, prefix, mask = tuple(how["shape"]), f"{key}_quantizer.", f"{key}_pruning.keep"
    quantizer = None if how["scheme"] is None else build_quantizer(how["scheme"], 0, how.get("parts"))
    stored = [f"{key}.kept"] if quantizer is None else [f"{key}.codes", *(prefix + n for n in quantizer.state_names)]
    for needed in [*stored, *([mask] if how.get("pruned") else [])]:
        if needed not in state:
            raise ValueError(f"`{TENSORS}` in {folder} lacks `{needed}`, which `{DESCRIPTION}` tells of")
    if how.get("pruned"):
        state[mask] = unpack(state[mask], 1, shape).bool()
    if quantizer is None:
        kept = state.pop(f"{key}.kept")
        return torch.zeros(shape, dtype=kept.dtype).masked_scatter_(state[mask], kept)
    quantizer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return quantizer.decode(unpack(state.pop(f"{key}.codes"), quantizer.scheme.bits, shape))


def _write_both(folder: Path, description: str, tensors: dict[str, Tensor]) -> None:
    """Write both files beside their places and rename them, so that a killed process leaves no half file.

    It could still leave one new file beside an old one; the digest tells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f"{name}.partial" for name in (DESCRIPTION, TENSORS)}
    try:
        beside[DESCRIPTION].write_text(description)
        save_file(tensors, beside[TENSORS], {"description": sha256(description.encode()).hexdigest()})
        for name, path in beside.items():
            path.replace(folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def _read_both(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors, which must belong together."""
    for name in (DESCRIPTION, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks `{name}`: it is no folder that save_quantized wrote to the end")
    text, description = (folder / DESCRIPTION).read_bytes(), {}
    try:
        description = json.loads(text)
        with safe_open(folder / TENSORS, "pt") as file:
            digest = (file.metadata() or {}).get("description")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (ValueError, SafetensorError) as error:
        name = TENSORS if description else DESCRIPTION
        raise ValueError(f"`{name}` in {folder} is damaged ({error}): save the model again") from error
    if digest != sha256(text).hexdigest():
        raise ValueError(
            f"`{DESCRIPTION}` and `{TENSORS}` in {folder} belong to different models: save the model again"
        )
    return description, tensors
