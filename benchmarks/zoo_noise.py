"""Where the noise in a quantized model's output comes from, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_modules import first_tensor
from benchmarks.zoo_weights import call
from lightning_quant.checkpoint import record_of
from lightning_quant.quantizers import Quantizer


@dataclass(frozen=True)
class Source:
    """One quantizer as a source of noise.

    Args:
        name: of the quantizer.
        share: of all noise power in the output, each quantizer taken alone.
        alone: SQNR of the output where this is the only quantizer, in decibels.
        own: SQNR of the tensor that it rounds.
        peak: largest magnitude of that tensor in standard deviations.
        reach: the width of the range that calibration found, divided by that of this tensor.
    """

    name: str
    share: float
    alone: float
    own: float
    peak: float
    reach: float


@torch.no_grad()
def sources_of_noise(module: nn.Module, batch: Any, exact: Tensor) -> list[Source]:
    """Every quantizer of the model, the noisiest first, by running the model with one of them at a time."""
    plans = record_of(module).plans.values()
    quantizers = {name: q for plan in plans for name, q in plan.quantizers(module).items()}
    found = []
    for name, quantizer in quantizers.items():
        for other in quantizers.values():
            other.observer = None if other is quantizer else _pass_on
        seen: list[tuple[Tensor, Tensor]] = []
        handle = quantizer.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        alone = sqnr(exact, first_tensor(call(module, batch)))
        handle.remove()
        x, rounded = seen[0]
        reach = span_of(quantizer) / float(x.max() - x.min())
        found.append((name, alone, sqnr(x, rounded), float(x.abs().max() / x.std()), reach))
    for quantizer in quantizers.values():
        quantizer.observer = None
    total = sum(10 ** (-alone / 10) for _, alone, *_ in found)
    found.sort(key=lambda source: source[1])
    return [Source(name, 10 ** (-alone / 10) / total, alone, *rest) for name, alone, *rest in found]


def sqnr(exact: Tensor, rounded: Tensor) -> float:
    """Signal to quantization noise in decibels: 10 log10(sum x^2 / sum (x - y)^2)."""
    exact, rounded = exact.double(), rounded.double()
    return float(10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum()))


def span_of(quantizer: Quantizer) -> float:
    """The width of the widest range that an 8-bit quantizer covers."""
    return 255 * float(quantizer.scale.max())


def _pass_on(x: Tensor) -> Tensor:
    return x
