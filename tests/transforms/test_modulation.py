"""A fold goes into the layer that modulates the norm, where the norm has no affine of its own."""

import torch

from lightning_quant.graph import trace
from lightning_quant.transforms import fold_pair
from tests.graph.test_trace import Modulated


def test_a_modulated_norm_folds_into_the_layer_that_modulates_it():

    net = Modulated().double()
    x, c = torch.randn(2, 5, 8).double(), torch.randn(2, 8).double()
    want = net(x, c)
    for pair in trace(net, lambda: net(x, c)).pairs:
        readers = [net.get_submodule(name) for name in pair.linears]
        scale, shift = torch.rand(8).double() + 0.5, torch.randn(8).double()
        seen = []
        handle = readers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        net(x, c)
        fold_pair(net.modulation, readers, scale, shift, pair.modulation)
        net(x, c)
        handle.remove()
        assert torch.allclose(seen[1], (seen[0] + shift) / scale, atol=1e-9)
    assert torch.allclose(net(x, c), want, atol=1e-9)
