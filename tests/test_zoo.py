"""Any model: the zoo of the benchmarks, quantized by one callback with no argument for any of them."""

import pytest
import torch
from torch import nn

from benchmarks.macs import MacCounter, on_a_grid
from benchmarks.zoo import quantize
from benchmarks.zoo_models import ZOO
from benchmarks.zoo_page import GOOD_SHARE, GOOD_SQNR

# A few seconds each, and every kind of door: fused and spelled out attention, weights read by a function, torch's own
# encoder, tied and shared layers, layers that never run.
FAST = {"MobileNetV4", "BEiT", "BERT", "GPT-2", "T5", "SD3", "nn.TransformerEncoder", "keyword-only", "GAN"}
# Where the noise comes from is in docs/models.md, tensor by tensor.
LOWER = {"DeiT": 15.0, "EfficientNet-B0": 3.0}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.evidence) for name in ZOO]
)
def test_one_callback_quantizes(name):
    for library in {ZOO[name].library} & {"timm", "transformers", "diffusers"}:
        pytest.importorskip(library)
    result = quantize(name, ZOO[name])
    assert not result.error
    assert result.share >= GOOD_SHARE, result.remark()
    assert result.sqnr >= LOWER.get(name, GOOD_SQNR)
    assert set(result.float_layers) <= set(result.skipped), "a float layer has no reason"


def test_the_counter_counts_each_product_once_whatever_way_it_takes():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, groups=1), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(2), nn.Linear(25, 7)
    )
    attention = nn.MultiheadAttention(7, 1)
    with MacCounter(net).counting() as counter:
        x = net(torch.randn(2, 3, 9, 9))  # (2, 8, 4, 4), (2, 4, 5, 5), (2, 4, 25), (2, 4, 7)
    assert [product.macs for product in counter.products] == [2 * 16 * 8 * 27, 2 * 16 * 8 * 4 * 4, 2 * 4 * 25 * 7]
    assert [product.module for product in counter.products] == ["0", "1", "3"]
    with MacCounter(attention).counting() as counter:
        attention(x, x, x)
    assert counter.macs(attention=False) == 4 * 2 * 4 * 7 * 7
    assert counter.macs(attention=True) == 2 * 4 * 2 * 2 * 7  # length 2, batch 4


def test_a_strided_input_makes_a_linear_layer_no_attention():
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(4, 6, 5).transpose(0, 1)
    with MacCounter(layer).counting() as counter:
        layer(x)
    assert counter.macs(attention=False) == 4 * 6 * 5 * 3 and counter.macs(attention=True) == 0


@pytest.mark.parametrize("levels", [15, 255])
def test_numbers_tell_whether_they_were_rounded(levels):
    step = torch.tensor([[0.013], [0.7]])
    rounded = step * torch.randint(-levels, levels + 1, (2, 300))
    assert on_a_grid(rounded)
    assert not on_a_grid(torch.randn(2, 300))
    assert not on_a_grid(step * torch.randint(-3 * levels * 255, 3 * levels * 255, (2, 300)))
    assert not on_a_grid(torch.cat([rounded, torch.randn(1, 300)])), "one float row is enough"


def test_a_layer_that_is_not_quantized_shows():
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    x = torch.randn(9, 40)
    with torch.no_grad():
        net[0].weight.copy_((net[0].weight * 500).round() / 500)
    with MacCounter(net).counting() as counter:
        net((x * 30).round() / 30)
    assert counter.float_layers() == {"1": 9 * 40 * 40}
    assert counter.macs(attention=False, quantized=True) == 9 * 40 * 40
