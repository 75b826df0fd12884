"""The product of two thin matrices that is nearest to an error (LoRC)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["low_rank"]


def low_rank(error: Tensor, rank: int, hessian: Tensor | None = None, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    r"""Returns A (out, rank) and B (rank, in) that make the error :math:`E - A B` least.

    Without a Hessian that is the truncated singular value decomposition :math:`U_m \Sigma_m^{1/2}, \Sigma_m^{1/2}
    V_m^\top`. With one it is that of :math:`E L`, where :math:`H = L L^\top`, times :math:`L^{-1}` from the right,
    which minimises the error of the output, :math:`\text{tr}((E - A B) H (E - A B)^\top)`.

    Args:
        error: (out, in).
        rank: at most the smaller of out and in.
        hessian: (in, in).
        damp: added to its diagonal, in parts of its mean.

    Example:
        >>> error = torch.randn(5, 2) @ torch.randn(2, 7)
        >>> up, down = low_rank(error, rank=2)
        >>> torch.allclose(up.float() @ down.float(), error, atol=1e-5)
        True
    """
    error = error.double()
    rank = min(rank, *error.shape)
    if hessian is None:
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        return u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]
    diagonal = hessian.double().diagonal()
    identity = torch.eye(len(diagonal), dtype=torch.float64, device=error.device)
    factor = torch.linalg.cholesky(hessian.double() + (damp * diagonal.mean()).clamp(min=1e-30) * identity)
    u, s, v = torch.linalg.svd(error @ factor, full_matrices=False)
    down = torch.linalg.solve_triangular(factor, s[:rank].sqrt()[:, None] * v[:rank], upper=False, left=False)
    return u[:, :rank] * s[:rank].sqrt(), down
