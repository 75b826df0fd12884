"""What the producers say of a small net, against formulas by hand; and relevance, which is conserved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant.quantizers import RangeRule, UniformQuantizer
from lightning_quant.solvers.products import Slot
from lightning_quant.solvers.relevance import relevance_rules
from lightning_quant.solvers.sensitivity import PRODUCERS, narrowed, sensitivities
from tests.models import Block


class Rounded(nn.Module):
    """A linear layer with a quantizer for its input and one for its weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4).requires_grad_(False)
        self.x, self.w = UniformQuantizer("int8_asym_tensor"), UniformQuantizer("int8_sym_channel", axis=0)
        self.x.freeze(torch.tensor(-3.0), torch.tensor(3.0))
        self.w.fit(self.layer.weight)

    def forward(self, x):
        return F.linear(self.x(x), self.w(self.layer.weight), self.layer.bias)


INPUTS, WEIGHTS = Slot("layer", "inputs"), Slot("layer", "weights")


def setting(samples=8, bits=(2, 4)):
    net, x = Rounded(), torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    quantizers = {INPUTS: [net.x], WEIGHTS: [net.w]}
    others, shapes = narrowed(quantizers, dict.fromkeys(quantizers, bits), RangeRule.parse("minmax"), lambda: net(x))
    assert shapes == {INPUTS: [(samples, 6)], WEIGHTS: [(4, 6)]}
    return net, x, quantizers, others


def test_narrower_quantizers_are_fitted_to_what_was_met():
    _, x, _, others = setting()
    by_hand = UniformQuantizer("int2_asym_tensor")
    by_hand.fit(x)
    assert torch.equal(others[INPUTS][2][0].scale, by_hand.scale) and others[WEIGHTS][4][0].scale.shape == (4,)


def test_the_hessian_is_the_squared_error_at_the_output():
    """Of a linear model exactly, in the mean over random signs."""
    net, x, quantizers, others = setting()
    error = others[INPUTS][2][0](x) - x
    exact = (error @ net.layer.weight.T).square().sum(1).mean()
    tables = [sensitivities("hessian", quantizers, others, [x], net, seed) for seed in range(400)]
    found = sum(table[INPUTS][2] for table in tables) / len(tables)
    assert found == pytest.approx(float(exact), rel=0.1)


def test_the_diagonal_leaves_out_what_errors_have_in_common():
    net, x, quantizers, others = setting()
    error = others[INPUTS][2][0](x) - x
    exact = (error.square() @ net.layer.weight.T.square()).sum(1).mean()
    tables = [sensitivities("patch", quantizers, others, [x], net, seed) for seed in range(400)]
    assert sum(table[INPUTS][2] for table in tables) / len(tables) == pytest.approx(float(exact), rel=0.1)


def test_noise_to_signal_needs_no_gradient():
    net, x, quantizers, others = setting(samples=3)
    with torch.no_grad():
        table = sensitivities("snr", quantizers, others, [x], lambda batch: net(batch).argmax(-1))
    error = others[INPUTS][4][0](x) - x
    assert table[INPUTS][4] == pytest.approx(float(error.square().sum() / x.square().sum()) / 3)


@pytest.mark.parametrize("producer", PRODUCERS)
def test_more_bits_never_lose_more_and_nothing_stays_behind(producer):
    net, x, quantizers, others = setting(bits=(2, 4, 8))
    want = net(x)
    table = sensitivities(producer, quantizers, others, [x], net)
    for losses in table.values():
        assert losses[2] > losses[4] > losses[8] > 0
    assert net.x.observer is None and net.w.observer is None and torch.equal(net(x), want)


def test_an_output_without_gradients_is_refused():
    net, x, quantizers, others = setting()
    with pytest.raises(ValueError, match="sensitivity='hessian' needs gradients"):
        sensitivities("hessian", quantizers, others, [x], lambda batch: net(batch).argmax(-1))
    assert net.x.observer is None


# ---------------------------------------------------------------- relevance


def test_relevance_is_conserved_in_an_mlp():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3))
    layers.requires_grad_(False)
    seen = {"x": torch.randn(4, 7, requires_grad=True)}

    def run():
        x = seen["x"]
        for index, layer in enumerate(layers):
            x = seen[str(index)] = layer(x)
        return x

    with relevance_rules():
        out = run()
    for x in seen.values():
        x.retain_grad()
    out.backward(torch.zeros_like(out).scatter_(-1, out.argmax(-1, keepdim=True), 1.0))
    sums = {name: float(x.grad.sum()) for name, x in seen.items()}
    assert all(total == pytest.approx(4.0, rel=0.01) for total in sums.values()), sums


def test_relevance_is_conserved_in_an_attention_block():
    torch.manual_seed(0)
    block = Block().requires_grad_(False).eval()
    x = torch.randn(3, 5, 16, requires_grad=True)
    heads = nn.Linear(16, 3).requires_grad_(False)
    with relevance_rules():
        q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        maps = (q @ k.transpose(-2, -1) * q.size(-1) ** -0.5).softmax(-1)
        y = x + block.proj((maps @ v).transpose(1, 2).flatten(2))
        y = y + block.fc2(F.gelu(block.fc1(block.norm2(y))))
        out = heads(y.mean(1))
    out.backward(torch.zeros_like(out).scatter_(-1, out.argmax(-1, keepdim=True), 1.0))
    assert float(x.grad.sum()) == pytest.approx(3.0, rel=0.01) and bool((x.grad >= 0).all())


def test_a_sum_shares_by_size_and_a_product_by_halves():
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    with relevance_rules():
        total = a + b
    total.backward(torch.ones(1))
    assert a.grad.item() == 0.75 and b.grad.item() == 0.25
    a, b = torch.rand(2, 3, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    with relevance_rules():
        product = a @ b
    product.backward(torch.ones(2, 2))
    assert float(a.grad.sum()) == pytest.approx(2.0) and float(b.grad.sum()) == pytest.approx(2.0)
