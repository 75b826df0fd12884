"""One forward tells the structure of a model."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant.graph import NormPair, trace


class Block(nn.Module):
    """A pre-norm block with separate q, k, v layers that all read one norm."""

    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        return x + self.mlp(self.norm2(x))


def graph_of(net, *inputs):
    return trace(net, lambda: net(*inputs))


def test_deit():
    net = timm.create_model("deit_tiny_patch16_224", depth=3).eval()
    graph = graph_of(net, torch.randn(1, 3, 224, 224))
    assert graph.blocks == ["blocks.0", "blocks.1", "blocks.2"]
    assert graph.attention == {f"blocks.{i}.attn": 1 for i in range(3)}
    want = {NormPair(f"blocks.{i}.norm1", (f"blocks.{i}.attn.qkv",)) for i in range(3)}
    want |= {NormPair(f"blocks.{i}.norm2", (f"blocks.{i}.mlp.fc1",)) for i in range(3)}
    assert set(graph.pairs) == want | {NormPair("norm", ("head",))}
    assert graph.order.index("patch_embed.proj") < graph.order.index("blocks.0.attn.qkv") < graph.order.index("head")


def test_several_readers_of_one_norm():
    graph = graph_of(Block(), torch.randn(2, 5, 8))
    assert graph.pairs == [NormPair("norm", ("q", "k", "v")), NormPair("norm2", ("mlp.0",))]


def test_tracing_leaves_nothing_behind():
    net = Block()
    x = torch.randn(2, 5, 8)
    want = net(x)
    graph_of(net, x)
    assert torch.equal(net(x), want)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError):
        graph_of(net, torch.randn(2, 5, 9))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def lambda_net(body, **layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, x):
            return body(self, x)

    return Net()


def post_norm(m, x):
    h = m.norm(x)
    return h + m.fc(h)


def returned(m, x):
    h = m.norm(x)
    return {"hidden": [h], "out": m.fc(h)}


def transposed(m, x):
    return m.fc(m.norm(x).transpose(1, 2))


def mixed(m, x):
    return m.fc(m.norm(x).reshape(2, 4, 16)[..., :8])


def in_place(m, x):
    h = m.norm(x)
    h += 1
    return m.fc(h)


def shared_linear(m, x):
    return m.fc(m.norm(x)) + m.fc(x)


def functional_reader(m, x):
    h = m.norm(x)
    return m.fc(h) + F.linear(h, torch.ones(8, 8))


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (post_norm, "add"),
        (returned, "output of the model"),
        (transposed, "transpose"),
        (mixed, "reshape"),
        (in_place, "add_"),
        (shared_linear, "something else"),
        (functional_reader, "belongs to no layer"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_not_foldable_and_why(forward, why):
    net = lambda_net(forward, norm=nn.LayerNorm(8), fc=nn.Linear(8, 8))
    graph = graph_of(net, torch.randn(2, 8, 8))
    assert graph.pairs == [] and why in graph.unfoldable["norm"]


def views(m, x):
    h = m.norm(x).reshape(4, 4, 8).permute(1, 0, 2)[1:, None].contiguous()
    h = F.dropout(h.roll(1, 0), 0.5, training=False).flatten(0, 1)
    return m.fc(h[:, 0]) + m.fc2(h.chunk(3, 0)[0][:, -1])


def test_views_that_keep_channels_are_followed():
    net = lambda_net(views, norm=nn.LayerNorm(8), fc=nn.Linear(8, 8), fc2=nn.Linear(8, 8))
    graph = graph_of(net, torch.randn(2, 8, 8))
    assert graph.pairs == [NormPair("norm", ("fc", "fc2"))], graph.unfoldable


def test_shared_weights_are_not_foldable():
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    net[3].weight = net[1].weight
    graph = graph_of(net, torch.randn(2, 8))
    assert graph.pairs == [] and "shares its weight" in graph.unfoldable["0"]


def test_a_norm_without_affine_is_no_pair():
    net = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8))
    assert graph_of(net, torch.randn(2, 8)).pairs == []


def test_what_does_not_run_is_not_in_the_order():
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)})
    assert trace(net, lambda: net["used"](torch.ones(1, 2))).order == ["used"]


def test_several_attention_calls_in_one_forward():
    net = lambda_net(lambda m, x: F.scaled_dot_product_attention(x, x, F.scaled_dot_product_attention(x, x, x)))
    assert graph_of(net, torch.randn(1, 4, 8)).attention == {"": 2}
