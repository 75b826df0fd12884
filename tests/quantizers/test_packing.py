"""Codes packed without gaps come back as they were."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_quant.quantizers.packing import pack, unpack


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 16))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    values = draw(arrays.arrays(np.int32, shape, elements=st.integers(0, 2**bits - 1)))
    return torch.from_numpy(values), bits


@given(codes_and_bits())
def test_round_trip_and_size(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(codes.numel() * bits / 8)
    back = unpack(packed, bits, tuple(codes.shape))
    assert back.dtype == torch.int32 and torch.equal(back, codes)


@given(codes_and_bits())
def test_the_bytes_are_the_codes_written_one_after_the_other_lowest_bit_first(case):
    codes, bits = case
    number = sum(int(code) << (bits * place) for place, code in enumerate(codes.flatten().tolist()))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(math.ceil(codes.numel() * bits / 8), "little")


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_code_of_every_width(bits):
    codes = torch.arange(2**bits, dtype=torch.int32)
    assert torch.equal(unpack(pack(codes, bits), bits, (2**bits,)), codes)


@given(codes_and_bits())
def test_memory_order_does_not_matter(case):
    codes, bits = case
    turned = codes.movedim(0, -1) if codes.dim() else codes
    assert torch.equal(unpack(pack(turned, bits), bits, tuple(turned.shape)), turned)
    assert torch.equal(pack(turned, bits), pack(turned.contiguous(), bits))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    assert pack(torch.tensor([1, 2, 3, 15], dtype=dtype), 4).tolist() == [33, 243]
