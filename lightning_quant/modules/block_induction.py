"""Learn what a block can do without: the factors of its masks, so that its pruned output stays what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_quant.calibration import merge_across_ranks, sum_across_ranks
from lightning_quant.layers import QuantizedLayer
from lightning_quant.modules.block_sequence import Block
from lightning_quant.solvers import InducedMask

__all__ = ["induce"]


def induce(
    block: Block,
    layers: Mapping[str, QuantizedLayer],
    masks: Mapping[str, InducedMask],
    epochs: int,
    lr: float,
    lam: float = 0.0,
    alpha: float | None = None,
) -> list[float]:
    r"""Learn the factors of all masks of a block together, one step for each batch.

    .. math::
        \frac{\| Y - \hat Y \|^2}{\| Y \|^2} + \lambda \exp( - \alpha \sum_l \frac{\| W_l S_l \|_2}{\| W_l S_l \|_F}
        )

    Args:
        block: with the inputs of all batches; nothing in it is pruned yet.
        layers: of the block, each with a mask that is not decided.
        masks: what is learned, by the name of the layer.
        epochs: how often all batches are seen.
        lr: learning rate of the logarithms of the factors, and of shifts in units of the input.
        lam: weight of the second term.
        alpha: its scale; ``None`` makes the exponent 1 in the beginning.

    Returns:
        The mean first term of each epoch, of all ranks.
    """
    parameters = [parameter for mask in masks.values() for parameter in mask.parameters()]
    steps = max(merge_across_ranks(len(block)))
    with torch.no_grad():
        targets = [_floats(block(batch)) for batch in range(len(block))]
    curve, optimizer = [], torch.optim.Adam(parameters, lr)
    with torch.enable_grad(), _masked(layers, masks):
        if alpha is None:
            alpha = 1 / max(1e-9, sum(float(mask.concentration().detach()) for mask in masks.values()))
        for _ in range(epochs):
            total = torch.zeros(2, dtype=torch.float64)
            for step in range(steps):
                gradients: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
                if step < len(block):
                    error = _relative_error(_floats(block(step)), targets[step])
                    spread = torch.stack([mask.concentration() for mask in masks.values()]).sum()
                    found = torch.autograd.grad(error + lam * torch.exp(-alpha * spread), parameters)
                    gradients = [one.detach() for one in found]
                    total += torch.tensor([float(error.detach()), 1.0], dtype=torch.float64)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = sum_across_ranks(gradient)  # Adam does not mind the scale
                optimizer.step()
            loss, count = sum_across_ranks(total)
            curve.append(float(loss / count.clamp(min=1)))
    return curve


@contextmanager
def _masked(layers: Mapping[str, QuantizedLayer], masks: Mapping[str, InducedMask]) -> Iterator[None]:
    """Let layers compute with masks that have a gradient."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            last = layer.weight_quantizer or layer.masks()["weight"]  # what gives the layer its weight
            stack.callback(setattr, last, "observer", last.observer)
            learned = _Learned(masks[name])
            last.observer = learned.weight
            stack.callback(layer.register_forward_hook(learned.corrected).remove)
        yield


class _Learned:
    """The pruned weight in a forward, and what is added behind it."""

    def __init__(self, mask: InducedMask) -> None:
        self.mask = mask
        self.pruned = mask.weight

    def weight(self, rows: Tensor) -> Tensor:
        self.pruned = self.mask.weight * self.mask()
        return self.pruned.view_as(rows).to(rows.dtype)

    def corrected(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        correction = self.mask.correction(self.pruned)
        return output if correction is None else output + correction.to(output.dtype)


def _floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _relative_error(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    pairs = list(zip(outputs, targets, strict=True))
    error = torch.stack([(out.float() - target.float()).square().sum() for out, target in pairs]).sum()
    power = torch.stack([target.float().square().sum() for target in targets]).sum()
    return error / power.clamp(min=torch.finfo(torch.float32).tiny)
