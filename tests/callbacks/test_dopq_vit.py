"""DopQ-ViT changes two parts of RepQ-ViT: the levels of attention probabilities, and the common scale."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import DopQViT, Reconstruction, RepQViT
from lightning_quant.checkpoint import record_of
from lightning_quant.quantizers import LogQuantizer, TangentQuantizer
from lightning_quant.transforms import per_tensor
from tests.callbacks.test_repq_vit import TinyViT, images
from tests.models import trainer


class SharpViT(TinyViT):
    """Its channels differ, and its attention is sharp, as in trained models."""

    def __init__(self, bias=True):
        torch.manual_seed(0)
        super().__init__(bias)
        with torch.no_grad():
            for block in self.blocks:
                for norm in (block.norm1, block.norm2):
                    norm.weight.copy_(torch.randn(16).exp())
                block.qkv.weight[:32] *= 2


def quantized(callback, bias=True, folder=None):
    model = SharpViT(bias)
    trainer(callback, default_root_dir=folder).validate(model, DataLoader(list(images()), batch_size=8), verbose=False)
    return model.eval()


def attention_of(model):
    return [block.attention_quantizers[0] for block in model.blocks]


@torch.no_grad()
def output(model):
    return model(images())


def attention_error(model, call):
    """What the rounding of the probabilities does to the output of one site, on the stream of its own model."""
    seen = {}
    for name in ("probabilities", "value"):
        quantizer = getattr(call, f"{name}_quantizer")
        quantizer.observer = lambda x, name=name, quantizer=quantizer: (seen.update({name: x}), quantizer.rounded(x))[1]
    output(model)
    for quantizer in call.activation_quantizers().values():
        quantizer.observer = None
    maps = seen["probabilities"]
    return float(((call.probabilities_quantizer(maps) - maps) @ seen["value"]).square().sum())


def test_with_logarithms_and_the_mean_alone_it_keeps_the_codes_of_repq_vit():
    plain, same = quantized(RepQViT()), quantized(DopQViT(levels=["logsqrt2"], common_scale="mean"))
    for one, other in zip(attention_of(plain), attention_of(same), strict=True):
        assert isinstance(other.probabilities_quantizer, LogQuantizer)
        assert one.probabilities_quantizer.scheme == other.probabilities_quantizer.scheme
    for one, other in zip(plain.blocks, same.blocks, strict=True):
        assert torch.equal(one.qkv.weight, other.qkv.weight) and torch.equal(one.norm1.weight, other.norm1.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reconstruct", [None, Reconstruction(iterations=5, samples=8, batch_size=4)])
def test_the_common_scale_does_not_matter(bias, reconstruct, monkeypatch, tmp_path):
    """Neither to codes, nor to weights with a range per output channel, nor to what is learned after the fold.

    A power of two, since all else rounds differently, and four bits make much of that.
    """

    def four_times(*arguments):
        found = per_tensor(*arguments)
        return found._replace(scale=4 * found.scale, divisor=found.divisor / 4)

    plain = quantized(DopQViT(reconstruct=reconstruct), bias, tmp_path / "plain")
    monkeypatch.setattr("lightning_quant.callbacks.repq_vit.per_tensor", four_times)
    other = quantized(DopQViT(reconstruct=reconstruct), bias, tmp_path / "other")
    assert torch.equal(plain.blocks[0].qkv.weight, 4 * other.blocks[0].qkv.weight)
    assert torch.equal(output(plain), output(other))


def test_the_median_is_the_scale_of_a_channel():
    callback, scales = DopQViT(), []

    def see(model, pairs, batches, run):
        scales.append(model.blocks[0].qkv.input_quantizer.scale)

    callback.refine_ranges = see
    model = quantized(callback)
    assert float(model.blocks[0].qkv.input_quantizer.scale) in scales[0].tolist()
    assert float(quantized(DopQViT(common_scale="mean")).blocks[0].qkv.input_quantizer.scale) not in scales[0].tolist()


def test_a_site_takes_the_levels_of_least_error():
    chosen = quantized(DopQViT(levels=["tan", "logsqrt2"]))
    logs, tans = (quantized(DopQViT(levels=[name])) for name in ("logsqrt2", "tan"))
    first = [attention_error(model, attention_of(model)[0]) for model in (chosen, logs, tans)]
    assert first[0] <= 1.02 * min(first[1:])  # not all of the rows were looked at
    (plan,) = record_of(chosen).plans.values()
    for name, call in zip(("blocks.0", "blocks.1"), attention_of(chosen), strict=True):
        assert plan.attention[name].probabilities == str(call.probabilities_quantizer.scheme)
        assert call.probabilities_quantizer.observer is None and call.value_quantizer.observer is None


def test_levels_bent_by_a_tangent_reload(tmp_path):
    callback = DopQViT(levels=["tan"])
    model = quantized(callback)
    assert all(isinstance(call.probabilities_quantizer, TangentQuantizer) for call in attention_of(model))
    running = trainer(callback)
    running.validate(model, DataLoader(list(images()), batch_size=8), verbose=False)
    running.save_checkpoint(tmp_path / "q.ckpt")
    fresh = SharpViT()
    trainer(DopQViT(levels=["tan"])).validate(
        fresh, DataLoader(list(images()), batch_size=8), verbose=False, ckpt_path=tmp_path / "q.ckpt"
    )
    assert torch.equal(output(fresh.eval()), output(model.eval()))


def test_attention_that_stays_float_is_left_alone():
    model = quantized(DopQViT(attention=False))
    assert not any(hasattr(block, "attention_quantizers") for block in model.blocks)
    assert isinstance(model.blocks[0].qkv, nn.Linear)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": ["sin"]}, "must be of 'tan', 'atan', 'logsqrt2', 'log2'"),
        ({"levels": []}, "must be of"),
        ({"common_scale": "mode"}, "neither 'median' nor 'mean'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DopQViT(**arguments)
