"""Exact products of unsigned 8-bit activations and signed 8-bit weights on a CPU.

oneDNN multiplies them four at a time. With VNNI instructions the sums are exact. Without, two neighbouring products
are added in 16 bits first, and a sum beyond them saturates: 255 times 127 twice does. Then the activations are
looked at through a window of half their codes, for which no sum is too large whatever the weights are, and what stands
out of the window is multiplied by itself. The integers are the same on any CPU; what that costs is most of the gain, so
without VNNI 7 bits on either side are much the faster format.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.kernels.kernel import sharing

WINDOW = 128  # twice 128 times 127 and twice 128 times -128 are just within 16 bits
_LONGEST_SUM = 2**15 - 1


@functools.cache
def saturates() -> bool:
    """Whether this CPU's products of unsigned and signed bytes are cut off at 16 bits; found out by trying."""
    codes, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    out = _multiply(codes, _prepack(weight), torch.ones(16), torch.zeros(16, dtype=torch.int64), None, torch.float32)
    return bool((out != 64 * 255 * 127).any())


def may_saturate(input_bits: int, weight_bits: int) -> bool:
    """Whether two neighbouring products of these many bits can leave 16 bits on this CPU.

    >>> may_saturate(7, 8), may_saturate(8, 7)
    (False, False)
    """
    return saturates() and 2 * (2**input_bits - 1) * 2 ** (weight_bits - 1) > _LONGEST_SUM


