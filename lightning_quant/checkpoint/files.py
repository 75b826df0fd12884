"""A quantized model on disk, without pickle: packed codes in safetensors, everything else in JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_quant.checkpoint.manifest import attach_record, detach_record, entry_for, read_plans, record_of
from lightning_quant.checkpoint.packing import pack, unpack
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.quantizers import Scheme, build_quantizer

TENSORS, DESCRIPTION = "model.safetensors", "quantization.json"


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a calibrated model as ``model.safetensors`` (weights as packed integer codes) and ``quantization.json``.

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
        for name, quantizer in plan.quantizers(model).items():
            if not quantizer.calibrated:
                raise ValueError(f"`{name}` is not calibrated: run trainer.validate with {plan.method} first")
    state = dict(model.state_dict())
    del state[entry_for(record.plans)[0]]
    packed = {key: value for layer in _packable(model) for key, value in _pack_layer(model, *layer, state).items()}
    tied = _split_tied(state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": 1,
        "plans": {k: plan.to_dict() for k, plan in record.plans.items()},
        "packed": packed,
        "tied": tied,
    }
    _write(folder / DESCRIPTION, lambda path: path.write_text(json.dumps(description, indent=1)))
    _write(folder / TENSORS, lambda path: save_file({k: v.contiguous() for k, v in state.items()}, path))


def load_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what :func:`save_quantized` wrote, or a checkpoint of a quantized model, into a float model, in place.

    Args:
        model: the same LightningModule, with float weights of any values.
        path: the folder of :func:`save_quantized`, or a ``.ckpt`` file.

    Raises:
        ValueError: if the model lacks a planned layer or the file lacks tensors; the model is then left as it was.
    """
    path = Path(path)
    if path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        if not read_plans(state):
            raise ValueError(f"{path.name} holds a float model: load it with load_state_dict or load_from_checkpoint")
    else:
        state = _read_folder(path)
    attach_record(model)
    try:
        model.load_state_dict(state)
    finally:
        detach_record(model)


def _packable(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and layer.weight_quantizers()
    ]


def _pack_layer(model: nn.Module, name: str, layer: QuantizedLayer, state: dict[str, Tensor]) -> dict[str, Any]:
    """Replace a layer's float weights in ``state`` by packed codes; a weight that a float layer reads too stays."""
    described = {}
    for weight_name, quantizer in layer.weight_quantizers().items():
        weight = getattr(layer, weight_name)
        if sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
            continue
        key = f"{name}.{weight_name}"
        if key not in state:
            raise ValueError(
                f"`{key}` is recomputed in every forward, by a pruning mask or a weight norm, so it has no codes to save: "
                f"make it permanent first, as torch.nn.utils.prune.remove does"
            )
        rows = layer.weight_rows(weight_name)  # (out, ...)
        codes = quantizer.encode(rows.detach())
        del state[key]
        state[f"{key}.codes"] = pack(codes, quantizer.scheme.bits)
        described[key] = {
            "scheme": str(quantizer.scheme),
            "shape": list(rows.shape),
            "transposed": rows.shape != weight.shape or rows.stride() != weight.stride(),
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
    return described


def _split_tied(state: dict[str, Tensor]) -> dict[str, str]:
    """Keep one of several names of the same memory, as safetensors demands; returns {dropped: kept}."""
    kept: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for key, value in list(state.items()):
        if value.numel() == 0:
            continue
        place = (value.data_ptr(), value.shape, value.stride())
        if place in kept:
            tied[key] = kept[place]
            del state[key]
        else:
            kept[place] = key
    return tied


def _read_folder(folder: Path) -> dict[str, Any]:
    """The state dict out of a folder, weights decoded from their codes."""
    description = json.loads((folder / DESCRIPTION).read_text())
    state = load_file(folder / TENSORS)
    state |= {key: state[kept] for key, kept in description["tied"].items()}
    for key, how in description["packed"].items():
        scheme, shape = Scheme.parse(how["scheme"]), tuple(how["shape"])
        quantizer = build_quantizer(scheme, axis=0)
        prefix = f"{key}_quantizer."
        quantizer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        rows = quantizer.decode(unpack(state.pop(f"{key}.codes"), scheme.bits, shape)).to(getattr(torch, how["dtype"]))
        state[key] = rows.t() if how["transposed"] else rows
    name, value = entry_for({key: Plan.from_dict(plan) for key, plan in description["plans"].items()})
    state[name] = value
    return state


def _write(path: Path, write: Any) -> None:
    """Write beside and rename, so that a killed process leaves no half file."""
    beside = path.with_suffix(f"{path.suffix}.partial")
    write(beside)
    beside.replace(path)
