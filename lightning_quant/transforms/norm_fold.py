"""Move a per-channel scale and shift out of an activation, into the norm before it and the linear layers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lightning_quant.layers import QuantizedLayer, create_bias, drop_bias, weight_rows


def fold_norm(gamma: Tensor, beta: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r"""The norm's new affine, so that its output :math:`X` becomes :math:`(X + t) / r`.

    .. math:: \tilde\gamma = \gamma / r, \qquad \tilde\beta = (\beta + t) / r

    Args:
        gamma: the norm's weight (C,).
        beta: the norm's bias (C,).
        scale: :math:`r` (C,).
        shift: :math:`t` (C,).
    """
    return gamma / scale, (beta + shift) / scale


def fold_linear(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r"""The linear layer's new parameters, so that on :math:`(X + t) / r` it computes what it computed on :math:`X`.

    .. math:: \tilde W_{:,j} = W_{:,j} r_j, \qquad \tilde c = c - W t \quad \text{(the old } W \text{)}

    Args:
        weight: (out, C).
        bias: (out,).
        scale: :math:`r` (C,).
        shift: :math:`t` (C,).

    >>> x, w, c = torch.randn(5, 3).double(), torch.randn(2, 3).double(), torch.randn(2).double()
    >>> r, t = torch.rand(3).double() + 0.5, torch.randn(3).double()
    >>> new_w, new_c = fold_linear(w, c, r, t)
    >>> torch.allclose((x + t) / r @ new_w.T + new_c, x @ w.T + c)
    True
    """
    return weight * scale, bias - weight @ shift


def fold_pair(norm: nn.Module, linears: Sequence[nn.Module], scale: Tensor, shift: Tensor) -> None:
    """Fold a scale and a shift into a norm and all its readers, in float64; a missing bias is created.

    The Parameters keep their identity. Linears that are quantized are marked as folded, and refuse to be folded again.

    Args:
        norm: a module with ``weight`` (C,) and ``bias``.
        linears: every reader of the norm's output.
        scale: (C,), what the norm's output will be divided by.
        shift: (C,), what is added to it before.

    Raises:
        ValueError: if a linear has been folded already.
    """
    for linear in linears:
        if isinstance(linear, QuantizedLayer) and bool(linear.folded):
            raise ValueError("this linear layer has been folded already; folding twice would corrupt it")
    with torch.no_grad():
        scale, shift = scale.double(), shift.double()
        for linear in linears:
            weight = weight_rows(linear)  # (out, in); a view of the Parameter where that is stored the other way round
            bias = _bias(linear, like=weight[:, 0])
            new_weight, new_bias = fold_linear(weight.double(), bias.double(), scale, shift)
            weight.copy_(new_weight)
            bias.copy_(new_bias)
            if isinstance(linear, QuantizedLayer):
                linear.folded.fill_(True)
        gamma = weight_rows(norm)
        beta = _bias(norm, like=gamma)
        new_gamma, new_beta = fold_norm(gamma.double(), beta.double(), scale, shift)
        gamma.copy_(new_gamma)
        beta.copy_(new_beta)


def _bias(module: nn.Module, like: Tensor) -> Tensor:
    if module.bias is None:
        create_bias(module, like)
    return cast(Tensor, module.bias)


@contextmanager
def unfolded_on_failure(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give norms and linears their parameters back if folding them is interrupted."""
    tensors = [
        (x, x.detach().clone())
        for module in modules
        for x in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    without_bias = [module for module in modules if module.bias is None]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        for module in without_bias:
            drop_bias(module)
        raise
