"""Move a weight against the direction in which paired inputs differ (Fair-GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["against_differences"]


def against_differences(weight: Tensor, hessian: Tensor, pairs: Tensor, damp: float = 0.0) -> Tensor:
    r"""The weight that stays near the original on all inputs and gives paired ones near outputs.

    .. math::
        W - W H_{01} (H + H_{01} + \lambda I)^{-1} = \arg\min_{\hat W} \; \| (W - \hat W) X \|^2
        + \| \hat W (X_0 - X_1) \|^2 + \lambda \| W - \hat W \|^2

    Args:
        weight: (out, in).
        hessian: :math:`H` of all inputs, (in, in).
        pairs: :math:`H_{01}` of the differences, with the factor that they count by.
        damp: :math:`\lambda` in parts of the mean diagonal of H.

    Example:
        >>> weight, x = torch.randn(3, 4).double(), torch.randn(50, 4).double()
        >>> difference = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double()
        >>> found = against_differences(weight, x.T @ x, 1e9 * difference.T @ difference)
        >>> bool((found @ difference.T).abs().max() < 1e-5)
        True
    """
    weight, hessian, pairs = weight.double(), hessian.double(), pairs.double()
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    matrix = hessian + pairs + damp * hessian.diagonal().mean() * identity
    shift: Tensor
    shift, failed = torch.linalg.solve_ex(matrix, pairs @ weight.t())  # the matrices are symmetric
    if int(failed) or not bool(shift.isfinite().all()):
        raise ValueError("the Hessian is singular: raise damp")
    return weight - shift.t()
