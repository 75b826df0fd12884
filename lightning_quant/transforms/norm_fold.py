"""Move a per-channel scale and shift out of an activation, into the norm before it and the linear layers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lightning_quant.graph import Modulation
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


def fold_modulation(
    weight: Tensor, bias: Tensor, modulation: Modulation, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The modulating layer's new parameters, so that :math:`X = n (1 + g) + b` becomes :math:`(X + t) / r`.

    .. math:: 1 + \tilde g = (1 + g) / r, \qquad \tilde b = (b + t) / r

    where the rows of :math:`g` and :math:`b` are outputs of the layer.

    Args:
        weight: (out, in) of the layer that gives :math:`g` and :math:`b`.
        bias: (out,).
        modulation: which of its rows give :math:`g` and which :math:`b`.
        scale: :math:`r` (C,).
        shift: :math:`t` (C,).
    """
    weight, bias = weight.clone(), bias.clone()
    gain, offset = (slice(rows.start, rows.stop) for rows in modulation)
    weight[gain] /= scale[:, None]
    bias[gain] = (1 + bias[gain]) / scale - 1
    weight[offset] /= scale[:, None]
    bias[offset] = (bias[offset] + shift) / scale
    return weight, bias


def fold_pair(
    norm: nn.Module, linears: Sequence[nn.Module], scale: Tensor, shift: Tensor, modulation: Modulation | None = None
) -> None:
    """Fold a scale and a shift into a norm and all its readers, in float64; a missing bias is created.

    The Parameters keep their identity. Readers that are quantized are marked as folded, and refuse to be folded again.

    Args:
        norm: a norm with ``weight`` (C,) and ``bias``; or the linear layer that modulates it.
        linears: every reader of the norm's (modulated) output.
        scale: (C,), what that output will be divided by.
        shift: (C,), what is added to it before.
        modulation: which rows of ``norm`` modulate, if it is a linear layer.

    Raises:
        ValueError: if a reader has been folded already.
    """
    _refuse_folded(linears)
    with torch.no_grad():
        scale, shift = scale.double(), shift.double()
        for linear in linears:
            weight = weight_rows(linear)  # (out, in); a view of the Parameter where that is stored the other way round
            bias = _bias(linear, like=weight[:, 0])
            _set(weight, bias, *fold_linear(weight.double(), bias.double(), scale, shift))
            if isinstance(linear, QuantizedLayer):
                linear.folded.fill_(True)
        weight = weight_rows(norm)
        bias = _bias(norm, like=weight.reshape(len(weight), -1)[:, 0])
        if modulation is None:
            _set(weight, bias, *fold_norm(weight.double(), bias.double(), scale, shift))
        else:
            _set(weight, bias, *fold_modulation(weight.double(), bias.double(), modulation, scale, shift))


def fold_scale(norm: nn.Module, linears: Sequence[nn.Module], scale: Tensor) -> None:
    """Fold a scale alone into a norm, which may be an RMSNorm, and into all its readers; no bias is needed.

    Args:
        norm: a norm with ``weight`` (C,), and ``bias`` or none.
        linears: every reader of its output.
        scale: (C,), what that output will be divided by.

    >>> norm, linear, x = nn.RMSNorm(3), nn.Linear(3, 2), torch.randn(4, 3)
    >>> exact = linear(norm(x))
    >>> fold_scale(norm, [linear], torch.tensor([0.5, 1.0, 4.0]))
    >>> torch.allclose(linear(norm(x)), exact, atol=1e-6)
    True
    """
    _refuse_folded(linears)
    with torch.no_grad():
        scale = scale.double()
        for linear in linears:
            weight = weight_rows(linear)
            weight.copy_(weight.double() * scale)
            if isinstance(linear, QuantizedLayer):
                linear.folded.fill_(True)
        for parameter in (norm.weight, getattr(norm, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.copy_(parameter.double() / scale)


def _refuse_folded(linears: Sequence[nn.Module]) -> None:
    if any(isinstance(linear, QuantizedLayer) and bool(linear.folded) for linear in linears):
        raise ValueError("this linear layer has been folded already; folding twice would corrupt it")


def _set(weight: Tensor, bias: Tensor, new_weight: Tensor, new_bias: Tensor) -> None:
    weight.copy_(new_weight)
    bias.copy_(new_bias)


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
    without_bias = [module for module in modules if getattr(module, "bias", module) is None]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        for module in without_bias:
            drop_bias(module)
        raise
