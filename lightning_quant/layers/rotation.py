"""Orthogonal matrices that spread outliers over the channels, and layers that apply one to what they read or return.

A rotation that cannot be folded into the layers around it is *online*: a child module of the layer, which a hook calls.
The hook belongs to the layer's object, so it stays when the layer becomes its quantized twin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_quant.layers.block_rotation import BlockRotation
from lightning_quant.layers.hadamard import factors, fast_sylvester, has_hadamard, paley
from lightning_quant.layers.swap import weight_rows
from lightning_quant.quantizers import OwnPrecision

Kind = Literal["hadamard", "kronecker", "random", "block"]
KINDS = ("hadamard", "kronecker", "random", "block")
Place = Literal["input", "output", "input_inverse"]
_CHILD = "online_rotation"


class Rotation(nn.Module):
    r"""Multiplies the last axis with an orthogonal matrix Q, :math:`x \mapsto x Q`; with ``inverse``, by :math:`Q^T`.

    :math:`Q = D (B \otimes H_{2^m})`, where D are random signs, H is Sylvester's matrix, and B is, by kind,

    - ``"hadamard"``: a Hadamard matrix by Paley, so that all of Q has entries of one size;
    - ``"kronecker"``: a random orthogonal matrix, with the largest :math:`2^m` that divides the size;
    - ``"random"``: a random orthogonal matrix of the full size (:math:`m = 0`);
    - ``"block"``: 1, on blocks of the largest :math:`2^m` that divides the size.

    ``block`` makes Q block-diagonal with equal blocks of that size. ``keeps_mean`` multiplies a reflection onto Q,
    after which a vector of equal channels stays what it is: then the mean over the channels passes through, and
    LayerNorm commutes with Q.

    Args:
        size: number of channels.
        kind: as above.
        seed: of the signs and of random matrices; ``None``: no signs, and 0 for the matrices.
        block: size of a block, which divides ``size``; default: the whole.
        keeps_mean: whether the mean over all channels is left as it is.

    Raises:
        ValueError: if there is no such matrix of this size.

    >>> rotation, x = Rotation(12, seed=0), torch.randn(2, 12).double()
    >>> torch.allclose(rotation(x).norm(dim=-1), x.norm(dim=-1))
    True
    >>> torch.allclose(rotation(rotation(x), inverse=True), x)
    True
    """

    base: Tensor
    signs: Tensor
    mirror: Tensor

    def __init__(
        self,
        size: int,
        kind: str = "hadamard",
        seed: int | None = None,
        block: int | None = None,
        keeps_mean: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"a rotation is one of {', '.join(map(repr, KINDS))}; found {kind!r}")
        largest = size & -size
        block = (largest if kind == "block" else size) if block is None else block
        if size % block:
            raise ValueError(f"blocks of {block} do not divide {size} channels")
        if kind in ("hadamard", "block"):
            outer, self.twos = factors(block)
        else:
            self.twos = 1 if kind == "random" else block & -block
            outer = block // self.twos
        generator = torch.Generator().manual_seed(seed or 0)
        signs = torch.ones(block, dtype=torch.float64)
        if seed is not None:
            signs = 2.0 * torch.randint(2, (block,), generator=generator).double() - 1
        if kind in ("kronecker", "random"):
            base = _random_orthogonal(outer, generator) * math.sqrt(outer)  # as long as a Hadamard matrix is
        else:
            base = paley(outer)
        self.size, self.block = size, block
        # Found again from the arguments, so no file needs to hold them; float64 until somebody casts the model.
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("mirror", torch.zeros(0, dtype=torch.float64), persistent=False)
        if keeps_mean:
            even = torch.full((size,), size**-0.5, dtype=torch.float64)
            difference = self._multiply(even) - even
            if difference.norm() > 1e-9:
                self.mirror = difference / difference.norm()

    def forward(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Rotate the last axis, in at least float32."""
        working = x if x.dtype == torch.float64 else x.float()
        if inverse:
            return self._multiply_transposed(self._reflect(working)).to(x.dtype)
        return self._reflect(self._multiply(working)).to(x.dtype)

    def matrix(self) -> Tensor:
        """Q itself, (size, size), float64."""
        dense: Tensor = self(torch.eye(self.size, dtype=torch.float64, device=self.base.device))
        return dense

    def _reflect(self, x: Tensor) -> Tensor:
        if self.mirror.numel() == 0:
            return x
        mirror = self.mirror.to(x.dtype)
        return x - 2 * (x @ mirror).unsqueeze(-1) * mirror

    def _multiply(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.size // self.block, self.block)) * self.signs.to(x.dtype)
        return self._spread(blocks, self.base.to(x.dtype)).flatten(-2)

    def _multiply_transposed(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.size // self.block, self.block))
        return (self._spread(blocks, self.base.t().to(x.dtype)) * self.signs.to(x.dtype)).flatten(-2)

    def _spread(self, blocks: Tensor, base: Tensor) -> Tensor:
        grid = fast_sylvester(blocks.unflatten(-1, (len(base), self.twos)))  # (..., K, 2^m)
        if len(base) > 1:
            grid = torch.einsum("...ij,ik->...kj", grid, base)
        spread: Tensor = grid.flatten(-2) * self.block**-0.5
        return spread

    def _apply(self, fn: Any, recurse: bool = True) -> Rotation:
        """Move to a device, and leave the matrices in float64: folded weights were multiplied with these very ones."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer.float()).device)
        return self

    def extra_repr(self) -> str:
        """Size and factors."""
        return f"{self.size}, block={self.block}, base={len(self.base)}, twos={self.twos}"


class SmoothedRotation(OwnPrecision):
    r"""Multiplies each channel with a number of its own, and rotates what that gives: :math:`x \mapsto (x \odot c) Q`.

    The numbers are part of the state dict, 1 until they are set.

    Args:
        size: number of channels.
        kind: of the rotation, as in :class:`Rotation`; ``"greedy"`` for a
            :class:`~lightning_quant.layers.BlockRotation`, ``"none"`` for no rotation at all.
        seed: the same.
        block: the same.

    >>> smoothed, layer, x = SmoothedRotation(4, seed=0), nn.Linear(4, 2, bias=False), torch.randn(3, 4)
    >>> _ = smoothed.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    >>> torch.allclose(smoothed(x) @ smoothed.fold(layer.weight).T, layer(x), atol=1e-6)
    True
    """

    scale: Tensor

    def __init__(self, size: int, kind: str = "hadamard", seed: int | None = None, block: int | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(size))
        self.rotation: Rotation | BlockRotation | None = None
        if kind == "greedy":
            self.rotation = BlockRotation(size, block or 128)
        elif kind != "none":
            self.rotation = Rotation(size, kind, seed, block)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and rotate the last axis, in at least float32."""
        working = x if x.dtype == torch.float64 else x.float()
        return self._rotated(working * self.scale.to(working.dtype)).to(x.dtype)

    def fold(self, weight: Tensor, inverse: bool = False) -> Tensor:
        """The weight (out, C) that on what this returns computes what the given one did on its input; and back."""
        scale = self.scale.to(weight.dtype)
        return self._rotated(weight, inverse=True) * scale if inverse else self._rotated(weight / scale)

    def _rotated(self, x: Tensor, inverse: bool = False) -> Tensor:
        return x if self.rotation is None else cast(Tensor, self.rotation(x, inverse))


@dataclass
class RotationPlan:
    """One rotation of a model: the weights that it was multiplied into, and where it runs online.

    Args:
        kind: see :class:`Rotation`; of a smoothed one see :class:`SmoothedRotation`.
        seed: the same.
        block: the same; ``None``: all channels.
        keeps_mean: the same.
        reads: layers whose input channels are rotated, :math:`W Q`.
        writes: layers whose output channels are, :math:`Q^T W`, each as (name, first row, row behind the last); the
            rows of an embedding are vectors of these channels.
        online: where Q runs in the forward, by layer.
        smoothed: whether each channel is multiplied with a number before, which the state dict holds.
    """

    kind: str
    seed: int | None = None
    block: int | None = None
    keeps_mean: bool = False
    reads: list[str] = field(default_factory=list)
    writes: list[tuple[str, int, int]] = field(default_factory=list)
    online: dict[str, Place] = field(default_factory=dict)
    smoothed: bool = False

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> RotationPlan:
        """The plan out of a nested dict; JSON knows no tuples."""
        return cls(**{**stored, "writes": [(name, start, stop) for name, start, stop in stored["writes"]]})

    def rotation(self, size: int) -> Rotation:
        """The matrix for so many channels."""
        return Rotation(size, self.kind, self.seed, self.block, self.keeps_mean)

    @property
    def names(self) -> list[str]:
        """Every layer that it concerns."""
        return list(dict.fromkeys([*self.reads, *(name for name, _, _ in self.writes), *self.online]))

    def put_online(self, model: nn.Module) -> None:
        """Let it run where it must; the weights have been rotated already, or will be loaded."""
        for name, place in self.online.items():
            layer = model.get_submodule(name)
            rows = weight_rows(layer) if place == "input" else cast(Tensor, layer.weight)
            size = rows.shape[-1]
            smoothed = SmoothedRotation(size, self.kind, self.seed, self.block) if self.smoothed else None
            rotate_online(layer, smoothed or self.rotation(size), place)

    def take_offline(self, model: nn.Module) -> None:
        """Let it run nowhere any more; the weights stay as they are."""
        modules = dict(model.named_modules())
        for name in self.online:
            if name in modules:
                stop_rotating(modules[name])


def any_kind(size: int) -> Kind:
    """The kind that spreads best: Hadamard where there is one, else a random matrix times one.

    >>> any_kind(576), any_kind(172)
    ('hadamard', 'kronecker')
    """
    return "hadamard" if has_hadamard(size) else "kronecker"


def rotate_online(layer: nn.Module, rotation: Rotation | SmoothedRotation, place: Place) -> None:
    """Let a layer rotate what it reads, or what it returns, from now on.

    >>> layer, x = nn.Linear(4, 2, bias=False), torch.randn(3, 4)
    >>> rotation, exact = Rotation(4), layer(x)
    >>> rotate_online(layer, rotation, "input")
    >>> _ = layer.weight.data.copy_(rotation(layer.weight.data))
    >>> torch.allclose(layer(x), exact, atol=1e-6)
    True
    """
    if hasattr(layer, _CHILD):
        raise ValueError("this layer rotates already; call remove(model) of the callback that made it")
    parameter = next(layer.parameters(recurse=False))
    layer.add_module(_CHILD, rotation.to(parameter.device).train(layer.training))
    if place == "output":
        layer.register_forward_hook(_rotate_output)
    else:
        layer.register_forward_pre_hook(_rotate_input if place == "input" else _rotate_input_back)


def online_rotation(layer: nn.Module) -> Rotation | SmoothedRotation:
    """What a layer rotates online with."""
    return cast("Rotation | SmoothedRotation", layer.get_submodule(_CHILD))


def stop_rotating(layer: nn.Module) -> None:
    """Take an online rotation away; the weights stay as they are."""
    for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_rotate_output, _rotate_input, _rotate_input_back)]:
            del hooks[key]
    if hasattr(layer, _CHILD):
        delattr(layer, _CHILD)


def rotates(layer: nn.Module) -> bool:
    """Whether a layer rotates online."""
    return hasattr(layer, _CHILD)


def _rotate_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(Rotation, layer.online_rotation)(args[0]), *args[1:])


def _rotate_input_back(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(Rotation, layer.online_rotation)(args[0], inverse=True), *args[1:])


def _rotate_output(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return cast(Tensor, cast(Rotation, layer.online_rotation)(output))


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal
