"""Paired inputs come out nearer to each other, and nothing else changes about GPTQ."""

import pytest
import torch

from lightning_quant import GPTQ, FairGPTQ
from lightning_quant.callbacks.fair_gptq import PairHessian
from lightning_quant.solvers import against_differences
from tests.callbacks.test_gptq import W3, codes, validated
from tests.models import Sequences


class Pairs(Sequences):
    """Each second sequence is the one before it, but for one direction."""

    def __init__(self, batch_size=8):
        super().__init__(batch_size=batch_size, shuffle=False)
        x = self.train.tensors[0]
        generator = torch.Generator().manual_seed(1)
        direction, sizes = torch.randn(16, generator=generator), torch.randn(len(x) // 2, 5, 1, generator=generator)
        x[1::2] = x[0::2] + sizes * direction


def operands():
    generator = torch.Generator().manual_seed(0)
    weight, x, difference = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                             for shape in ((6, 9), (80, 9), (20, 9)))  # fmt: skip
    return weight, x, difference


def test_the_shift_is_where_the_gradient_vanishes():
    weight, x, difference = operands()
    found = against_differences(weight, x.T @ x, 0.3 * difference.T @ difference).requires_grad_()
    loss = ((weight - found) @ x.T).square().sum() + 0.3 * (found @ difference.T).square().sum()
    assert torch.autograd.grad(loss, found)[0].abs().max() < 1e-8 * loss.detach() + 1e-9


def test_more_alpha_brings_pairs_together_and_costs_more():
    weight, x, difference = operands()
    found = [against_differences(weight, x.T @ x, a * difference.T @ difference) for a in (0.0, 0.1, 1.0, 10.0)]
    apart = [float((w @ difference.T).norm()) for w in found]
    moved = [float(((w - weight) @ x.T).norm()) for w in found]
    assert apart == sorted(apart, reverse=True) and len(set(apart)) == 4 and moved == sorted(moved)
    assert torch.allclose(found[0], weight)


def test_the_differences_are_of_neighbours():
    x = torch.randn(6, 5, 3)
    hessian = PairHessian(3)
    for batch in x.split(2):
        hessian.add(batch)
    rows = (x[0::2] - x[1::2]).flatten(0, 1).double()
    torch.testing.assert_close(hessian.pairs.matrix(), 2 * rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_without_alpha_it_is_gptq_bit_for_bit():
    plain, fair = (validated(callback, data=Pairs()) for callback in (GPTQ(**W3), FairGPTQ(**W3, alpha=0.0)))
    assert all(map(torch.equal, codes(plain).values(), codes(fair).values()))


@pytest.mark.parametrize("in_loop", [False, True])
def test_output_projections_are_shifted_and_pairs_come_out_nearer(in_loop):
    callback = FairGPTQ(**W3, alpha=10.0, pairs_in_loop=in_loop)
    fair, plain = validated(callback, data=Pairs()), codes(validated(GPTQ(**W3), data=Pairs()))
    assert callback.debiased == {f"blocks.{i}.{name}" for i in range(2) for name in ("proj", "fc2")}
    assert all(0 < callback.solved[name]["difference"] < 0.9 for name in callback.debiased)
    assert torch.equal(codes(fair)["blocks.0.qkv"], plain["blocks.0.qkv"])
    assert not torch.equal(codes(fair)["blocks.0.proj"], plain["blocks.0.proj"])


def test_depth_chooses_blocks():
    for depth, blocks in (("lowest", {"0"}), ("highest", {"1"}), ("ends", {"0", "1"})):
        callback = FairGPTQ(**W3, depth=depth)
        validated(callback, data=Pairs())
        assert {name.split(".")[1] for name in callback.debiased} == blocks


def test_samples_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"`blocks\.0\.proj` reads \(7, 5, 16\), which are no pairs"):
        validated(FairGPTQ(**W3), data=Pairs(batch_size=7))


def test_patterns_that_name_nothing_are_refused():
    with pytest.raises(ValueError, match="names no layer of these blocks"):
        validated(FairGPTQ(**W3, debias=["nothing"]), data=Pairs())
    with pytest.raises(ValueError, match="alpha=-1"):
        FairGPTQ(alpha=-1)
    with pytest.raises(ValueError, match="depth='deep'"):
        FairGPTQ(depth="deep")
