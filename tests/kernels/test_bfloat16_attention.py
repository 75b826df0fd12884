"""Float attention in bfloat16 against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant.kernels import pieces
from lightning_quant.kernels.bfloat16_attention import MEASURED, Bfloat16Attention, in_three_steps

SHAPES = [
    ((2, 3, 13, 20), (2, 3, 17, 20)),
    ((1, 3, 13, 8), (2, 3, 13, 8)),
    ((13, 20), (17, 20)),
    ((3, 1, 20), (3, 7, 20)),
]


def operands(queries, keys, dtype=torch.float32, values=24):
    torch.manual_seed(0)
    return (torch.randn(shape).to(dtype) * 2 for shape in (queries, keys, (*keys[:-1], values)))


@pytest.fixture(params=[2**18, 40, 5], ids=["at once", "by heads", "by rows"], autouse=True)
def sizes(request, monkeypatch):
    monkeypatch.setattr(pieces.size_of_piece, "__defaults__", (request.param,))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float", "of samples", "hides a row"])
def test_three_steps_are_attention(shapes, mask):
    q, k, v = operands(*shapes)
    lead, size = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), (q.shape[-2], k.shape[-2])
    if mask is not None:
        mask = {
            "bool": torch.rand(size) < 0.7,
            "float": torch.randn(size),
            "of samples": torch.randn(*lead, *size) if lead else torch.randn(size),
            "hides a row": torch.ones(size, dtype=torch.bool).index_fill(0, torch.tensor(0), False),
        }[mask]
    want = F.scaled_dot_product_attention(q.expand(*lead, -1, -1), k, v, mask, scale=0.3)
    torch.testing.assert_close(in_three_steps(q, k, v, mask, 0.3), want)


def test_the_map_is_rounded_and_no_more():
    q, k, v = operands((2, 3, 50, 32), (2, 3, 60, 32), torch.bfloat16)
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    out = in_three_steps(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("faster", ["fused", "in three steps"])
def test_the_faster_one_answers(faster, monkeypatch):
    attend, (q, k, v) = Bfloat16Attention(), operands((2, 3, 9, 8), (2, 3, 9, 8), torch.bfloat16)
    want = in_three_steps(q, k, v) if faster == "in three steps" else F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(attend, "_measure", lambda seconds, *operands: seconds.update({faster: 0.5}))
    assert torch.equal(attend(q, k, v), want)


def test_lengths_that_change_are_not_measured_each_time():
    attend = Bfloat16Attention()
    for length in range(16, 32):
        attend(*operands((2, 3, length, 8), (2, 3, length, 8), torch.bfloat16))
    assert list(attend._measured.values()) == [MEASURED]


def test_autocast_is_seen():
    attend, (q, k, v) = Bfloat16Attention(), operands((2, 3, 9, 8), (2, 3, 9, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k, v).dtype == torch.bfloat16
    assert len(attend.seconds) == 1


def test_what_it_is_not_for_goes_to_torch():
    attend, (q, k, v) = Bfloat16Attention(), operands((2, 4, 9, 8), (2, 4, 9, 8), torch.bfloat16, values=8)
    for arguments in (
        {"is_causal": True},
        {"attn_mask": torch.zeros(9, 9, dtype=torch.bfloat16), "scale": 0.2, "is_causal": False, "enable_gqa": True},
    ):
        assert torch.equal(attend(q, k, v, **arguments), F.scaled_dot_product_attention(q, k, v, **arguments))
    assert attend(q, k, v, dropout_p=0.5).shape == q.shape
    assert torch.equal(
        attend(q.float(), k.float(), v.float()), F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    )
    q.requires_grad_()
    assert attend(q, k, v).requires_grad
    assert not attend.seconds
