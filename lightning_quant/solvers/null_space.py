"""Flatten the outliers of a weight by adding what its inputs hardly feel (OSAQ)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_quant.quantizers import in_groups, out_of_groups

__all__ = ["Absorption", "absorb_outliers", "null_space", "row_reach"]

TINY = torch.finfo(torch.float32).tiny
NEGLIGIBLE = 1e-3  # of the sum of all eigenvalues


class Absorption(NamedTuple):
    """What may be added to a weight.

    Args:
        edit: (out, in), every row a combination of the directions.
        directions: (K, in), the orthonormal directions in which the inputs hardly vary.
        coefficients: (out, K).
        null_space: the share of all directions whose eigenvalues hold a thousandth of the sum.
    """

    edit: Tensor
    directions: Tensor
    coefficients: Tensor
    null_space: float


def null_space(hessian: Tensor, gamma: float) -> Tensor:
    """The eigenvectors of the smallest eigenvalues, as many as hold no more than a share of the sum: (K, in).

    The direction that would pass the share is left out, so a Hessian without a null space has none.

    Example:
        >>> null_space(torch.diag(torch.tensor([1.0, 0.0, 1e-6], dtype=torch.float64)), 1e-3).abs()
        tensor([[0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)
    """
    curvature, vectors = _spectrum(hessian)
    return vectors[: _within(curvature, gamma)]


def absorb_outliers(
    weight: Tensor,
    hessian: Tensor,
    gamma: float = 0.1,
    tau: float = 0.2,
    mu1: float = 1.0,
    mu2: float = 1e-3,
    mu3: float = 100.0,
    damp: float = 0.01,
    group: int | None = None,
    tolerance: float = 1e-4,
    steps: int = 200,
) -> Absorption:
    r"""Find for each row the addition inside the null space that makes its largest weights small.

    .. math::
        \min_b \; \tfrac12 \sum_j s_j (w_j + b^\top n_j)^2
        + \frac{1}{2 N} \sum_k ( \mu_1 + \mu_3 \frac{\lambda_k}{\tilde\lambda} ) b_k^2
        + \tfrac{\mu_2}{2} ( \sum_j b^\top n_j )^2, \qquad s = \text{softmax}(|w| / (\tau \max |w|))

    where :math:`n_j` is the j-th column of the directions, :math:`\lambda_k` their damped eigenvalues and
    :math:`\tilde\lambda` the geometric mean of all of these. All rows are solved together by conjugate gradients.

    Args:
        weight: (out, in); its dtype is that of the equations, for which float32 does.
        hessian: (in, in), not damped.
        gamma: the share of the eigenvalues' sum that the directions may hold.
        tau: how sharply the largest weights are told from others, in parts of the largest one.
        mu1: keeps the addition small; in parts of 1 / in, which is the size of what it stands beside.
        mu2: keeps the row's sum where it is.
        mu3: keeps small what the output feels of the addition.
        damp: added to each eigenvalue, in parts of their mean: other inputs than those seen vary in all directions.
        group: columns that have scales of their own, and so outliers of their own; ``None``: the whole row.
        tolerance: the residual at which to stop, relative to the start.
        steps: at most so many.

    Example:
        >>> x, weight = torch.randn(200, 4).double() @ torch.randn(4, 8).double(), torch.randn(2, 8).double()
        >>> found = absorb_outliers(weight, x.T @ x, gamma=1e-3)
        >>> len(found.directions), bool((x @ found.edit.T).abs().max() < 1e-6)
        (4, True)
    """
    curvature, vectors = _spectrum(hessian)
    basis = vectors[: _within(curvature, gamma)].to(weight)
    felt = (curvature + damp * curvature.mean()).clamp(min=TINY)
    shrink = (mu1 + mu3 * (felt / felt.log().mean().exp())[: len(basis)].to(weight)) / weight.shape[1]
    size = (shrink + 1 / weight.shape[1]).rsqrt()  # coefficients of one size need few steps
    scaled, shrink = basis * size[:, None], shrink * size.square()
    importance, total = _importance(weight, tau, group), scaled.sum(1)

    def normal(b: Tensor) -> Tensor:
        return ((b @ scaled) * importance) @ scaled.t() + shrink * b + mu2 * (b @ total)[:, None] * total

    found = _conjugate_gradients(normal, -(importance * weight) @ scaled.t(), tolerance, steps)
    hidden = _within(curvature, NEGLIGIBLE) / len(curvature)
    return Absorption(found @ scaled, basis, found * size, hidden)


def _spectrum(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues without their sign, from the smallest on, and their eigenvectors, one a row."""
    values, vectors = torch.linalg.eigh(hessian.double())
    curvature, order = values.abs().sort()
    return curvature, vectors.t()[order]


def _within(curvature: Tensor, share: float) -> int:
    """How many of the smallest eigenvalues hold no more than a share of the sum."""
    return int((curvature.cumsum(0) <= share * curvature.sum()).sum())


def row_reach(weight: Tensor, group: int | None = None) -> Tensor:
    """The largest weight of each row, or the root mean square of those of its groups: (out,)."""
    groups = in_groups(weight.abs(), group or weight.shape[1])
    reach: Tensor = groups.amax(2).square().mean(1).sqrt()
    return reach


def _importance(weight: Tensor, tau: float, group: int | None) -> Tensor:
    """The weights that a row's scale hangs on, summing up to 1."""
    size = in_groups(weight.abs(), group or weight.shape[1], fill=-math.inf)
    width = tau * size.amax(2, keepdim=True).clamp(min=TINY)
    return out_of_groups((size / width).softmax(2) / size.shape[1], weight.shape[1])


def _conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, steps: int) -> Tensor:
    """Solve ``normal(b) = right`` for each row of ``right``; every row has its own steps."""
    found, residual = torch.zeros_like(right), right.clone()
    direction, size = residual.clone(), residual.square().sum(1, keepdim=True)
    enough = tolerance**2 * size
    for _ in range(steps if right.shape[1] else 0):
        if bool((size <= enough).all()):
            break
        image = normal(direction)
        step = torch.where(size > enough, size / (direction * image).sum(1, keepdim=True).clamp(min=TINY), 0.0)
        found += step * direction
        residual -= step * image
        new = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(size > 0, new / size.clamp(min=TINY), 0.0) * direction
        size = new
    return found
