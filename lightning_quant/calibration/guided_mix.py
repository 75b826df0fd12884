"""How many conditional samples calibration should have beside unconditional ones (DGC of PTQ4ARVG)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["conditional_share", "mahalanobis", "most_informative"]


def mahalanobis(features: Tensor) -> Tensor:
    """How far each row (n, d) is from the mean of all, measured by their own covariance (n,).

    With as many dimensions as rows all of them would be equally far, so only the n / 4 main ones count.

    >>> rows = torch.tensor([[0.0], [1.0], [-1.0], [0.0], [0.0], [8.0], [0.0], [0.0]])
    >>> int(mahalanobis(rows).argmax())
    5
    """
    centred = features.double() - features.double().mean(0)
    kept = max(1, min(features.shape[1], len(features) // 4))
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = min(kept, int((s > 1e-9 * s[:1].clamp(min=1e-300)).sum()))
    # with C = V S^2 V^T / (n - 1) the squared distance is (n - 1) |u|^2
    distances: Tensor = u[:, :kept].square().sum(1).mul(len(features) - 1).sqrt()
    return distances


def conditional_share(conditional: Tensor, unconditional: Tensor) -> float:
    """The share of conditional samples among the n that are farthest from the mean of their group.

    Args:
        conditional: features (n, d).
        unconditional: of as many samples without their condition.

    Returns:
        one half where both groups are spread alike.
    """
    distances = mahalanobis(conditional), mahalanobis(unconditional)
    if torch.allclose(distances[0].sort().values, distances[1].sort().values, rtol=0, atol=1e-3):
        return 0.5
    return float((most_informative(*distances) < len(conditional)).double().mean())


def most_informative(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """The places of the n largest of two lists of n distances; those in the second list begin with n."""
    return torch.cat([conditional, unconditional]).argsort(descending=True, stable=True)[: len(conditional)]
