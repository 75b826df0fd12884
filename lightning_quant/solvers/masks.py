"""Which weights to prune, from a score for each of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_quant.quantizers import Pattern

__all__ = ["Compared", "keep_best", "wanda_scores"]

Compared = Literal["layer", "row"]


def keep_best(scores: Tensor, pattern: Pattern, compared: Compared = "layer") -> Tensor:
    r"""Keep the weights with the highest scores: the exact number asked for, whatever ties there are.

    Of equal scores those further ahead in the row are pruned first. In patterns such as ``"2:4"`` the weights of one
    group are compared, and ``compared`` says nothing.

    Args:
        scores: (out, inputs).
        pattern: how many to prune; :math:`\lfloor p n \rfloor` of :math:`n` that are compared.
        compared: whether all weights of the layer compete, or only those of one output.

    Returns:
        What is kept, bool (out, inputs).

    >>> keep_best(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), Pattern.parse("2:4")).int()
    tensor([[1, 0, 1, 0]], dtype=torch.int32)
    >>> scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> (
    ...     keep_best(scores, Pattern.parse(0.5)).int().tolist(),
    ...     keep_best(scores, Pattern.parse(0.5), "row").int().tolist(),
    ... )
    ([[0, 0], [1, 1]], [[0, 1], [0, 1]])
    """
    if pattern.group is not None and pattern.kept is not None:
        groups, pruned = scores.unflatten(-1, (-1, pattern.group)), pattern.group - pattern.kept
    else:
        groups = scores if compared == "row" else scores.reshape(1, -1)
        pruned = math.floor(pattern.sparsity * groups.shape[-1] + 1e-9)  # 0.29 of 100 is 29, not 28.999...
    worst = groups.argsort(dim=-1, stable=True)[..., :pruned]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, worst, False)
    return keep.reshape(scores.shape)


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    r"""How much a weight matters to the output: :math:`|W_{ij}| \, \|X_j\|_2`.

    Args:
        weight: (out, inputs).
        squares: the mean square of every input, on any common scale (inputs,).

    >>> wanda_scores(torch.tensor([[3.0, 1.0]]), torch.tensor([1.0, 16.0]))
    tensor([[3., 4.]])
    """
    return weight.abs() * squares.to(weight).sqrt()
