"""Weights for the models of the zoo: trained ones where they are at hand, else random ones that keep a net alive."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(os.environ.get("LIGHTNING_QUANT_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))


def load(net: nn.Module, file: Path) -> None:
    """Load trained weights; what the file lacks must be tied to something that it has."""
    weights = {name: weight.float() for name, weight in load_file(file).items()}
    loaded = {id(parameter) for name, parameter in net.named_parameters(remove_duplicate=False) if name in weights}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    missing = [name for name in missing if id(net.get_parameter(name)) not in loaded]
    assert not missing and not unexpected, f"{file} does not fit {type(net).__name__}: {missing}, {unexpected}"


@torch.no_grad()
def awaken(module: nn.Module) -> None:
    """Let every layer of a random net matter.

    Initialisers make layers that hardly do anything, for training to start gently: layer scales near 0, weights far
    too small for a net this narrow, norms that scale nothing, biases of 0. Noise in such layers would not be seen.
    """
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    for child in module.modules():
        if isinstance(child, layers) or type(child).__name__ == "Conv1D":
            fan_in = child.weight[0].numel() if isinstance(child, layers) else len(child.weight)
            if child.weight.std() * fan_in**0.5 < 0.24:
                nn.init.normal_(child.weight, std=fan_in**-0.5)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and (parameter == parameter[0]).all():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)


@torch.no_grad()
def settle_batch_norms(module: nn.Module, batch: Any) -> None:
    """Give batch norms statistics that keep activations at unit size; with those they are born with, they die out.

    They neither centre nor treat channels differently. A random net whose batch norms do is chaotic: the float
    EfficientNet-B0 would turn 40 dB of noise behind its first layer into 13 dB at its output, against 33 dB so.
    """

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]  # (B, C, ...)
        norm.running_mean.zero_()
        norm.running_var.fill_(x.square().mean())

    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    if norms:
        call(module.eval(), batch)
    for handle in handles:
        handle.remove()


def call(module: nn.Module, batch: Any) -> Any:
    """The module's output: a dict goes in as keywords, of a list the first element."""
    return module(**batch) if isinstance(batch, dict) else module(batch[0])
