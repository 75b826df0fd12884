"""The Triton kernels of products by Triton's interpreter: the arithmetic, not the speed."""

from dataclasses import dataclass

import pytest
import torch

from lightning_quant.kernels.cuda.nibbles import to_nibbles
from lightning_quant.kernels.cuda.operands import (
    Activation,
    Grid,
    Int4Weight,
    Int8Inputs,
    Int8Weight,
    naive_int4,
    naive_int8,
    naive_integers,
    steps_of,
)
from tests.kernels.interpreter import interpreted

CUDA = "lightning_quant.kernels.cuda"
PRECISION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def kernels():
    with interpreted(f"{CUDA}.int8_triton", f"{CUDA}.int4_triton", f"{CUDA}.tiles") as modules:
        yield modules


# ---------------------------------------------------------------- W8A8


@dataclass(frozen=True)
class Int8Case:
    name: str
    rows: int = 3
    inputs: int = 41
    outputs: int = 18
    grid: Grid = "symmetric"
    zero: int | None = None  # of a scale that is known before
    scale: float = 0.05
    bits: int = 8
    shifted: bool = False
    bias: bool = True
    fused: bool | None = None
    activation: Activation = "none"
    dtype: torch.dtype = torch.float32
    wide: bool = False

    def __str__(self) -> str:
        return self.name

    def operands(self):
        x = torch.randn(self.rows, self.inputs) * 2 + 0.7
        x[:1] = 0  # a token without a range
        x = x if self.grid != "unsigned" else x.abs()
        codes = torch.randint(-128, 128, (self.outputs, self.inputs))
        offset = torch.randint(-128, 128, (self.outputs,)) if self.shifted else torch.zeros(self.outputs)
        totals = (codes - offset[:, None]).sum(1).to(torch.int32)
        offset = offset.to(torch.int32) if self.shifted else None
        bias = torch.randn(self.outputs) if self.bias else None
        weight = Int8Weight(codes.to(torch.int8), torch.rand(self.outputs) * 0.01, totals, offset, bias)
        scale = None if self.zero is None else torch.tensor(self.scale)
        zero = None if self.zero is None else torch.tensor(self.zero, dtype=torch.int32)
        return x.to(self.dtype), weight, Int8Inputs(self.bits, self.grid, scale, zero, self.wide)


INT8 = [
    Int8Case("tokens"),
    Int8Case("tokens with zero points, both operands", grid="asymmetric", shifted=True, dtype=torch.bfloat16),
    Int8Case("tokens that are never negative", grid="unsigned", bias=False, dtype=torch.float16),
    Int8Case("tokens of few bits", grid="asymmetric", bits=4, activation="silu"),
    Int8Case("a known scale", zero=0, shifted=True),
    Int8Case("a known scale and zero point", grid="asymmetric", zero=-23, activation="relu"),
    Int8Case("codes first, of tokens", rows=17, grid="asymmetric", shifted=True, activation="gelu"),
    Int8Case("codes first, of a known scale", grid="asymmetric", rows=4, zero=90, shifted=True, fused=False),
    Int8Case("many rows, rounded in the product", rows=33, inputs=9, grid="asymmetric", shifted=True, fused=True),
    Int8Case("one row, one tile", rows=1, inputs=32, outputs=16),
    Int8Case("one number", rows=1, inputs=1, outputs=1, grid="asymmetric", shifted=True),
    Int8Case("several tiles each way", rows=19, inputs=65, outputs=35, fused=True, zero=1),
]


@pytest.mark.parametrize("case", INT8, ids=str)
def test_integers_are_identical_and_scaled_once(case: Int8Case, kernels):
    x, weight, inputs = case.operands()
    steps, _ = steps_of(x, inputs)
    integers = kernels[0].multiply(x, weight, inputs, torch.int32, fused=case.fused)
    assert torch.equal(integers.long(), naive_integers(steps, weight))
    out = kernels[0].multiply(x, weight, inputs, case.dtype, case.activation, case.fused)
    assert out.dtype == case.dtype
    near = PRECISION[case.dtype]
    torch.testing.assert_close(out.double(), naive_int8(x, weight, inputs, case.activation), rtol=near, atol=near)