class Int8Product(nn.Module):
    r"""``codes @ weight.T``, times a scale for every output, plus a bias.

    .. math:: y_{mn} = s_n \sum_k (c_{mk} - z) (w_{nk} - o_n) + b_n

    Where sums may saturate, with the window :math:`m_k = \text{clamp}(c_k, l, l + 128) - l` and the channels
    :math:`C` that were ever seen to leave it,

    .. math:: \sum_k (c_k - z) w_k = \sum_k (m_k - z') w_k + \sum_{k \in C} (r_k - z') w_k, \quad
              z' = z - l, \quad r_k = c_k - l - m_k + z'

    which is one longer product. With :math:`l = \lfloor z / 2 \rfloor` all :math:`m_k` and :math:`r_k` are in [0, 128].
    :math:`C` grows when a batch comes that needs it, before it is multiplied, so the integers are always exact.

    Args:
        weight: signed integers (out, in).
        scale: of every output (out,).
        bias: of every output (out,), or ``None``.
        zero_point: the activation code that stands for 0.
        offset: the weight that stands for 0, of every output (out,); ``None`` where it is 0.
        input_bits: how many bits the activation codes have.
        weight_bits: how many bits the weights have.

    >>> weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    >>> codes = torch.randint(0, 256, (8, 64), dtype=torch.uint8)
    >>> product = Int8Product(weight, torch.ones(32), None, zero_point=131)
    >>> torch.equal(product(codes).long(), (codes.long() - 131) @ weight.long().T)
    True
    """

    scale: Tensor
    zeros: Tensor
    bias: Tensor | None
    shift: Tensor | None
    packed: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        zero_point: int = 0,
        offset: Tensor | None = None,
        input_bits: int = 8,
        weight_bits: int = 8,
    ) -> None:
        super().__init__()
        self.inputs = weight.shape[1]
        self.zero_point = zero_point
        self.lowest = min(max(zero_point // 2, 0), 255 - WINDOW)
        self.nothing = min(max(zero_point - self.lowest, self.lowest), self.lowest + 1)  # z', if 0 is a code at all
        self.windowed = may_saturate(input_bits, weight_bits)
        self.register_buffer("scale", scale.float().expand(len(weight)).contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)
        self.register_buffer(
            "zeros", torch.zeros(len(weight), dtype=torch.int64), persistent=False
        )  # oneDNN wants them
        shift = None if offset is None or not bool(offset.any()) else (offset * scale).float()
        self.register_buffer("shift", shift, persistent=False)
        self._pack(weight.to(torch.int8), torch.empty(0, dtype=torch.int64))

    def with_inputs(self, scale: Tensor, zero_point: int) -> Int8Product:
        """The same packed weights beside activations of another scale and zero point, where no sum may saturate."""
        assert not self.windowed
        found = sharing(self)
        found.zero_point = zero_point
        found.scale = scale.float().expand(len(self.scale)).contiguous()
        if self.shift is not None:
            found.shift = self.shift / self.scale * found.scale
        return found

    @property
    def takes_what_follows(self) -> bool:
        """Whether one step can end with a curve and a rounding: not where something is added to the product."""
        return self.shift is None and not self.windowed

    def finished(self, codes: Tensor, scale: Tensor, bias: Tensor | None, *ending: Any) -> Tensor:
        """The same with another scale and bias, and an ending as :meth:`Epilogue.ending_on` tells it."""
        rows = codes.reshape(-1, self.inputs)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, self.zero_point, self.packed, scale, self.zeros, bias, *ending
        )
        return out.view(*codes.shape[:-1], len(scale))

    def forward(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., in) uint8 -> (..., out) in a dtype."""
        rows = codes.reshape(-1, self.inputs)
        if self.shift is None:
            return self._product(rows, dtype).view(*codes.shape[:-1], len(self.scale))
        totals = rows.sum(1, dtype=torch.int32) - self.inputs * self.zero_point
        out = self._product(rows, torch.float32).addr_(totals.float(), self.shift, alpha=-1)
        return out.to(dtype).view(*codes.shape[:-1], len(self.scale))

    def integers(self) -> Tensor:
        """The weight again: (out, in) int8."""
        return self.packed.to_dense()[: self.inputs].t().contiguous()

    def _product(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.windowed:
            return _multiply(rows, self.packed, self.scale, self.zeros, self.bias, dtype, self.zero_point)
        packed, outside, bias = self._reaching(rows)
        inside = rows.clamp(self.lowest, self.lowest + WINDOW).sub_(self.lowest)
        if len(outside):
            channels = rows.gather(1, outside.expand(len(rows), -1))  # several times faster than index_select
            above = channels.clamp(min=self.lowest + WINDOW).sub_(self.lowest + WINDOW - (self.nothing - self.lowest))
            inside = torch.cat([inside, above.add_(channels.clamp_(max=self.lowest))], 1)
        return _multiply(inside, packed, self.scale, self.zeros, bias, dtype, self.zero_point - self.lowest)

    def _reaching(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What serves all of these codes: packed weight, channels outside the window, bias."""
        state = self._state
        if len(rows):
            leaves = (rows.amax(0) > self.lowest + WINDOW) | (rows.amin(0) < self.lowest)
            leaves[state[1]] = False
            if bool(leaves.any()):
                state = self._pack(self.integers(), torch.cat([state[1], leaves.nonzero().squeeze(1)]))
        return state

    def _pack(self, weight: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        bias = self.bias
        missing = self.zero_point - self.lowest - self.nothing
        if missing:  # 0 is not among the codes
            constant = missing * weight[:, outside].sum(1, dtype=torch.int32) * self.scale
            bias = constant if bias is None else bias + constant
        packed = _prepack(torch.cat([weight, weight[:, outside]], 1))
        self.register_buffer("packed", packed, persistent=False)
        self._state = packed, outside, bias  # in one step, as other threads may be multiplying
        return self._state

    def __getstate__(self) -> dict[str, Any]:
        """Packed weights cannot be copied; their integers can."""
        state = {name: value for name, value in self.__dict__.items() if name != "_state"}
        state["_buffers"] = {**self._buffers, "packed": None}
        return {**state, "_integers": self.integers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the integers again."""
        integers = state.pop("_integers")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(integers, torch.empty(0, dtype=torch.int64))


def _prepack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def _multiply(
    codes: Tensor,
    packed: Tensor,
    scale: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    zero_point: int = 0,
) -> Tensor:
    out: Tensor
    if torch.compiler.is_compiling():
        out = _compiled_multiply(codes, packed, scale, zeros, bias, dtype, zero_point)
        return out
    out = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero_point, packed, scale, zeros, bias, 1.0, 0, dtype, "none", [], ""
    )
    return out


@torch.library.custom_op("lightning_quant::onednn_product", mutates_args=())
def _compiled_multiply(
    codes: Tensor,
    packed: Tensor,
    scale: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    zero_point: int,
) -> Tensor:
    """The same as an operator that the compiler does not look into: it wants packed weights to be constants."""
    return _multiply(codes, packed, scale, zeros, bias, dtype, zero_point)


@_compiled_multiply.register_fake
def _shape_of_product(codes: Tensor, packed: Tensor, scale: Tensor, *rest: object) -> Tensor:
    dtype = next(x for x in rest if isinstance(x, torch.dtype))
    return codes.new_empty(len(codes), len(scale), dtype=dtype)
