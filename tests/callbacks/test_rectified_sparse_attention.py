"""Sparse attention by one callback: what a user sees of it, on the real classes and on one's own net."""

import copy
import json
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, RectifiedSparseAttention, UniformAttention
from lightning_quant.reports import Contributor
from tests.models import Block, trainer


class Attend(nn.Module):
    """Self-attention, or attention to a context; counts what its own call would have multiplied."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            self.q.weight *= 4  # trained attention is far from uniform
            self.k.weight.copy_(self.q.weight + torch.randn(width, width) / 4)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Net(nn.Module):
    """A small vision transformer: a class token, 16x12 patches, three layers, the second one also looks at a text."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 16, 2, 2), nn.Parameter(torch.randn(1, 1, 16))
        self.layers = nn.ModuleList(Attend() for _ in range(3))
        self.cross = Attend()
        self.text = nn.Parameter(torch.randn(1, 5, 16))
        self.forwards = 0

    def forward(self, images):
        self.forwards += 1
        x = self.patch(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.cross(x, self.text.expand(len(x), -1, -1))


class Plain(L.LightningModule):
    """Knows nothing of sparse attention."""

    def __init__(self, net=None):
        super().__init__()
        torch.manual_seed(1)
        self.net = net or Net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("energy", self(batch).square().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def images(size=(32, 24), count=4, batch=2):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 4, 3, generator=generator)
    return DataLoader(F.interpolate(coarse, size=size, mode="bilinear"), batch_size=batch)


def sparse(**arguments):
    return RectifiedSparseAttention(**{"block": 16, "p_remain": 0.1, **arguments})


def predict(model, *callbacks, data=None, **kwargs):
    return torch.cat(trainer(*callbacks, **kwargs).predict(model, data or images()))


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


def test_nothing_dropped_predicts_as_dense():
    model = Plain()
    callback = sparse(drop_rate=0.0)
    torch.testing.assert_close(predict(model, callback), predict(model), atol=1e-5, rtol=1e-5)
    assert [site.sparse_calls for site in callback.facts().values()] == [2, 2, 2]


def test_rectified_is_nearer_to_dense_than_plain_and_plain_than_uniform():
    model = Plain()
    exact = predict(model)
    rectified, plain = (
        error(predict(model, sparse(rectify=parts)), exact) for parts in (("critical", "noncritical"), ())
    )
    uniform = error(predict(model, UniformAttention(layers=["layers"])), exact)
    assert 0 < rectified < plain < uniform


def test_scores_of_8_bits_cost_little():
    model = Plain()
    exact = predict(model, sparse())
    assert 0 < error(predict(model, sparse(int8_scores=True)), exact) < 0.02


def test_every_stage_is_served_and_its_metrics_are_those_of_the_sparse_model():
    model = Plain()
    found = {}
    for stage in ("validate", "test"):
        for name, callbacks in (("dense", []), ("sparse", [sparse(drop_rate=0.9)])):
            run = getattr(trainer(*callbacks), stage)
            found[stage, name] = run(model, dataloaders=images(), verbose=False)[0]["energy"]
        assert found[stage, "sparse"] != found[stage, "dense"]
        assert found[stage, "sparse"] == pytest.approx(found[stage, "dense"], rel=0.2)
    assert found["validate", "sparse"] == found["test", "sparse"]


def traces_of(model):
    """Everything a callback could leave behind."""
    return {
        name: (type(module), set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.net.named_modules()
    }


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_nothing_is_left_behind(stage):
    model = Plain()
    before, weights = traces_of(model), copy.deepcopy(model.state_dict())
    getattr(trainer(sparse(), UniformAttention(["cross"])), stage)(model, images())
    assert traces_of(model) == before
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


class Fails(L.Callback):
    def on_predict_batch_end(self, trainer, pl_module, *rest):
        assert type(pl_module.net.layers[0]) is not Attend
        raise RuntimeError("on purpose")


def test_nothing_is_left_behind_after_an_exception():
    model = Plain()
    before = traces_of(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        predict(model, sparse(), Fails())
    assert traces_of(model) == before


class Copies(L.Callback):
    def on_predict_batch_end(self, trainer, pl_module, *rest):
        self.keys = list(pl_module.state_dict())
        self.copies = [copy.deepcopy(pl_module.net), pickle.loads(pickle.dumps(pl_module.net))]


def test_copies_made_meanwhile_are_copies_of_the_original():
    model, copies = Plain(), Copies()
    predict(model, sparse(), copies)
    assert copies.keys == list(model.state_dict())
    for made in copies.copies:
        assert type(made.layers[0]) is Attend and "attention_function" not in vars(made.layers[0])


def test_fit_and_its_validation_stay_dense():
    callback = sparse()
    trainer(callback, max_epochs=1).fit(Plain(), images(), images())
    assert callback.facts() == {}


def test_the_facts_say_what_happened():
    callback = sparse(drop_rate=0.8)
    predict(Plain(), callback)
    facts = callback.facts()
    assert list(facts) == ["net.layers.0", "net.layers.1", "net.layers.2"]
    for site in facts.values():
        assert site.layouts == ["1 + 16x12 tokens"]
        assert (site.sparse_calls, site.dense_calls) == (2, {})
        assert site.kept_share.shape == (2,) and (site.kept_share > 0.2).all() and (site.kept_share < 0.8).all()
        assert (site.kept_share < site.sampled.kept_mass).all()  # the kept keys are the ones that matter
        assert (site.sampled.error > 0).all() and (site.sampled.plain_error > 0).all()
        assert site.sampled.kept.shape == (2, 12, 12)


def test_the_report_shows_the_facts():
    callback = sparse(drop_rate=0.8, warmup_steps=1)
    predict(Sampler(Denoiser()), callback)
    (section,) = callback.report_sections(None, None)
    assert isinstance(callback, Contributor)
    assert section.body.count("<svg") == 3 and "net.net.layers.1" in section.body and "(warm-up)" in section.body
    told = json.loads(json.dumps(section.facts))["net.net.layers.1"]
    assert told["layouts"] == ["1 + 16x12 tokens"] and len(told["error"]) == 2
    assert 0 < section.scalars["sparse_attention/kept_share"] < 1
    assert all(len(axis.images) == 1 for axis in section.figure().axes)
    assert sparse().report_sections(None, None) == []  # nothing has run


def test_some_layers_stay_dense():
    callback = sparse(dense_layers=[0, "layers.2"])
    predict(Plain(), callback)
    assert list(callback.facts()) == ["net.layers.1"]
    with pytest.raises(ValueError, match=r"dense_layers: 'head' fits no attention site; there are 3"):
        predict(Plain(), sparse(dense_layers=["head"]))


def test_an_unseen_resolution_stays_dense_and_is_counted():
    class Two(L.LightningDataModule):
        def predict_dataloader(self):
            return [images(), images(size=(24, 24))]

    callback, model = sparse(drop_rate=0.9), Plain()
    found = trainer(callback).predict(model, datamodule=Two())
    torch.testing.assert_close(torch.cat(found[1]), predict(model, data=images(size=(24, 24))))
    assert callback.facts()["net.layers.0"].dense_calls == {"no layout for 145 tokens": 2}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    model = Plain()
    exact = predict(model)
    found = predict(Plain(), sparse(drop_rate=0.0), precision=precision)
    assert error(found.float(), exact) < 0.03


@pytest.mark.slow
def test_a_compiled_model():
    model = Plain()
    exact = predict(model)
    model.net = torch.compile(model.net, backend="eager")
    torch.testing.assert_close(predict(model), exact)  # compiled before the attention is routed
    torch.testing.assert_close(predict(model, sparse(drop_rate=0.0)), exact, atol=1e-5, rtol=1e-5)
    assert error(predict(model, sparse(drop_rate=0.9)), exact) > 0.01
    torch.testing.assert_close(predict(model), exact)


# ---------------------------------------------------------------- errors, before anything is changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (24, 24)}, r"found no attention .* `net.layers.0`: grid=\(24, 24\) has 576 tokens, .* of 193 tokens"),
        ({"prefix_tokens": 150, "suffix_tokens": 43}, "prefix_tokens=150 and suffix_tokens=43 leave nothing of .* 193"),
        ({"block": 128}, r"found no attention .* 1 \+ 16x12 tokens make 2 blocks of 128, fewer than 4: lower block="),
        ({"warmup_steps": 2}, "warmup_steps=2 needs a denoiser that is called with a timestep"),
        ({"dense_layers": [3]}, "dense_layers: 3 fits no attention site; there are 3"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message):
    model = Plain()
    before = traces_of(model)
    with pytest.raises(ValueError, match=message):
        predict(model, sparse(**arguments))
    assert traces_of(model) == before


def test_a_model_that_does_not_attend_is_refused():
    model = Plain(nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU()))
    with pytest.raises(
        ValueError, match="found no attention in this Plain that can be sparse: nothing calls scaled_dot"
    ):
        predict(model, sparse())
    with pytest.raises(ValueError, match="UniformAttention found nothing in this Plain that attends"):
        predict(model, UniformAttention())


@pytest.mark.parametrize(
    "arguments", [{"drop_rate": 1.5}, {"p_remain": -0.1}, {"block": 0}, {"rectify": ["all"]}, {"order": "hilbert"}]
)
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=r"(shares|at least 1|takes|order is)"):
        RectifiedSparseAttention(**arguments)


# ---------------------------------------------------------------- with quantization


class Tokens(nn.Module):
    """Blocks as many people write them, over 64 tokens of a picture."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def tokens():
    return DataLoader(torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(0)), batch_size=2)


def test_quantized_layers_around_sparse_attention():
    model = Plain(Tokens())
    quantization = PostTrainingQuantization(attention=False)
    trainer(quantization).validate(model, tokens(), verbose=False)
    quantized = predict(model, quantization, data=tokens())
    both = predict(model, quantization, sparse(drop_rate=0.0), data=tokens())
    torch.testing.assert_close(both, quantized, atol=1e-5, rtol=1e-5)


def test_quantized_attention_is_refused_by_name():
    model = Plain(Tokens())
    quantization = PostTrainingQuantization()
    trainer(quantization).validate(model, tokens(), verbose=False)
    callback = sparse(block=8)
    with pytest.raises(ValueError, match=r"quantized attention: `net.blocks.0`.*attention=False"):
        predict(model, quantization, callback, data=tokens())


# ---------------------------------------------------------------- diffusion


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, timestep):
        return (
            x + 0.1 * self.net(x)[:, 1:].mT.reshape(len(x), 16, 16, 12).mean((1, 2, 3), keepdim=True) * timestep / 1000
        )


class Sampler(Plain):
    """Five steps with guidance: two calls per timestep."""

    def predict_step(self, batch, batch_idx):
        for timestep in torch.tensor([999, 750, 500, 250, 0]):
            batch = self.net(batch, timestep=timestep) + 0.1 * self.net(batch, timestep)
        return batch


def test_the_first_steps_of_each_trajectory_are_dense():
    callback = sparse(warmup_steps=2)
    predict(Sampler(Denoiser()), callback)
    for site in callback.facts().values():
        assert site.dense_calls == {"warm-up": 2 * 2 * 2}  # steps, guidance, batches
        assert site.sparse_calls == 2 * 3 * 2


def test_of_a_sampler_only_the_first_step_is_run_to_look_at_it():
    model = Sampler(Denoiser())
    predict(model, sparse())
    assert model.net.net.forwards == 1 + 2 * 10


# ---------------------------------------------------------------- the real classes


def wan():
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return net, {"hidden_states": torch.randn(2, 4, 3, 16, 12), "encoder_hidden_states": torch.randn(2, 7, 16)}


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    net = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=16, num_layers=2, sample_width=12, sample_height=16, sample_frames=9, max_text_seq_length=6,
    )  # fmt: skip
    return net, {"hidden_states": torch.randn(2, 3, 4, 16, 12), "encoder_hidden_states": torch.randn(2, 6, 16)}


def hunyuan():
    from diffusers import HunyuanVideoTransformer3DModel

    net = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    lengths = torch.arange(9) < torch.tensor([[5], [9]])  # the samples have texts of different lengths
    return net, {
        "hidden_states": torch.randn(2, 4, 3, 16, 12),
        "encoder_hidden_states": torch.randn(2, 9, 16),
        "encoder_attention_mask": lengths.long(),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.ones(2),
    }


def flux():
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    rows = torch.arange(144)
    return net, {
        "hidden_states": torch.randn(2, 144, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 8),
        "img_ids": torch.stack([rows * 0, rows // 12, rows % 12], 1),
        "txt_ids": torch.zeros(7, 3),
    }


def dit():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=24,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    return net, {"hidden_states": torch.randn(2, 4, 24, 24), "class_labels": torch.tensor([1, 2])}


class OneCall(L.LightningModule):
    def __init__(self, net, arguments):
        super().__init__()
        self.net, self.arguments = net, arguments

    def predict_step(self, batch, batch_idx):
        return self.net(**self.arguments, timestep=batch[0].expand(2), return_dict=False)[0]


@pytest.mark.parametrize(
    ("make", "layout", "sites"),
    [
        (wan, "3x8x6 tokens", 2),
        (cogvideox, "6 + 3x8x6 tokens", 2),
        (hunyuan, "3x8x6 + 9 tokens", 2),
        (flux, "7 + 12x12 tokens", 2),
        (dit, "12x12 tokens", 2),
    ],
)
def test_real_diffusion_transformers(make, layout, sites):
    pytest.importorskip("diffusers")
    model = OneCall(*make())
    data = DataLoader(torch.tensor([700.0, 300.0]), batch_size=1)
    exact = predict(model, data=data)
    callback = sparse(drop_rate=0.0)
    torch.testing.assert_close(predict(model, callback, data=data), exact, atol=1e-5, rtol=1e-4)
    assert [site.layouts for site in callback.facts().values()] == [[layout]] * sites

    callback = sparse(drop_rate=0.9, warmup_steps=1, dense_layers=[0])
    found = predict(model, callback, data=data)
    (site,) = callback.facts().values()
    assert (site.dense_calls, site.sparse_calls) == ({"warm-up": 2}, 0)  # each batch is a trajectory of one step
    torch.testing.assert_close(found, exact)

    callback = sparse(drop_rate=0.9)
    assert predict(model, callback, data=data).isfinite().all()
    assert all((site.kept_share < 0.9).all() for site in callback.facts().values())