@pytest.mark.parametrize("shifted", [False, True])
def test_sums_beyond_32_bits_are_exact_once_zero_points_are_taken_out(shifted, kernels):
    """A range far from 0 has a large zero point, so that what is left of the sums does not fit."""
    case = Int8Case("far from 0", rows=2, inputs=300, outputs=5, zero=-(2**20), scale=0.001, wide=True, shifted=shifted)
    x, weight, inputs = case.operands()
    x += 1048
    want = naive_integers(steps_of(x, inputs)[0], weight)
    assert want.abs().max() > 2**31
    assert torch.equal(kernels[0].multiply(x, weight, inputs, torch.int64), want)


def test_ties_go_to_the_even_integer(kernels):
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 300.0, -300.0]])
    weight = Int8Weight(torch.eye(9, dtype=torch.int8), torch.ones(9), torch.ones(9, dtype=torch.int32))
    inputs = Int8Inputs(8, "symmetric", torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
    for fused in (True, False):
        out = kernels[0].multiply(x, weight, inputs, torch.int32, fused=fused)
        assert out.tolist() == [[-2, -2, 0, 0, 2, 2, 126, 127, -128]]


def test_rows_may_lie_apart_and_there_may_be_none(kernels):
    case = Int8Case("strided", grid="asymmetric", shifted=True)
    x, weight, inputs = case.operands()
    apart = torch.cat([x, x], 1)[:, : case.inputs]
    across = x.t().contiguous().t()
    for fused in (True, False):
        want = kernels[0].multiply(x, weight, inputs, torch.float32, fused=fused)
        assert torch.equal(kernels[0].multiply(apart, weight, inputs, torch.float32, fused=fused), want)
    assert torch.equal(kernels[0].multiply(across, weight, inputs, torch.float32, fused=False), want)
    assert kernels[0].multiply(x[:0], weight, inputs, torch.bfloat16).shape == (0, case.outputs)


@pytest.mark.parametrize("fused", [True, False])
def test_tiles_as_large_as_on_a_gpu(fused, kernels, monkeypatch):
    for decode in (True, False):
        chosen = (kernels[0].DECODE if decode else kernels[0].PREFILL)[0].kwargs
        for name, size in chosen.items():
            monkeypatch.setitem(kernels[2].SMALL, name, size)
        x, weight, inputs = Int8Case(
            "large", rows=70, inputs=300, outputs=40, grid="asymmetric", shifted=True
        ).operands()
        x = x[:5] if decode else x
        want = naive_integers(steps_of(x, inputs)[0], weight)
        assert torch.equal(kernels[0].multiply(x, weight, inputs, torch.int32, fused=fused).long(), want)


# ---------------------------------------------------------------- W4A16


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group", "zeros", "bias", "activation", "dtype"),
    [
        (1, 64, 16, 32, True, True, "none", torch.float32),  # decoding
        (3, 41, 5, 32, True, False, "silu", torch.float16),  # the last group is shorter
        (17, 96, 18, 64, False, True, "gelu", torch.float32),  # many rows; the last group is shorter
        (2, 100, 7, 256, True, True, "relu", torch.float32),  # one group, which is not full
        (5, 130, 35, 128, True, True, "none", torch.float16),
        (2, 300, 17, 128, True, True, "none", torch.float32),
        (1, 1, 1, 96, False, False, "none", torch.float32),
        (0, 32, 4, 32, False, True, "none", torch.float32),
    ],
)
def test_int4_equals_the_definition(rows, inputs, outputs, group, zeros, bias, activation, dtype, kernels, monkeypatch):
    """The interpreter does not multiply bfloat16."""
    monkeypatch.setitem(kernels[2].SMALL, "DEPTH", kernels[1].configs(group, decode=True)[0].kwargs["DEPTH"])
    groups = -(-inputs // group)
    weight = Int4Weight(
        to_nibbles(torch.randint(0, 16, (outputs, inputs))),
        torch.rand(groups, outputs) * 0.1,
        torch.randint(-3, 18, (groups, outputs)).to(torch.int8) if zeros else 8,
        inputs,
        group,
        torch.randn(outputs) if bias else None,
    )
    x = torch.randn(rows, inputs).to(dtype)
    out = kernels[1].multiply(x, weight, activation)
    assert out.dtype == dtype
    near = PRECISION[dtype]
    torch.testing.assert_close(out.double(), naive_int4(x, weight, activation), rtol=near, atol=near)
    if rows:
        padded = torch.cat([x, x], 1)[:, :inputs]
        assert torch.equal(kernels[1].multiply(padded, weight, activation), out)
