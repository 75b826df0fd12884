"""How many conditional samples calibration should have beside unconditional ones (DGC of PTQ4ARVG)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chosen_samples", "conditional_share", "mahalanobis"]

CONSTANT = 1e-6  # of the size of features: a group whose spread is below it does not vary


def mahalanobis(features: Tensor) -> Tensor | None:
    """How far each row (n, d) is from the mean of all, measured by their own covariance (n,).

    With as many dimensions as rows all of them would be equally far, so only the n / 4 main ones count.

    Returns:
        ``None`` if the rows are all alike.

    >>> rows = torch.tensor([[0.0], [1.0], [-1.0], [0.0], [0.0], [8.0], [0.0], [0.0]])
    >>> int(mahalanobis(rows).argmax())
    5
    """
    features = features.double()
    centred = features - features.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    main = max(1, min(features.shape[1], len(features) // 4))
    kept = min(main, int((s > CONSTANT * features.norm().clamp(min=1e-300)).sum()))
    # with C = V S^2 V^T / (n - 1) the squared distance is (n - 1) |u|^2
    return u[:, :kept].square().sum(1).mul(len(features) - 1).sqrt() if kept else None


def conditional_share(conditional: Tensor, unconditional: Tensor) -> float:
    """The share of conditional samples among the n that are farthest from the mean of their group.

    Args:
        conditional: features (n, d).
        unconditional: of as many samples without their condition.

    Returns:
        one half where both groups are spread alike, or one does not vary at all.
    """
    farthest = _farthest(conditional, unconditional)
    return 0.5 if farthest is None else float((farthest < len(conditional)).double().mean())


def chosen_samples(conditional: Tensor, unconditional: Tensor, pick: bool) -> list[int]:
    """Which n of n conditional and n unconditional samples calibrate; the places of the latter begin with n.

    Args:
        conditional: features (n, d).
        unconditional: of as many samples without their condition.
        pick: whether the farthest themselves are taken, or the first of each group in their proportion.

    >>> chosen_samples(torch.ones(4, 2), torch.ones(4, 2), pick=False)
    [0, 1, 4, 5]
    """
    count = len(conditional)
    farthest = _farthest(conditional, unconditional) if pick else None
    if farthest is not None:
        return list(farthest.tolist())
    first = round(conditional_share(conditional, unconditional) * count)
    return [*range(first), *range(count, 2 * count - first)]


def _farthest(conditional: Tensor, unconditional: Tensor) -> Tensor | None:
    """The places of the n farthest of both groups; ``None`` if they tell no difference."""
    ours, others = mahalanobis(conditional), mahalanobis(unconditional)
    if ours is None or others is None:
        return None
    if torch.allclose(ours.sort().values, others.sort().values, rtol=0, atol=1e-3):
        return None
    return torch.cat([ours, others]).argsort(descending=True, stable=True)[: len(ours)]
