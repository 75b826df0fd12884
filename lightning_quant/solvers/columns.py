"""Fix the weights of a layer column by column, each error made good by the columns that are still free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.solvers.fixes import Fix

__all__ = ["ColumnSolver", "Solved", "inverse_factor", "output_error", "relative_error"]

PreEdit = Callable[[Tensor, Tensor], Tensor]

RETRY = 0.0025  # of the mean diagonal, added where a matrix has no Cholesky factor


@dataclass(frozen=True)
class Solved:
    """What a solver made of a weight.

    Args:
        values: the fixed weight, (out, in), in float64.
        loss: half the squared output error that the columns were charged with, damping included.
        damp: the damping that was needed, in parts of the mean diagonal.
    """

    values: Tensor
    loss: float
    damp: float


@dataclass(frozen=True)
class ColumnSolver:
    r"""GPTQ's loop, also that of SparseGPT and others: what differs is the *fix*, the value that a column gets.

    With :math:`H^{-1} = U^\top U`, column :math:`i` becomes :math:`q_i = \text{fix}(w_i)`, and its error is spread over
    the columns behind it,

    .. math:: w_j \leftarrow w_j - \frac{w_i - q_i}{U_{ii}} \, U_{ij} \qquad (j > i)

    which is the best that they can do about it. All rows go at once. Updates of columns beyond the current block wait
    for its end, which changes nothing but the speed.

    Args:
        damp: added to the diagonal of H, in parts of its mean; more is added where there is no Cholesky factor.
        act_order: take the columns of the largest diagonal first.
        block_size: columns in a block; rounded up to hold whole groups of the fix.

    Example:
        >>> from lightning_quant.quantizers import build_quantizer
        >>> from lightning_quant.solvers import Rounding
        >>> x, weight = torch.randn(64, 8) @ torch.randn(8, 8), torch.randn(4, 8)
        >>> rounding = Rounding(build_quantizer("int4_asym_channel", axis=0))
        >>> solved = ColumnSolver().solve(weight, x.T @ x, rounding)
        >>> nearest = rounding.nearest(weight)
        >>> hessian = (x.T @ x).double()
        >>> bool(output_error(weight, solved.values, hessian).sum() < output_error(weight, nearest, hessian).sum())
        True
    """

    damp: float = 0.01
    act_order: bool = False
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.damp < 0:
            raise ValueError(f"damp={self.damp} must be 0 or more")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")

    def solve(self, weight: Tensor, hessian: Tensor, fix: Fix, pre_edit: PreEdit | None = None) -> Solved:
        """Fix a weight; it is left alone itself.

        A *dead* input, whose diagonal entry is 0, cannot be judged: its weights are set to 0 first.

        Args:
            weight: (out, in).
            hessian: (in, in), on any scale.
            fix: what a column becomes; it remembers what belongs to the result, like scales or a mask.
            pre_edit: a better float weight to start from, given (weight, hessian).

        Raises:
            ValueError: if the matrix has no Cholesky factor however much it is damped.
        """
        hessian = hessian.double()
        weight = weight.detach().double()
        if pre_edit is not None:
            weight = pre_edit(weight, hessian).double()
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        weight = torch.where(dead, 0.0, weight)
        if bool(dead.any()):
            hessian = hessian + torch.diag(dead.to(hessian))
        order = torch.arange(len(diagonal), device=weight.device)
        if self.act_order:
            order = diagonal.argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
        fix.start(weight, order)
        factor, damp = inverse_factor(hessian, self.damp)
        values, loss = self._columns(weight[:, order], factor, fix)
        solved = torch.empty_like(values)
        solved[:, order] = values
        return Solved(solved, loss, damp)

    def _columns(self, work: Tensor, factor: Tensor, fix: Fix) -> tuple[Tensor, float]:
        """The loop over columns that are in their order; ``work`` is used up."""
        # Transposed, a column is contiguous.
        work, values = work.t().contiguous(), torch.empty_like(work.t())  # (in, out)
        size = -(-self.block_size // fix.span) * fix.span
        spread, charged = factor.diagonal(), torch.zeros((), dtype=work.dtype, device=work.device)
        for first in range(0, len(work), size):
            block, last = work[first : first + size], min(first + size, len(work))
            errors = torch.empty_like(block)
            for i in range(len(block)):
                position = first + i
                fix.look_ahead(block[i:].t(), position, spread[position:last])
                values[position] = fix(block[i], position)
                torch.sub(block[i], values[position], out=errors[i]).div_(spread[position])
                # the column itself becomes its value exactly, so only those behind it are touched
                block[i + 1 :].addr_(factor[position, position + 1 : last], errors[i], alpha=-1)
            work[last:] -= factor[first:last, last:].t() @ errors
            charged += errors.square().sum() / 2
        return values.t(), float(charged)


def inverse_factor(matrix: Tensor, damp: float = 0.0) -> tuple[Tensor, float]:
    r"""The upper triangular U with :math:`(H + \lambda I)^{-1} = U^\top U`, and the damping it took.

    For the columns that are left after the first i, :math:`[H_{i:}^{-1}]_{00} = U_{ii}^2`, and the first row of that
    inverse is :math:`U_{ii} U_{i, i:}`.

    Args:
        matrix: (n, n), symmetric; left alone.
        damp: in parts of the mean diagonal. Where there is no factor, it is raised until there is one.

    Raises:
        ValueError: if there is none even at the size of the mean diagonal.

    Example:
        >>> x = torch.randn(30, 5, dtype=torch.float64)
        >>> factor, _ = inverse_factor(x.T @ x)
        >>> torch.allclose(factor.T @ factor, torch.linalg.inv(x.T @ x))
        True
    """
    mean = matrix.diagonal().mean()
    tried = damp
    while tried <= damp + 1:
        # H = R R^T with an upper R: a Cholesky factor seen in a mirror. Its inverse is U.
        # All in place and in LAPACK's own layout: such matrices are the most memory that solving takes.
        lower = matrix.flip(0, 1).t()
        lower.diagonal().add_(tried * mean)
        failed = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed):
            inverse = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device).t()
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            if bool(inverse.isfinite().all()):
                return inverse.flip(0, 1), tried
        tried += max(damp, RETRY)
    raise ValueError(f"the Hessian has no Cholesky factor, even damped by {tried:.3g} of its mean diagonal")


def output_error(weight: Tensor, fixed: Tensor, hessian: Tensor) -> Tensor:
    r"""The squared output error of every row, :math:`\delta H \delta^\top`: (out,).

    Args:
        weight: (out, in).
        fixed: what has become of it.
        hessian: (in, in), or (groups, in, in) for the groups of channels of a convolution.
    """
    hessian = hessian.double()
    difference = (fixed - weight).double().reshape(*hessian.shape[:-2], -1, weight.shape[1])
    return ((difference @ hessian) * difference).sum(-1).flatten()


def relative_error(weight: Tensor, fixed: Tensor, hessian: Tensor) -> float:
    """The squared output error of all rows together, in parts of the squared output; 0 where there is no output.

    >>> relative_error(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2))
    0.25
    """
    error, size = (float(output_error(weight, x, hessian).sum()) for x in (fixed, torch.zeros_like(fixed)))
    return error / size if size else 0.0
