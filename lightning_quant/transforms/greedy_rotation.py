"""Find a rotation for the outliers that an activation really has (DuQuant, NeurIPS 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.layers import BlockRotation, multiply_blocks

__all__ = ["fit_block_rotation", "greedy_blocks", "spreading", "zigzag"]


def spreading(size: int, generator: torch.Generator | None = None) -> Tensor:
    r"""An orthogonal matrix (size, size) whose first row is :math:`1 / \sqrt n` everywhere; the others are random.

    Its first channel is spread evenly over all of them: :math:`\text{diag}(1, U) \, H`, with a random orthogonal
    :math:`U`, and the reflection :math:`H` of the first axis onto the diagonal.

    >>> spreading(4)[0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    mixed = torch.eye(size, dtype=torch.float64)
    if size == 1:
        return mixed
    q, r = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator))
    mixed[1:, 1:] = q * r.diagonal().sign()
    normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    normal[0] += 1
    return mixed - 2 * (mixed @ normal)[:, None] * normal / normal.square().sum()


def greedy_blocks(x: Tensor, block: int, steps: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """A rotation for each block of channels that makes the spread of its numbers small.

    Each step looks for the channel that holds the largest magnitude and spreads it over the block; of all steps the one
    after which the distance between the largest and the smallest number was least is where it ends.

    Args:
        x: what is to be rotated (n, C).
        block: channels in a block, which divides C.
        steps: how many channels are spread at most.
        generator: of what is random.

    Returns:
        (blocks, block, block) in float32; the identity where no step was better.

    >>> x = torch.randn(50, 4)
    >>> x[:, 1] *= 100
    >>> rotated = x @ greedy_blocks(x, block=4)[0]
    >>> bool(rotated.abs().max() < 0.7 * x.abs().max())
    True
    """
    base = spreading(block, generator).float().to(x.device)
    rows = x.float().unflatten(-1, (-1, block)).transpose(0, 1)  # (blocks, n, b)
    product = torch.eye(block, device=x.device).repeat(len(rows), 1, 1)
    best, least = product, rows.amax((1, 2)) - rows.amin((1, 2))
    every = torch.arange(len(rows), device=x.device)
    for _ in range(steps):
        loudest = rows.abs().amax(1).argmax(1)  # (blocks,)
        turn = base.repeat(len(rows), 1, 1)
        turn[every, 0], turn[every, loudest] = base[loudest], base[0]  # the swap in front of it
        rows, product = rows @ turn, product @ turn
        spread = rows.amax((1, 2)) - rows.amin((1, 2))
        best = torch.where((spread < least)[:, None, None], product, best)
        least = torch.minimum(spread, least)
    return best


def zigzag(reach: Tensor, group: int = 9) -> Tensor:
    """The order of channels that parts the loud ones: sorted, cut into groups, and dealt out one from each in turn.

    Args:
        reach: how far each channel reaches (C,).
        group: channels in a group.

    >>> zigzag(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), group=2).tolist()
    [0, 4, 1, 2, 3]
    """
    ranked = reach.argsort(descending=True, stable=True)
    places = torch.arange(len(ranked), device=reach.device)
    return ranked[torch.argsort(places % group, stable=True)]


def fit_block_rotation(rotation: BlockRotation, x: Tensor, steps: int = 256, seed: int = 0) -> None:
    """Find a rotation for a layer's inputs: greedy in blocks, channels dealt out anew, greedy in blocks again.

    Args:
        rotation: is set.
        x: the inputs (n, C).
        steps: see :func:`greedy_blocks`.
        seed: of what is random.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        rotation.first.copy_(greedy_blocks(x, rotation.block, steps, generator))
        rotated = multiply_blocks(x.float(), rotation.first)
        rotation.order.copy_(zigzag(rotated.amax(0) - rotated.amin(0)))
        rotation.second.copy_(greedy_blocks(rotated[:, rotation.order], rotation.block, steps, generator))
