"""How much fixed noise in front of a quantizer makes the linear layer behind it most exact (NoisyQuant)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_quant.quantizers import NoisyQuantizer

__all__ = ["OutputError", "clip_states", "denoising_bias", "mean_states", "noise_states"]

# Scale, zero point and noise of a NoisyQuantizer.
InputState = tuple[Tensor, Tensor, Tensor]


def clip_states(state: InputState, steps: int) -> list[InputState]:
    r"""The state, and others whose range is :math:`f` times as wide, :math:`f` from 0.25 to 1.5.

    >>> [scale.item() for scale, _, _ in clip_states((torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0)), 2)]
    [1.0, 0.25, 1.5]
    """
    scale, zero_point, noise = state
    return [(scale * factor, zero_point, noise) for factor in (1.0, *torch.linspace(0.25, 1.5, steps).tolist())]


def mean_states(state: InputState, steps: int) -> list[InputState]:
    """The state, and others with all noises shifted alike, by up to one step of the grid.

    >>> [noise.item() for _, _, noise in mean_states((torch.tensor(0.5), torch.tensor(0.0), torch.tensor(0.0)), 3)]
    [0.0, -0.5, 0.0, 0.5]
    """
    scale, zero_point, noise = state
    return [(scale, zero_point, noise + scale * shift) for shift in (0.0, *torch.linspace(-1, 1, steps).tolist())]


def noise_states(state: InputState, template: Tensor, steps: int) -> list[InputState]:
    r"""The state, and others with up to two steps of the grid times a template added to the noise.

    Args:
        state: to begin with.
        template: numbers from -1 to 1, ``(in,)``.
        steps: how many others.

    >>> state = torch.tensor(0.5), torch.tensor(0.0), torch.tensor([0.1])
    >>> [noise for _, _, noise in noise_states(state, torch.tensor([0.4]), 2)]
    [tensor([0.1000]), tensor([0.3000]), tensor([0.5000])]
    """
    scale, zero_point, noise = state
    return [
        state,
        *((scale, zero_point, noise + scale * template * (2 * step / steps)) for step in range(1, steps + 1)),
    ]


class OutputError:
    r"""Scores states of the input quantizer of a linear layer by the error of its output, while batches stream by.

    .. math:: \sum_t \| \hat W (Q(x_t + N) - N - x_t) \|^2

    Set as the quantizer's observer, it adds up the errors of every batch and hands on the floats. Of each sample it
    looks at some tokens only, the same ones whatever batch the sample is in, so that the sums of several ranks add up
    to that of one.

    Args:
        quantizer: Of the layer's input; left alone.
        weight: Of the layer as it is quantized, ``(out, in)``.
        states: The candidates.
        tokens: How many tokens of a sample count.

    Attributes:
        errors: The sums so far, ``(candidates,)``.

    Example:
        >>> quantizer = NoisyQuantizer("int4_asym")
        >>> quantizer.freeze(torch.tensor(0.0), torch.tensor(15.0))
        >>> scale, zero_point, noise = quantizer.state
        >>> error = OutputError(quantizer, torch.eye(1), [quantizer.state, (scale, zero_point, noise + 0.25)])
        >>> _ = error(torch.tensor([[0.75], [1.75]]))
        >>> error.errors
        tensor([0.1250, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self, quantizer: NoisyQuantizer, weight: Tensor, states: Sequence[InputState], tokens: int = 32
    ) -> None:
        self.quantizer, self.states, self.tokens = quantizer, states, tokens
        weight = weight.detach().float()
        # |W e| = |R e|, and R has no more rows than columns
        self.root = torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight
        self.errors = torch.zeros(len(states), dtype=torch.float64, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Add a batch; returns it as it is."""
        rows = some_tokens(x.detach(), self.tokens).float()
        for index, state in enumerate(self.states):
            error = self.quantizer.simulate(rows, *state) - rows  # (tokens, in)
            self.errors[index] += (error @ self.root.t()).square().sum(dtype=torch.float64)
        return x


def some_tokens(x: Tensor, tokens: int) -> Tensor:
    """Up to ``tokens`` evenly spaced tokens of each sample: (samples, ..., channels) to (rows, channels).

    >>> some_tokens(torch.arange(12.0).view(1, 6, 2), 3)
    tensor([[ 0.,  1.],
            [ 4.,  5.],
            [10., 11.]])
    """
    x = x.reshape(len(x), -1, x.shape[-1])  # (samples, tokens, channels)
    chosen = torch.linspace(0, x.shape[1] - 1, min(tokens, x.shape[1]), device=x.device).long()
    return x[:, chosen].flatten(0, 1)


def denoising_bias(weight: Tensor, bias: Tensor | None, noise: Tensor) -> Tensor:
    r"""The bias that takes the noise off behind an integer product: :math:`B' = B - \hat W N`.

    .. math:: \hat W Q(x + N) + B' = \hat W (Q(x + N) - N) + B

    Args:
        weight: The quantized weight, ``(out, in)``: with the float one the noise would not go away.
        bias: ``(out,)``, or ``None``.
        noise: ``(in,)``.

    >>> denoising_bias(torch.tensor([[1.0, 2.0]]), torch.tensor([0.75]), torch.tensor([0.25, 0.125]))
    tensor([0.2500])
    """
    shift = weight @ noise.to(weight.dtype)
    return -shift if bias is None else bias - shift
