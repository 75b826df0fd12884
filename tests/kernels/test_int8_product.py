"""Products of bytes are exact on whatever CPU this is."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_quant.kernels import int8_product
from lightning_quant.kernels.int8_product import Int8Product, may_saturate

SHAPES = [(1, 1, 1), (3, 7, 5), (17, 64, 33), (200, 192, 70), (0, 16, 8)]  # rows, inputs, outputs


def exact(codes: torch.Tensor, weight: torch.Tensor, zero_point: int) -> torch.Tensor:
    return (codes.long() - zero_point) @ weight.long().T


@pytest.fixture(params=["this CPU", "windowed"])
def any_cpu(request, monkeypatch):
    """The products as they are made here, and as they are made where sums saturate."""
    if request.param == "windowed":
        monkeypatch.setattr(int8_product, "saturates", lambda: True)


@pytest.mark.usefixtures("any_cpu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero_point", [-300, 0, 3, 64, 131, 255, 400])
def test_integers_are_identical(shape, zero_point):
    rows, inputs, outputs = shape
    for spread in (1000, 25):  # all codes, and those that mostly stay inside the window
        codes = (torch.randn(rows, inputs) * spread + zero_point).round().clamp(0, 255).to(torch.uint8)
        weight = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8)
        product = Int8Product(weight, torch.ones(outputs), None, zero_point)
        assert torch.equal(product(codes).long(), exact(codes, weight, zero_point))
        assert torch.equal(product.integers(), weight)


@pytest.mark.usefixtures("any_cpu")
def test_the_worst_sums_are_exact():
    codes, weight = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((8, 64), -128, dtype=torch.int8)
    for sign in (1, -1):
        w = (weight + (sign > 0)) * sign if sign > 0 else weight
        product = Int8Product(w, torch.ones(8), None, 128)
        assert torch.equal(product(codes).long(), exact(codes, w, 128))
        assert torch.equal(product(codes * 0).long(), exact(codes * 0, w, 128))


@pytest.mark.usefixtures("any_cpu")
def test_scale_and_bias_are_applied_once():
    codes, weight = torch.randint(0, 256, (40, 96)).to(torch.uint8), torch.randint(-128, 128, (24, 96))
    scale, bias = torch.rand(24), torch.randn(24)
    out = Int8Product(weight, scale, bias, 120)(codes)
    torch.testing.assert_close(out, (exact(codes, weight, 120) * scale.double() + bias).float(), rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("any_cpu")
def test_weights_may_have_a_zero_point_of_their_own():
    codes, weight = torch.randint(0, 256, (40, 96)).to(torch.uint8), torch.randint(-128, 128, (24, 96))
    offset = torch.randint(-128, 128, (24,), dtype=torch.int32)
    product = Int8Product(weight, torch.ones(24), None, 120, offset)
    wanted = (codes.long() - 120) @ (weight - offset[:, None]).long().T
    torch.testing.assert_close(product(codes), wanted.float(), rtol=1e-6, atol=2)  # sums of millions, in float32


def test_a_later_batch_may_leave_the_window_elsewhere(monkeypatch):
    monkeypatch.setattr(int8_product, "saturates", lambda: True)
    weight = torch.randint(-128, 128, (16, 32)).to(torch.int8)
    product = Int8Product(weight, torch.ones(16), None, 128)
    for channel in (3, 30, 4):
        codes = torch.full((5, 32), 128, dtype=torch.uint8)
        codes[2, channel] = 255
        assert torch.equal(product(codes).long(), exact(codes, weight, 128))
    assert sorted(product._state[1].tolist()) == [3, 4, 30]


def test_threads_share_a_product(monkeypatch):
    monkeypatch.setattr(int8_product, "saturates", lambda: True)
    weight = torch.randint(-128, 128, (64, 128)).to(torch.int8)
    product = Int8Product(weight, torch.ones(64), None, 128)
    batches = [(torch.randn(50, 128) * (10 + i) + 128).round().clamp(0, 255).to(torch.uint8) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(product, batches))
    assert all(torch.equal(out.long(), exact(codes, weight, 128)) for out, codes in zip(outs, batches, strict=True))


def test_copies_and_pickles_multiply_the_same():
    weight, codes = torch.randint(-128, 128, (16, 32)).to(torch.int8), torch.randint(0, 256, (5, 32)).to(torch.uint8)
    product = Int8Product(weight, torch.rand(16), torch.randn(16), 99)
    out = product(codes)
    assert torch.equal(copy.deepcopy(product)(codes), out)
    assert torch.equal(pickle.loads(pickle.dumps(product))(codes), out)


def test_seven_bits_never_saturate(monkeypatch):
    monkeypatch.setattr(int8_product, "saturates", lambda: True)
    assert may_saturate(8, 8) and not may_saturate(7, 8) and not may_saturate(8, 7)
    codes, weight = torch.full((2, 64), 127, dtype=torch.uint8), torch.full((8, 64), 127, dtype=torch.int8)
    product = Int8Product(weight, torch.ones(8), None, 0, input_bits=7)
    assert not product.windowed
    assert torch.equal(product(codes).long(), exact(codes, weight, 0))
