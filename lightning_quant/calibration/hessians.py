"""Second moments of what a layer reads: the curvature of its squared output error, gathered batch by batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.calibration.ranks import sum_across_ranks
from lightning_quant.layers import weight_rows

__all__ = ["Hessian", "input_rows"]

ROWS = 1024  # tokens at a time, where samples cannot be told apart


class Hessian:
    r"""Sums up :math:`H = \frac{2}{n} \sum_t w_t \, x_t x_t^\top` over the tokens of any number of batches.

    It is the Hessian of :math:`\| W X - \hat W X \|^2 / n` for every row of :math:`\hat W`. Products are float32, one
    sample at a time whatever the batch size, also under autocast; their sum is float64.

    Args:
        features: length of a token, which is the number of weights in a row.
        groups: how many groups of channels a convolution keeps apart; ``None`` for one matrix without a group axis.
        diagonal: keep :math:`\text{diag}(H)` alone, which is all that scores like Wanda's need.
        device: where the sum lives.

    Attributes:
        tokens: how many tokens of weight above 0 were seen.

    Example:
        >>> hessian = Hessian(2)
        >>> hessian.add(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
        >>> hessian.matrix()
        tensor([[10.,  2.],
                [ 2.,  4.]], dtype=torch.float64)
        >>> hessian.diagonal().tolist(), hessian.tokens
        ([10.0, 4.0], 2)
    """

    def __init__(
        self,
        features: int,
        groups: int | None = None,
        diagonal: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (features,) if diagonal else (features, features)
        self.total = torch.zeros(*(() if groups is None else (groups,)), *shape, dtype=torch.float64, device=device)
        self.features, self.only_diagonal = features, diagonal
        self.tokens = 0

    @classmethod
    def of(cls, layer: nn.Module, diagonal: bool = False) -> Hessian:
        """An empty one for the inputs of a linear layer or convolution, where its weight is."""
        weight = weight_rows(layer)
        groups = getattr(layer, "groups", 1)
        return cls(weight[0].numel(), groups if groups > 1 else None, diagonal, weight.device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: (samples, ..., features), with the channel groups of a convolution, if it has several, behind the
                samples; two axes are tokens of no known sample.
            weights: how much each token counts, (samples, tokens); 0 leaves a token out.
        """
        with torch.autocast(x.device.type, enabled=False):
            grouped = self.total.dim() > (1 if self.only_diagonal else 2)
            if x.dim() == 2 and not grouped:
                x, weights = x.unsqueeze(0), None if weights is None else weights.reshape(1, -1)
            elif x.dim() != 3 and not grouped:
                x = x.reshape(len(x), -1, x.shape[-1])
            counts = None if weights is None else weights.to(x.device).reshape(len(x), x.shape[-2])
            for number, sample in enumerate(x):
                parts = sample.split(ROWS, dim=-2)
                scales = [None] * len(parts) if counts is None else counts[number].split(ROWS)
                for part, scale in zip(parts, scales, strict=True):
                    self._add(part, scale)

    def _add(self, rows: Tensor, counts: Tensor | None) -> None:
        rows = rows.detach().float()
        self.tokens += rows.shape[-2] if counts is None else int((counts > 0).sum())
        if counts is not None:
            rows = rows * counts.float().sqrt().unsqueeze(-1)
        product = rows.square().sum(-2) if self.only_diagonal else rows.mT @ rows
        self.total += product.to(self.total.device)

    def reduce(self) -> None:
        """Bring the ranks' sums together: one collective for each tensor, after the last batch."""
        self.total = sum_across_ranks(self.total)
        self.tokens = int(sum_across_ranks(torch.tensor(self.tokens, device=self.total.device)))

    def matrix(self) -> Tensor:
        """H: (features, features) in float64, behind an axis of groups where there are several."""
        if self.only_diagonal:
            raise ValueError("this Hessian gathered its diagonal alone; make it with diagonal=False")
        return self.total * (2 / max(1, self.tokens))

    def diagonal(self) -> Tensor:
        """diag(H): (features,) in float64."""
        diagonal = self.total if self.only_diagonal else self.total.diagonal(dim1=-2, dim2=-1)
        return diagonal * (2 / max(1, self.tokens))


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What each row of a layer's flattened weight is multiplied with: (samples, [groups,] tokens, features).

    Args:
        layer: a linear layer, or a convolution of one or two dimensions, whose input is unfolded.
        x: its input.

    Raises:
        ValueError: for a layer of another kind.

    Example:
        >>> conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 4, 4)
        >>> rows = input_rows(conv, x)
        >>> rows.shape
        torch.Size([2, 16, 27])
        >>> by_rows = rows @ conv.weight.flatten(1).T + conv.bias
        >>> torch.allclose(by_rows.mT.reshape(2, 5, 4, 4), conv(x), atol=1e-5)
        True
    """
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return _unfolded(layer, x)
    if isinstance(layer, nn.Linear) or weight_rows(layer).dim() == 2:
        return x if x.dim() != 1 else x.unsqueeze(0)
    raise ValueError(f"a {type(layer).__name__} has no rows of inputs; leave it float with skip=")


def _unfolded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    flat = isinstance(layer, nn.Conv1d)
    if x.dim() == layer.weight.dim() - 1:
        x = x.unsqueeze(0)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    if flat:
        x = x.unsqueeze(-2)
    kernel, dilation, stride = (
        (1, *size) if flat else size for size in (layer.kernel_size, layer.dilation, layer.stride)
    )
    columns = F.unfold(x, kernel, dilation, 0, stride)  # (samples, channels * taps, places)
    if layer.groups > 1:
        columns = columns.unflatten(1, (layer.groups, -1))
    return columns.mT
