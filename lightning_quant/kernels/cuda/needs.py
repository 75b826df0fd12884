"""What a GPU and its libraries must have for a product."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from lightning_quant.kernels.spec import LayerSpec

Capability = tuple[int, int]


def why_no_triton() -> str | None:
    """Why there is no Triton, or ``None`` if there is."""
    return None if find_spec("triton") else "triton is not installed: pip install lightning-quant[triton]"


def why_not_capable(spec: LayerSpec, least: Capability, what: str) -> str | None:
    """Why a layer's GPU is too old for a kind of product, or ``None`` if it is not.

    >>> import torch
    >>> spec = LayerSpec("Linear", "cuda", torch.float16, (64, 64), None, None, capability=(7, 5))
    >>> why_not_capable(spec, (8, 0), "products of int8 in Triton")
    'its GPU has compute capability 7.5, and products of int8 in Triton need 8.0'
    """
    if torch.version.hip:
        return "its GPU is not one of NVIDIA"
    if spec.capability >= least:
        return None
    found, needed = (".".join(map(str, capability)) for capability in (spec.capability, least))
    return f"its GPU has compute capability {found}, and {what} need {needed}"


def why_not_on(devices: set[str]) -> str | None:
    """Why a model on these types of devices cannot run on the kernels for GPUs, or ``None`` if it can.

    >>> why_not_on({"cpu"})
    'the model is on cpu, not on a CUDA device: set accelerator="gpu" of the Trainer, or backend="auto"'
    """
    if devices == {"cuda"}:
        return why_no_triton()
    cure = 'set accelerator="gpu" of the Trainer, or backend="auto"'
    return f"the model is on {' and '.join(sorted(devices))}, not on a CUDA device: {cure}"


def gpu_in_words() -> str:
    """The GPU's name and compute capability, in one line."""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}: compute capability {major}.{minor}"
