"""RepQ-ViT on models of timm, transformers and diffusers: the fold keeps their function, or is refused."""

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.zoo_modules import Keywords, first_tensor
from benchmarks.zoo_weights import awaken
from lightning_quant.layers import as_float
from tests.callbacks.unchanged import refused
from tests.cases import is_float, quantized, removed, repq
from tests.graph.test_libraries import swin
from tests.models import trainer


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(50, (8, 7))}


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, **sizes)
    return transformers.BertModel(config), {"input_ids": torch.randint(50, (8, 7))}


def dit():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.DiTTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2},
        **{"sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 5, "norm_num_groups": 1},
    )
    labels = {"timestep": torch.randint(1000, (8,)), "class_labels": torch.randint(5, (8,))}
    return net, {"hidden_states": torch.randn(8, 1, 8, 8), **labels}


def unet_condition():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32)},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": 24, "attention_head_dim": 8, "norm_num_groups": 8},
    )
    words = {"timestep": torch.randint(1000, (8,)), "encoder_hidden_states": torch.randn(8, 7, 24)}
    return net, {"sample": torch.randn(8, 4, 8, 8), **words}


FOLDED = {  # and the number of layers that norms are folded into
    "Swin": (lambda: (swin(img_size=56), {"x": torch.randn(8, 3, 56, 56)}), 7),
    "Swin, padded": (lambda: (swin(img_size=48, window_size=5), {"x": torch.randn(8, 3, 48, 48)}), 4),
    "GPT-2": (gpt2, 4),
    "DiT": (dit, 8),  # the last norm is that of the head
    "UNet2DCondition": (unet_condition, 20),
}


def made(build):
    """The model, its data, and all of them as one batch."""
    net, batch = build()
    awaken(net)
    samples = [{key: x[i] for key, x in batch.items()} for i in range(8)]
    return Keywords(net.eval()), DataLoader(samples, batch_size=8), batch


def output(model, batch):
    with torch.no_grad():
        return first_tensor(model(**batch))


@pytest.mark.parametrize(("build", "count"), FOLDED.values(), ids=FOLDED)
def test_the_fold_keeps_the_function_and_the_quantized_model_is_near(build, count):
    model, data, batch = made(build)
    exact = output(model, batch)
    close = {"atol": 1e-4 * exact.abs().max().item()}
    callback = repq(calibration_loader="val")
    trainer(callback).validate(model, data, verbose=False)
    assert sum(bool(model.get_submodule(name).folded) for name in quantized(model)) == count
    noise = (output(model, batch) - exact).square().mean() / exact.square().mean()
    assert 0 < noise < 0.01  # 20 dB
    with as_float(model):
        assert torch.allclose(output(model, batch), exact, **close)
    assert removed(callback, model)
    assert torch.allclose(output(model, batch), exact, **close)


def test_bert_has_no_norm_to_fold_and_is_refused():
    model, data, _ = made(bert)
    with refused(model, r"RepQViT folds LayerNorms .*`net\.embeddings\.LayerNorm`: it is also read by `add`"):
        trainer(repq(calibration_loader="val")).validate(model, data, verbose=False)
    assert is_float(model)
