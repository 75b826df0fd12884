"""Which layer a BatchNorm alone reads."""

import pytest
import torch
from torch import nn

from lightning_quant.graph import trace


class Net(nn.Module):
    """A convolution, a BatchNorm, and whatever else is done with what lies between them."""

    def __init__(self, between=lambda x, net: net.norm(x)):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.between = between

    def forward(self, x):
        return self.between(self.conv(x), self)


def found(net):
    return trace(net.eval(), lambda: net(torch.randn(2, 2, 4, 4))).batch_norms


def test_a_norm_behind_a_layer_is_found():
    assert found(Net()) == {"norm": "conv"}
    linear = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert trace(linear.eval(), lambda: linear(torch.randn(4, 2))).batch_norms == {"1": "0"}


@pytest.mark.parametrize(
    "between",
    [
        lambda x, net: net.norm(x) + x,
        lambda x, net: net.norm(x) + net.other(x),
        lambda x, net: (net.norm(x), x),
        lambda x, net: net.norm(net.conv(x[:, :2])),
        lambda x, net: net.norm(x.relu()),
    ],
    ids=["added", "two norms", "returned", "called twice", "something between"],
)
def test_a_layer_that_others_read_is_not(between):
    assert found(Net(between)) == {}
