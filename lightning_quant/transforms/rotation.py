"""Multiply a rotation into the weights around it, so that the model computes what it did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lightning_quant.graph import Residual
from lightning_quant.layers import (
    Rotation,
    RotationPlan,
    SmoothedRotation,
    any_kind,
    create_bias,
    weight_rows,
)


def rotate_reads(layer: nn.Module, rotation: Rotation, inverse: bool = False) -> None:
    """Let a layer read rotated channels, :math:`W Q`: on :math:`x Q` it then computes what it did on x."""
    with torch.no_grad():
        weight = weight_rows(layer)  # (out, in); a view of the Parameter where that is stored the other way round
        weight.copy_(rotation(weight.double(), inverse))


def rotate_writes(
    layer: nn.Module, rotation: Rotation, start: int = 0, stop: int | None = None, inverse: bool = False
) -> None:
    """Let a layer write rotated channels, :math:`Q^T W` and :math:`Q^T b`; the rows of a table become :math:`E Q`.

    Args:
        layer: a linear layer or an embedding.
        rotation: of the channels that it writes.
        start: the first of its output channels that is rotated.
        stop: the one behind the last.
        inverse: rotate back.
    """
    with torch.no_grad():
        weight = weight_rows(layer)
        if isinstance(layer, nn.Embedding):
            weight.copy_(rotation(weight.double(), inverse))
            return
        rows = weight[start:stop]
        rows.copy_(rotation(rows.double().t(), inverse).t())
        if layer.bias is not None:
            bias = cast(Tensor, layer.bias)[start:stop]
            bias.copy_(rotation(bias.double(), inverse))


def fold_affine(norm: nn.Module, readers: Iterable[nn.Module]) -> None:
    r"""Fold all of a norm's affine into the layers that read it: :math:`W \gamma`, :math:`b + W \beta`.

    The norm keeps its Parameters, which are 1 and 0 from now on; a missing bias is created where there is a
    :math:`\beta` to take.

    >>> norm, linear, x = nn.LayerNorm(4), nn.Linear(4, 2), torch.randn(3, 4)
    >>> _ = nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    >>> exact = linear(norm(x))
    >>> fold_affine(norm, [linear])
    >>> torch.allclose(linear(norm(x)), exact, atol=1e-6), norm.weight.data
    (True, tensor([1., 1., 1., 1.]))
    """
    gamma, beta = cast(Tensor, norm.weight), cast("Tensor | None", getattr(norm, "bias", None))
    with torch.no_grad():
        for layer in readers:
            weight = weight_rows(layer)
            if beta is not None and bool(beta.any()):
                if layer.bias is None:
                    create_bias(layer, like=weight[:, 0])
                bias = cast(Tensor, layer.bias)
                bias.copy_(bias.double() + weight.double() @ beta.double())
            weight.copy_(weight.double() * gamma.double())
        gamma.fill_(1)
        if beta is not None:
            beta.zero_()


def rotate(model: nn.Module, plan: RotationPlan) -> None:
    """Multiply a rotation into the weights that it is planned for, and let it run online where it must.

    Args:
        model: whose norms in front of what is read have no affine any more; see :func:`fold_affine`.
        plan: which layers read and write rotated channels.
    """
    _multiply(model, plan)
    plan.put_online(model)


def rotate_back(model: nn.Module, plan: RotationPlan) -> None:
    """Undo :func:`rotate`, up to rounding."""
    _multiply(model, plan, inverse=True)
    plan.take_offline(model)


def fold_smoothed(layer: nn.Module, smoothed: SmoothedRotation, inverse: bool = False) -> None:
    """Fold what a layer's input is multiplied and rotated with into its weight, or take it out again.

    Args:
        layer: a linear one.
        smoothed: what runs in front of it, or ran.
        inverse: take it out.
    """
    with torch.no_grad():
        weight = weight_rows(layer)
        weight.copy_(smoothed.fold(weight.double(), inverse))


def _multiply(model: nn.Module, plan: RotationPlan, inverse: bool = False) -> None:
    made: dict[int, Rotation] = {}  # one for each number of channels

    def rotation(channels: int) -> Rotation:
        if channels not in made:
            made[channels] = plan.rotation(channels)
        return made[channels]

    for name in plan.reads:
        layer = model.get_submodule(name)
        rotate_reads(layer, rotation(weight_rows(layer).shape[1]).to(_device(layer)), inverse)
    for name, start, stop in plan.writes:
        layer = model.get_submodule(name)
        rotate_writes(layer, rotation(stop - start).to(_device(layer)), start, stop, inverse)


def _device(layer: nn.Module) -> torch.device:
    return cast(Tensor, layer.weight).device


def residual_rotation(found: Residual, kind: str, seed: int | None) -> RotationPlan:
    """How the residual stream is rotated: fused in all that writes and reads it.

    Where an embedding shares its table with the head, the table stays as it is: the rotation then runs online behind
    the embedding, and backwards in front of the last norm.

    Raises:
        ValueError: naming what is in the way.
    """
    if not found.norms or not found.writers:
        raise ValueError(
            "no residual stream was found: no norm reads a sum of what embeddings and linear layers returned; set "
            "residual=False to rotate only inputs of layers"
        )
    if found.obstacles:
        name, why = next(iter(found.obstacles.items()))
        raise ValueError(
            f"the residual stream cannot be rotated: `{name}`: {why}; set residual=False to rotate only inputs of "
            f"layers"
        )
    plan = RotationPlan(kind, seed, keeps_mean="layer" in found.kinds.values())
    for name in found.writers:
        if name in found.tied:
            plan.online[name] = "output"
        else:
            plan.writes.append((name, 0, found.width))
    for norm, readers in found.norms.items():
        if found.tied & {*readers}:
            plan.online[norm] = "input_inverse"
        else:
            plan.reads += readers
    return plan


def head_rotations(found: Residual, seed: int | None) -> list[RotationPlan]:
    """How the heads of each attention are rotated: fused in what gives its values and in what reads its result."""
    return [
        RotationPlan(
            any_kind(pair.head_size),
            seed,
            block=pair.head_size,
            reads=[pair.reader],
            writes=[(pair.values.linear, pair.values.start, pair.values.stop)],
        )
        for pair in found.heads
    ]


def input_rotation(layer: nn.Module, name: str, kind: str | None, seed: int | None) -> RotationPlan:
    """How the input of one layer is rotated: online, and its weight with it.

    Args:
        layer: a linear one.
        name: of it.
        kind: ``None``: the best that there is of its size.
        seed: of the rotation.
    """
    return RotationPlan(kind or any_kind(weight_rows(layer).shape[1]), seed, reads=[name], online={name: "input"})
