"""What depends on the timestep alone, and where skip connections are joined: found by running a denoiser once."""

import torch
from torch import nn

from lightning_quant.graph import trace
from tests.diffusion import Own, labelled, sampler


def moment(module, count=2):
    conditions = {"class_labels": torch.arange(count)} if module.conditions else {}
    x = torch.randn(count, *module.shape_of_samples(), generator=torch.Generator().manual_seed(0))
    return {"x": x, "timestep": torch.full((count,), 500), "conditions": conditions}


def found(module):
    return trace(module, lambda: module.calibration_step(moment(module)))


def relative(names):
    return [name.removeprefix("denoiser.") for name in names]


def test_a_unet_has_an_embedding_and_a_projection_for_each_block():
    module = sampler()
    temporal = found(module).temporal
    projections = [name for name, _ in module.denoiser.named_modules() if name.endswith("time_emb_proj")]
    assert temporal.denoiser == "denoiser" and sorted(relative(temporal.outputs)) == sorted(projections)
    assert relative(temporal.layers[:2]) == ["time_embedding.linear_1", "time_embedding.linear_2"]
    assert {*temporal.layers} - {*temporal.outputs} == {*temporal.layers[:2]}


def test_a_transformer_has_modulations_which_see_the_label_too():
    temporal = found(labelled()).temporal
    assert relative(temporal.outputs) == [*(f"transformer_blocks.{i}.norm1.linear" for i in range(3)), "proj_out_1"]
    assert relative(temporal.layers[:2]) == [
        f"transformer_blocks.0.norm1.emb.timestep_embedder.linear_{i}" for i in (1, 2)
    ]
    assert len(temporal.layers) == 3 * 3 + 1


def test_a_net_of_ones_own_called_x_t():
    temporal = found(sampler(Own(), sample_shape=(1, 8, 8))).temporal
    assert temporal.layers == temporal.outputs == ("denoiser.time",)


def test_what_sees_the_sample_or_no_timestep_is_not_temporal():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.mixed, self.text, self.both = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x, timestep, text):
            t = self.time(timestep.float()[:, None].expand(-1, 4))
            x += t  # in place
            self.both(t)
            return self.mixed(x) + self.text(text) + self.both(x)

    net = Net()
    graph = trace(net, lambda: net(torch.randn(2, 4), torch.tensor([5, 6]), torch.randn(2, 4)))
    assert graph.temporal.layers == ("time",) and graph.temporal.denoiser == ""
    assert trace(nn.Linear(2, 2), lambda: None).temporal is None


def test_inputs_of_temporal_layers_do_not_change_with_the_sample():
    module = sampler()
    layers = {name: module.get_submodule(name) for name in found(module).temporal.layers}
    seen = {}

    def inputs(scale):
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault((name, scale), args[0]))
            for name, layer in layers.items()
        ]
        batch = moment(module)
        with torch.no_grad():
            module.calibration_step({**batch, "x": scale * batch["x"]})
        for handle in handles:
            handle.remove()

    inputs(1), inputs(3)
    assert all(torch.equal(seen[name, 1], seen[name, 3]) for name in layers)


# ---------------------------------------------------------------- skip connections


def test_the_shortcuts_on_the_way_up_read_a_skip_connection():
    module = sampler()
    joins = found(module).joins
    layers = {name: layer for name, layer in module.named_modules() if "up_blocks" in name and "conv_shortcut" in name}
    assert {*joins} == {*layers} and len(joins) == 4
    assert all(sum(parts) == layers[name].in_channels for name, parts in joins.items())
    assert joins["denoiser.up_blocks.1.resnets.1.conv_shortcut"] == (8, 8)
    assert found(labelled()).joins == {}  # sine and cosine of the timestep are joined, and no skip connection


def test_a_linear_layer_behind_an_activation_reads_one_too():
    class Net(nn.Module):
        def __init__(self, between):
            super().__init__()
            self.down, self.up, self.between = nn.Linear(3, 5), nn.Linear(8, 2), between

        def forward(self, x):
            return self.up(self.between(torch.cat([self.down(x), x], dim=-1)))

    for between, wanted in ((nn.SiLU(), {"up": (5, 3)}), (nn.Dropout(), {"up": (5, 3)}), (nn.LayerNorm(8), {})):
        net = Net(between).eval()
        assert trace(net, lambda net=net: net(torch.randn(2, 3))).joins == wanted


def test_batches_that_are_joined_and_grouped_convolutions_are_left_in_one_piece():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.whole, self.grouped = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(8, 2, 1, groups=2)

        def forward(self, x):
            y = self.down(x)
            return self.whole(torch.cat([y, x])), self.grouped(torch.cat([y, x], 1))

    net = Net()
    assert trace(net, lambda: net(torch.randn(2, 4, 3, 3))).joins == {}


def test_what_reads_the_sample_itself():
    assert found(sampler()).sample_readers == ["denoiser.conv_in"]
    assert found(labelled()).sample_readers == ["denoiser.pos_embed.proj"]
    assert found(sampler(Own(), sample_shape=(1, 8, 8))).sample_readers == ["denoiser.first"]
    net = nn.Sequential(nn.Linear(2, 2))
    assert trace(net, lambda: net(torch.ones(1, 2))).sample_readers == []
