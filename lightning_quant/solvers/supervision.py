"""Errors beside that of a unit's own output: of the layers inside it, and of the whole model's output above it."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Balance", "moment_distance", "output_distance"]

# Two runs of one float model already differ by that much in a divergence of their outputs.
NOISE = 1e-6


def output_distance(found: Tensor, exact: Tensor, metric: str = "kl") -> Tensor:
    r"""How far the output of a model is from that of its float twin.

    .. math:: KL = \sum_c p_c (\log p_c - \log \hat p_c), \quad p = \text{softmax}(y)

    over the last axis, averaged over all else; or the mean squared error.

    Args:
        found: logits (..., classes), or any output.
        exact: those of the float model.
        metric: ``"kl"`` or ``"mse"``.

    >>> import torch
    >>> y = torch.tensor([[0.0, 1.0]])
    >>> output_distance(y, y + 3.0), output_distance(y, y + 3.0, "mse")
    (tensor(0.), tensor(9.))
    """
    found, exact = found.float(), exact.float()
    if metric == "mse":
        return (found - exact).square().mean()
    log_p = exact.log_softmax(-1)
    return (log_p.exp() * (log_p - found.log_softmax(-1))).sum(-1).mean()


def moment_distance(found: Tensor, exact: Tensor, channels: int = -1) -> Tensor:
    r"""How far mean and standard deviation of each channel are from those of the float layer, which set the measure.

    .. math:: \frac 1 C \sum_c \frac{(\mu_c - \hat\mu_c)^2 + (\sigma_c - \hat\sigma_c)^2}{\overline{\sigma^2}}

    Args:
        found: outputs of a layer.
        exact: those of the float layer.
        channels: the axis of the channels.

    >>> import torch
    >>> y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> moment_distance(y + 1, y)  # the means are off by one standard deviation, the deviations are right
    tensor(1.0000)
    """
    found, exact = (x.float().movedim(channels, -1).flatten(0, -2) for x in (found, exact))
    variance, mean = exact.var(0, correction=0), exact.mean(0)
    measure = (variance.mean() + NOISE * mean.square().mean()).clamp(min=NOISE**2)  # a layer may say nothing but 0
    floor = NOISE * measure  # the root of a constant channel's variance would have no gradient
    deviation = (found.var(0, correction=0) + floor).sqrt() - (variance + floor).sqrt()
    return ((found.mean(0) - mean).square() + deviation.square()).mean() / measure


class Balance:
    """Measures errors of several kinds in units of one of them: where all begin, on average, they count alike.

    >>> import torch
    >>> balance = Balance()
    >>> for error in (1.0, 7.0):
    ...     balance.note("far", torch.tensor(error), unit=torch.tensor(0.5))
    >>> balance("far", torch.tensor(4.0)), balance("far", torch.tensor(2.0))
    (tensor(0.5000), tensor(0.2500))
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def note(self, name: str, error: Tensor, unit: Tensor) -> None:
        """What an error is at the beginning on some samples, and the one that it is measured by."""
        errors, units = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = errors + error.detach(), units + unit.detach()

    def __call__(self, name: str, error: Tensor) -> Tensor:
        """An error as a multiple of what it was at the beginning, in units of what the other one was then."""
        errors, units = self._sums[name]
        return error * (units / errors.clamp(min=NOISE))
