"""Every door to attention in real classes: cross attention, padding masks, a part of a module, torch's own encoder."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.zoo_modules import Keywords, first_tensor
from benchmarks.zoo_weights import awaken
from lightning_quant.layers import AttentionSite
from tests.callbacks.unchanged import left_as_it_was
from tests.cases import ptq, quantized
from tests.models import CLASSES, WIDTH, Sequences, trainer, validate


def t5(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    net = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0, **options))
    return net, {"input_ids": torch.randint(50, (8, 7)), "decoder_input_ids": torch.randint(50, (8, 5))}


def whisper():
    transformers = pytest.importorskip("transformers")
    sides = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))
    }
    config = transformers.WhisperConfig(
        **sides, vocab_size=50, d_model=32, max_source_positions=10, decoder_start_token_id=0, pad_token_id=0
    )
    net = transformers.WhisperModel(config)
    return net, {"input_features": torch.randn(8, 80, 20), "decoder_input_ids": torch.randint(50, (8, 5))}


def unet_condition():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16)},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": 24, "attention_head_dim": 8, "norm_num_groups": 4},
    )
    words = {"timestep": torch.randint(1000, (8,)), "encoder_hidden_states": torch.randn(8, 7, 24)}
    return net, {"sample": torch.randn(8, 4, 8, 8), **words}


def made(build):
    """The model, its data, and all of them as one batch."""
    net, batch = build()
    awaken(net)
    samples = [{key: x[i] for key, x in batch.items()} for i in range(8)]
    return Keywords(net.eval()), DataLoader(samples, batch_size=8), batch


def sites_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, AttentionSite)]


def quantize(model, data, **arguments):
    callback = ptq(calibration_loader="val", **arguments)
    trainer(callback).validate(model, data, verbose=False)
    return callback


@torch.no_grad()
def output(model, batch):
    return first_tensor(model(**batch))


# ---------------------------------------------------------------- cross attention

CROSS = {  # the site, the layers that make keys and values out of the other sequence, and how many sites there are
    "T5": (t5, "net.decoder.block.0.layer.1.EncDecAttention", "k", "v", 3),
    "T5, spelled out": (
        lambda: t5(attn_implementation="eager"),
        *("net.decoder.block.0.layer.1.EncDecAttention", "k", "v", 3),
    ),
    "Whisper": (whisper, "net.decoder.layers.0.encoder_attn", "k_proj", "v_proj", 3),
    "UNet2DCondition": (
        unet_condition,
        *("net.down_blocks.0.attentions.0.transformer_blocks.0.attn2", "to_k", "to_v", 8),
    ),
}


@pytest.mark.parametrize(("build", "site", "key", "value", "count"), CROSS.values(), ids=CROSS)
def test_cross_attention_has_the_scales_of_the_other_sequence(build, site, key, value, count):
    model, data, batch = made(build)
    seen, module = {}, model.get_submodule(site)
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
        for name in (key, value)
    ]
    exact = output(model, batch)
    for handle in handles:
        handle.remove()
    quantize(model, data)
    assert len(sites_of(model)) == count
    (attention,) = module.attention_quantizers
    for name, quantizer in ((key, attention.key_quantizer), (value, attention.value_quantizer)):
        width = seen[name].max().clamp(min=0) - seen[name].min().clamp(max=0)
        assert quantizer.scale.item() * 255 == pytest.approx(width.item(), rel=1e-4), name
    noise = (output(model, batch) - exact).square().mean() / exact.square().mean()
    assert 0 < noise < 0.01  # 20 dB


# ---------------------------------------------------------------- a part of a module


@pytest.mark.parametrize("target", ["net.decoder", "net.decoder.block.0.layer.1", "net.encoder.block.0.layer.0"])
def test_target_quantizes_the_layers_and_the_attention_of_one_part(target):
    model, data, batch = made(t5)
    exact = output(model, batch)
    rest = [child for name, child in model.named_modules() if name and not f"{target}.".startswith(f"{name}.")]
    rest = [child for child in rest if child not in set(model.get_submodule(target).modules())]
    types = [type(child) for child in rest]
    callback = quantize(model, data, target=target)
    assert [type(child) for child in rest] == types
    found = quantized(model) + sites_of(model)
    assert found and all(name.startswith(f"{target}.") for name in found)
    assert len(sites_of(model)) == {"net.decoder": 2}.get(target, 1)
    assert not torch.equal(output(model, batch), exact)
    callback.remove(model)
    assert torch.equal(output(model, batch), exact)


# ---------------------------------------------------------------- masks


def bert(attention):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, attn_implementation=attention, **sizes)
    mask = torch.arange(9) < torch.randint(3, 10, (8, 1))
    return transformers.BertModel(config), {"input_ids": torch.randint(50, (8, 9)), "attention_mask": mask.long()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # a mask of booleans, and one that is added
def test_what_is_masked_out_does_not_matter_to_a_quantized_model(attention):
    model, data, batch = made(lambda: bert(attention))
    quantize(model, data)
    assert len(sites_of(model)) == 2
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    want = output(model, batch)
    other = output(model, {**batch, "input_ids": torch.where(mask, ids, (ids + 7) % 50)})
    assert torch.equal(other[mask], want[mask]) and not torch.equal(other[~mask], want[~mask])
    for row, length in enumerate(mask.sum(1).tolist()):  # as if there were no padding
        alone = output(model, {"input_ids": ids[row : row + 1, :length]})
        assert torch.allclose(alone[0], want[row, :length], atol=0.05 * want.std().item())


# ---------------------------------------------------------------- torch's own encoder


class Encoder(L.LightningModule):
    def __init__(self, norm_first):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(x)).mean(1)

    def validation_step(self, batch, batch_idx):
        self.log("power", self(batch[0]).square().mean())


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fused_path_of_torchs_encoder_is_off_while_quantized_and_back_afterwards(norm_first, monkeypatch):
    calls, fused = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args))

    def fused_calls(run):
        calls.clear()
        return run(), len(calls)

    model, callback, x = Encoder(norm_first).eval(), ptq(), Sequences().val.tensors[0]
    with torch.inference_mode():
        exact, count = fused_calls(lambda: model(x))
        assert count == 2
        with left_as_it_was(model):
            assert fused_calls(lambda: validate(model, callback))[1] == 0
            near, count = fused_calls(lambda: model(x))
            assert count == 0 and len(quantized(model)) == 9
            assert 0 < (near - exact).abs().max() < 0.1
            callback.remove(model)
        again, count = fused_calls(lambda: model(x))
        assert count == 2 and torch.equal(again, exact)
