"""RepQuant adds learned clips and reconstruction to RepQ-ViT."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import Reconstruction, RepQuant, RepQViT
from lightning_quant.layers import as_float
from tests.callbacks.test_repq_vit import TinyViT, images
from tests.models import trainer

QUICK = Reconstruction(iterations=40, samples=32, batch_size=8, learning_rate=0.03)


def errors(model):
    """How far the model is from its float twin: the first block's first linear layer, and the output."""
    outputs = []
    handle = model.blocks[0].qkv.register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.no_grad():
        outputs.append(model(images()))
        with as_float(model):
            outputs.append(model(images()))
    handle.remove()
    layer, out, exact_layer, exact = outputs
    return (layer - exact_layer).square().mean(), (out - exact).square().mean()


def quantized(callback, tmp_path):
    torch.manual_seed(0)
    model = TinyViT()
    with torch.no_grad():  # channels that differ, as those of trained norms do
        for block in model.blocks:
            block.norm1.weight.copy_(torch.randn(16).exp())
            block.norm2.weight.copy_(torch.randn(16).exp())
    loader = DataLoader(list(images()), batch_size=8)
    trainer(callback, default_root_dir=tmp_path).validate(model, loader, verbose=False)
    return model.eval()


def test_without_clips_and_reconstruction_it_is_repq_vit(tmp_path):
    plain = quantized(RepQViT(), tmp_path)
    same = quantized(RepQuant(clip_steps=0, reconstruct=None), tmp_path)
    assert all(map(torch.equal, plain.state_dict().values(), same.state_dict().values())) or torch.equal(
        plain(images()), same(images())
    )


def test_each_part_helps(tmp_path):
    plain = errors(quantized(RepQViT(), tmp_path))
    clips = errors(quantized(RepQuant(reconstruct=None), tmp_path))
    both = errors(quantized(RepQuant(reconstruct=QUICK), tmp_path))
    assert clips[0] < plain[0]
    assert both[1] < plain[1]


def test_the_fold_stays_exact_with_learned_ranges(tmp_path):
    torch.manual_seed(0)
    before = TinyViT().eval()
    model = quantized(RepQuant(reconstruct=None), tmp_path)
    with torch.no_grad():
        for mine, theirs in zip(before.blocks, model.blocks, strict=True):
            assert mine.qkv.weight.shape == theirs.qkv.weight.shape
        with as_float(model):
            folded = model(images())
    torch.manual_seed(0)
    again = TinyViT().eval()
    with torch.no_grad():
        for block in again.blocks:
            block.norm1.weight.copy_(torch.randn(16).exp())
            block.norm2.weight.copy_(torch.randn(16).exp())
        assert torch.allclose(folded, again(images()), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"clip_objective": "loss"}, "neither 'output' nor 'input'"), ({"clip_steps": -1}, "must be 0 or more")],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepQuant(**arguments)
