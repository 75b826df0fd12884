"""Which small float format weights and inputs of a layer take, and where it ends: searched by the output's error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.quantizers.floating import float_max, float_quantize

TINY = torch.finfo(torch.float32).tiny


@dataclass
class FloatFormat:
    """A small float format and its scale.

    Args:
        exponent: exponent bits.
        mantissa: mantissa bits.
        scale: what its values are multiplied with: (out,) of a weight, (C,) of an input.
    """

    exponent: int
    mantissa: int
    scale: Tensor

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` in the format; a weight has one scale a row, an input one a column."""
        return float_quantize(x / self.scale, self.exponent, self.mantissa) * self.scale


def formats_of(bits: int) -> list[tuple[int, int]]:
    """The formats (exponent, mantissa) that are tried for so many bits, the sign included.

    >>> formats_of(4), formats_of(8)
    ([(3, 0), (2, 1), (1, 2)], [(5, 2), (4, 3), (3, 4), (2, 5), (1, 6)])
    """
    mantissas = range(3) if bits <= 4 else range(2, bits - 1)
    return [(bits - 1 - mantissa, mantissa) for mantissa in mantissas if bits - 1 - mantissa >= 1]


def power_of_two_scales(reach: Tensor, exponent: int, mantissa: int, preshift: bool = True) -> Tensor:
    r"""One scale for the tensor, times a power of two for each channel, (C,).

    .. math:: s_j = s \, 2^{-k_j}, \qquad k_j = \mathrm{clamp}(\lfloor \log_2 (\max_i c_i / c_j) \rceil, 0, 2^E - 1)

    where the largest channel just fits into :math:`s`. The powers are exponents that the weight can take over.

    Args:
        reach: the largest magnitude of every channel, c (C,).
        exponent: exponent bits, E.
        mantissa: mantissa bits.
        preshift: whether channels have a power of their own; without, k = 0.

    >>> power_of_two_scales(torch.tensor([6.0, 3.1, 0.4]), 2, 1)
    tensor([1.0000, 0.5000, 0.1250])
    """
    whole = reach.amax().clamp(min=TINY)
    power = (whole / reach.clamp(min=TINY)).log2().round().clamp(0, 2**exponent - 1) if preshift else torch.zeros(1)
    # Where rounding took the power too far the largest number of the channel would not fit.
    scale = whole / float_max(exponent, mantissa)
    shifted = scale * torch.exp2(-power.to(scale))
    return torch.where(reach > shifted * float_max(exponent, mantissa) * 2**0.5, scale, shifted).expand_as(reach)


def search_formats(
    x: Tensor,
    weight: Tensor,
    weight_formats: Sequence[tuple[int, int]] | None,
    input_formats: Sequence[tuple[int, int]] | None,
    rounds: int = 3,
    steps: int = 40,
    preshift: bool = True,
    reach: Tensor | None = None,
) -> tuple[FloatFormat | None, FloatFormat | None, list[float]]:
    """Search formats and scales of a linear layer in turns, for the least squared error of its output.

    What a format starts from reaches as far as the tensor does; keeping that is among the candidates, so no turn makes
    the error larger.

    Args:
        x: inputs (tokens, in).
        weight: (out, in).
        weight_formats: candidates (exponent, mantissa); ``None`` leaves the weight float.
        input_formats: the same for the input.
        rounds: how often each of the two is searched.
        steps: candidates for the reach of a format, from a fifth of the tensor's to all of it.
        preshift: whether the channels of the input have powers of two of their own.
        reach: the largest magnitude of every channel (C,), where ``x`` is a sample of more; default: that of ``x``.

    Returns:
        the format of the weight, that of the input, and the error of the output relative to it after every turn.
    """
    x, weight = x.float(), weight.float()
    target = x @ weight.T
    size = float(target.square().sum().clamp(min=TINY))
    weights, inputs, errors = x.new_zeros(0), x.new_zeros(0), []
    chosen_weight: FloatFormat | None = None
    chosen_input: FloatFormat | None = None
    rows, reach = weight.abs().amax(1).clamp(min=TINY), x.abs().amax(0) if reach is None else reach.float()
    cuts = torch.linspace(0.2, 1.0, steps).tolist()
    for _ in range(rounds):
        inputs = x if chosen_input is None else chosen_input.rounded(x)
        if weight_formats is not None:
            chosen_weight = _search_weight(inputs, weight, target, rows, weight_formats, cuts)
        weights = weight if chosen_weight is None else chosen_weight.rounded(weight.T).T
        if input_formats is not None:
            scales = [
                (e, m, power_of_two_scales(reach, e, m, preshift) * cut) for e, m in input_formats for cut in cuts
            ]
            candidates = (FloatFormat(*each) for each in scales)
            keep = [] if chosen_input is None else [chosen_input]
            chosen_input = _best_input(x, weights, target, [*keep, *candidates])
            inputs = chosen_input.rounded(x)
        errors.append(float((inputs @ weights.T - target).square().sum()) / size)
    return chosen_weight, chosen_input, errors


def _search_weight(
    x: Tensor, weight: Tensor, target: Tensor, rows: Tensor, formats: Iterable[tuple[int, int]], cuts: Sequence[float]
) -> FloatFormat:
    """Per row the best reach, and over all rows the best format."""
    gram, cross = x.T @ x, x.T @ target  # ||x w - y||^2 = w G w - 2 w c + ||y||^2, and the last is the same for all
    best: tuple[float, FloatFormat] | None = None
    for exponent, mantissa in formats:
        least = torch.full_like(rows, float("inf"))
        found = rows / float_max(exponent, mantissa)
        for cut in reversed(cuts):
            scale = rows * cut / float_max(exponent, mantissa)
            rounded = float_quantize(weight / scale[:, None], exponent, mantissa) * scale[:, None]
            error = ((rounded @ gram) * rounded).sum(1) - 2 * (rounded * cross.T).sum(1)
            found, least = torch.where(error < least, scale, found), torch.minimum(error, least)
        total = float(least.double().sum())
        if best is None or total < best[0]:
            best = total, FloatFormat(exponent, mantissa, found)
    assert best is not None
    return best[1]


def _best_input(x: Tensor, weights: Tensor, target: Tensor, candidates: Sequence[FloatFormat]) -> FloatFormat:
    errors = [float((candidate.rounded(x) @ weights.T - target).square().sum()) for candidate in candidates]
    return candidates[errors.index(min(errors))]
