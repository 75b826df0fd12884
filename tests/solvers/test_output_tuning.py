"""BatchNorm statistics that a layer makes up for, and biases that learn."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant.layers import Plan, as_float, quantize_layer
from lightning_quant.layers.plan import LayerPlan
from lightning_quant.quantizers import Scheme
from lightning_quant.solvers import Statistics, absorb_statistics, learn_biases, measure_statistics, output_distance


def quantized(layer, weights="int4_asym_channel"):
    layer = quantize_layer(layer, Scheme.parse(weights), None)
    layer.weight_quantizer.fit(layer.weight_rows(), "minmax")
    layer.set_quantizer("bias_quantizer", Scheme.parse("int16_sym_tensor"), axis=0)
    layer.settle_bias(layer.float_bias())
    return layer.eval()


def test_statistics_are_those_of_what_comes_in_and_norms_stay_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    net[1].running_mean += 5
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(8, 2, 6, 6)
    found = measure_statistics({"1": net[1], "3": net[3]}, lambda: [net(part) for part in x.split(4)])
    between = net[0](x)
    torch.testing.assert_close(found["1"].mean, between.mean((0, 2, 3)))
    halves = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in between.split(4)])
    torch.testing.assert_close(found["1"].variance, halves.mean(0))
    normalised = torch.cat([F.batch_norm(part, None, None, training=True) for part in between.split(4)])
    torch.testing.assert_close(found["3"].mean, normalised.relu().mean((0, 2, 3)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net[1].training and net[1].momentum == 0.1


@pytest.mark.parametrize("weights", ["int4_asym_channel", "int8_sym_channel", "int4_sym_g2", "int8_sym_tensor"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_layer_makes_up_for_other_statistics(weights, share):
    torch.manual_seed(0)
    layer, norm = quantized(nn.Conv2d(4, 3, 1, bias=weights == "int8_sym_channel"), weights), nn.BatchNorm2d(3).eval()
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.5
    x, codes = torch.randn(2, 4, 5, 5), layer.weight_quantizer.encode(layer.weight_rows().detach())
    found = Statistics(torch.randn(3), torch.rand(3) + 0.5)
    mean, variance = (
        torch.lerp(a, b, share) for a, b in zip((norm.running_mean, norm.running_var), found, strict=True)
    )
    wanted = F.batch_norm(layer(x), mean, variance, norm.weight, norm.bias, eps=norm.eps)
    if weights == "int8_sym_tensor":
        with pytest.raises(ValueError, match="one scale for all channels"):
            absorb_statistics(layer, norm, found, share)
        return
    absorb_statistics(layer, norm, found, share)
    torch.testing.assert_close(norm(layer(x)), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer.weight_quantizer.codes.int(), codes)


def classifier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    for layer in (net[0], net[2]):
        quantized(layer, "int3_sym_channel")
    return net.eval()


def test_only_biases_learn_and_the_distance_falls():
    net, x = classifier(), torch.randn(64, 8) + 3  # errors of weights add up to a shift
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad(), as_float(net):
        exact = net(x)
    started, ended = learn_biases(net, {"0": net[0], "2": net[2]}, x.split(16), net, steps=100, learning_rate=1.0)
    assert ended < 0.8 * started
    with torch.no_grad():
        assert float(output_distance(net(x), exact)) == pytest.approx(ended, rel=1e-4)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("bias_quantizer" in name for name in changed)
    with torch.no_grad(), as_float(net):
        assert torch.equal(net(x), exact)


def test_biases_that_do_not_help_are_not_taken():
    net, x = classifier(), torch.randn(64, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    started, ended = learn_biases(net, {"0": net[0]}, [x], net, steps=3, learning_rate=1e6)
    assert started == ended
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_the_bias_is_part_of_the_plan():
    net = nn.Sequential(nn.Linear(4, 2, bias=False))
    plan = Plan("Demo", {}, layers={"0": LayerPlan("int8_sym_channel", None, biases="int16_sym_tensor")})
    plan.apply(net)
    assert "0.bias_quantizer" in plan.quantizers(net)
    net[0].weight_quantizer.fit(net[0].weight)
    net[0].settle_bias(torch.tensor([1.0, -2.0]))
    x, other = torch.randn(3, 4), nn.Sequential(nn.Linear(4, 2, bias=False))
    torch.testing.assert_close(
        net(x) - x @ net[0].quantized().T, torch.tensor([[1.0, -2.0]]).expand(3, 2), rtol=0, atol=1e-4
    )
    Plan.from_dict(plan.to_dict()).apply(other)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    plan.undo(net)
    assert type(net[0]) is nn.Linear and net[0].bias is None and not hasattr(net[0], "bias_quantizer")
