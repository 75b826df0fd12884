"""One forward tells the structure of a model."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant.graph import AttentionCalls, Modulation, NormPair, Rows, trace


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
    assert graph.attention == {f"blocks.{i}.attn": AttentionCalls(1) for i in range(3)}
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
    assert graph_of(net, torch.randn(1, 4, 8)).attention == {"": AttentionCalls(2)}


class Spelled(nn.Module):
    """Attention spelled out, with a scale, a mask, a softmax module and dropout between."""

    def __init__(self, multiply=torch.matmul):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.softmax, self.dropout, self.multiply = nn.Softmax(-1), nn.Dropout(0.1), multiply

    def forward(self, x):
        mixed = torch.matmul(x.transpose(1, 2), x)  # another matmul, which is none of attention's
        scores = self.multiply(self.q(x), self.k(x).transpose(1, 2)) / 3 + torch.zeros(x.shape[1])
        out = self.multiply(self.dropout(self.softmax(scores.float())).to(x.dtype), self.v(x))
        return out + mixed.mean()


def einsum(a, b):
    return torch.einsum("bij,bjk->bik", a, b)


@pytest.mark.parametrize("multiply", [torch.matmul, torch.bmm, einsum, lambda a, b: a @ b])
def test_attention_spelled_out(multiply):
    net = nn.Sequential(Spelled(multiply)).eval()
    graph = graph_of(net, torch.randn(2, 5, 8))
    assert graph.attention == {"0": AttentionCalls(0, [(1, 0, 2)])}


def test_softmax_over_another_axis_is_no_attention():
    net = lambda_net(lambda m, x: (x @ x.transpose(1, 2)).softmax(1) @ x)
    assert graph_of(net, torch.randn(2, 5, 8)).attention == {}


def test_weights_read_by_a_function_are_noted_where_they_are_read():
    net = lambda_net(lambda m, x: F.linear(x, m.fc.weight, torch.ones(8)), fc=nn.Linear(8, 8, bias=False))
    graph = graph_of(net, torch.randn(2, 8))
    assert graph.functional == {"": ["fc"]} and "fc" not in graph.order and graph.costs["fc"].macs == 2 * 8 * 8


def test_costs():
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 5),
    )
    costs = graph_of(net, torch.randn(2, 4, 4, 4)).costs
    assert {name: cost.macs for name, cost in costs.items()} == {
        "0": 2 * 16 * 6 * 2 * 9,
        "1": 2 * 16 * 6 * 4 * 4,
        "3": 2 * 256 * 5,
    }
    assert costs["0"].input == (2, 4, 4, 4) and costs["0"].output == (2, 6, 4, 4)


def test_tied_weights_are_named():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False)})
    net["head"].weight = net["embed"].weight
    assert trace(net, lambda: net["head"](net["embed"](torch.tensor([1])))).tied == [("embed.weight", "head.weight")]


class Modulated(nn.Module):
    """A block as in diffusion transformers: one linear gives scale and shift of two norms, and gates."""

    def __init__(self, spoil=False):
        super().__init__()
        self.modulation, self.spoil = nn.Linear(8, 48), spoil
        self.norm1, self.norm2 = (nn.LayerNorm(8, elementwise_affine=False) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.fc1(self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None])
        if self.spoil:
            gate2 = gate2 * scale2
        return x + gate2.unsqueeze(1) * self.fc2(self.norm2(x) * (scale2.unsqueeze(1) + 1) + shift2.unsqueeze(1))


def test_modulated_norms():
    graph = graph_of(Modulated(), torch.randn(2, 5, 8), torch.randn(2, 8))
    rows = [Rows("modulation", 8 * i, 8 * i + 8) for i in range(6)]
    assert graph.pairs == [
        NormPair("norm1", ("fc1",), Modulation(scale=rows[1], shift=rows[0])),
        NormPair("norm2", ("fc2",), Modulation(scale=rows[4], shift=rows[3])),
    ]


def test_a_modulation_that_is_used_elsewhere_is_not_foldable():
    graph = graph_of(Modulated(spoil=True), torch.randn(2, 5, 8), torch.randn(2, 8))
    assert [pair.norm for pair in graph.pairs] == ["norm1"] and "used elsewhere" in graph.unfoldable["norm2"]


def test_a_modulation_of_two_norms_is_not_foldable():
    net = Modulated()

    def forward(x, c):
        shift, scale, _, *_ = net.modulation(c)[:, None].chunk(6, dim=-1)
        return net.fc1(net.norm1(x) * (1 + scale) + shift) + net.fc2(net.norm2(x) * (1 + scale) + shift)

    net.forward = forward
    graph = graph_of(net, torch.randn(2, 5, 8), torch.randn(2, 8))
    assert graph.pairs == [] and "used elsewhere" in graph.unfoldable["norm1"]


def test_a_layer_that_shares_its_weight_is_the_one_that_runs():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False)})
    net["head"].weight = net["embed"].weight
    graph = trace(net, lambda: net["head"](net["embed"](torch.tensor([1]))))
    assert list(graph.costs) == ["head"] and graph.functional == {}
