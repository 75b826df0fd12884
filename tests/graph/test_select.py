"""Which layers are chosen, and what is refused by name."""

import pytest
import torch
from torch import nn

from lightning_quant.graph import matching, select, trace
from lightning_quant.layers import quantize_layer
from lightning_quant.quantizers import Scheme


class OwnLinear(nn.Linear):
    """Not exactly an nn.Linear."""


def model():
    net = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), OwnLinear(4, 4)),
            "head": nn.Linear(4, 2),
            "teacher": nn.Linear(4, 4),
        }
    )
    graph = trace(net, lambda: net["head"](net["body"](torch.ones(1, 4))))
    return net, graph


def test_layers_of_known_type_in_call_order():
    net, graph = model()
    chosen = select(net, graph)
    assert chosen.layers == [
        "body.0",
        "head",
        "teacher",
    ]  # the teacher is given back when calibration has not reached it
    assert "OwnLinear" in chosen.skipped["body.2"]


def test_target_and_skip():
    net, graph = model()
    assert select(net, graph, target="body").layers == ["body.0"]
    assert select(net, graph, skip=["head"]).layers == ["body.0", "teacher"]
    assert select(net, graph, skip=["head"]).skipped["head"] == "skip='head'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": ["heat"]}, r"skip: the pattern 'heat' matches no layer .*'head'"),
        ({"target": "bdy"}, r"target: .*'body"),
        ({"target": "body.1"}, "nothing to quantize"),
        ({"skip": ["*"]}, "nothing to quantize"),
    ],
)
def test_refusals(arguments, message):
    net, graph = model()
    with pytest.raises(ValueError, match=message):
        select(net, graph, **arguments)


def test_a_parametrized_layer_is_refused_by_name_unless_it_does_not_run_or_is_skipped():
    net, graph = model()
    nn.utils.parametrizations.weight_norm(net["teacher"])
    assert "parametrized" in select(net, graph).skipped["teacher"]
    nn.utils.parametrizations.weight_norm(net["head"])
    with pytest.raises(ValueError, match=r"`head` cannot be quantized: its weight is parametrized.*skip=\['head'\]"):
        select(net, graph)
    assert select(net, graph, skip=["head"]).layers == ["body.0"]


def test_an_instance_forward_is_refused_by_name():
    net, graph = model()
    net["head"].forward = lambda x: x
    with pytest.raises(ValueError, match="`head` cannot be quantized: it has a forward of its own"):
        select(net, graph)


def test_quantized_already():
    net, graph = model()
    quantize_layer(net["head"], Scheme.parse("int8_sym_channel"), None)
    with pytest.raises(ValueError, match=r"`head` is quantized already.*remove"):
        select(net, graph)
    assert select(net, graph, target="body").layers == ["body.0"]


def test_matching_names_the_nearest():
    with pytest.raises(ValueError, match=r"overrides: the pattern 'block\.0'.*'blocks\.0\.fc'"):
        matching(["blocks.0.fc", "head"], "block.0", "overrides")
