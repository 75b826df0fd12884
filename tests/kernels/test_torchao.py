"""torchao's kernels against the simulated layers that they stand for, with the integers and scales of ours."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_quant import KernelSwap, PostTrainingQuantization
from lightning_quant.kernels.layer_door import run_on
from lightning_quant.kernels.registry import choose
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.kernels.torchao import has_torchao, needs
from lightning_quant.kernels.torchao.int4 import TorchaoInt4Weights, padded
from lightning_quant.kernels.torchao.int8 import TorchaoInt8Linear, TorchaoInt8Weights
from lightning_quant.kernels.weight_only import grouped
from lightning_quant.quantizers import Scheme
from tests.cases import Case, predictions
from tests.kernels.layers import assert_same, calibrated, skewed
from tests.models import Sequences, trainer

needs_torchao = pytest.mark.skipif(not has_torchao(), reason="torchao is not installed: pip install torchao")
INPUTS = [
    "int8_asym_tensor",
    "int8_sym_tensor",
    "int7_asym_tensor",
    "uint8_asym_tensor",
    "int8_asym_token_dynamic",
    "int8_asym_tensor_dynamic",
]


@needs_torchao
@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8_sym_channel", "int8_sym_tensor", "int6_sym_channel"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_products_of_integers(inputs, weights):
    torch.manual_seed(0)
    x = skewed(3, 7, 40)
    layer = calibrated(nn.Linear(40, 24), weights, inputs, x)
    assert choose(LayerSpec.of(layer), "torchao").kernel is TorchaoInt8Linear
    assert_same(layer, TorchaoInt8Linear, x, rtol=0, atol=1e-6 * float(layer(x).abs().max()))


@needs_torchao
@torch.no_grad()
def test_products_in_bfloat16():
    """A tie that falls on the other side, and the rounding of the answer: no more than that."""
    torch.manual_seed(0)
    x = skewed(3, 7, 40).bfloat16()
    layer = calibrated(nn.Linear(40, 24).bfloat16(), "int8_sym_channel", "int8_asym_tensor", x.float())
    assert_same(layer, TorchaoInt8Linear, x, rtol=0.02, atol=0.02 * float(layer(x).abs().max()))


@needs_torchao
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["int8_sym_channel", "int5_sym_channel", "int8_sym_tensor"])
def test_float_inputs(weights, dtype):
    torch.manual_seed(0)
    x = skewed(3, 7, 40).to(dtype)
    layer = calibrated(nn.Linear(40, 24).to(dtype), weights, None, x)
    assert choose(LayerSpec.of(layer), "torchao").kernel is TorchaoInt8Weights
    near = 1e-6 if dtype == torch.float32 else 0.02
    assert_same(layer, TorchaoInt8Weights, x, rtol=near, atol=near * float(layer(x).abs().max()))


@needs_torchao
@torch.no_grad()
def test_a_kept_kernel_is_copied_and_pickled():
    x = skewed(5, 40)
    layer = calibrated(nn.Linear(40, 24), "int8_sym_channel", "int8_asym_tensor", x)
    run_on(layer, TorchaoInt8Linear.of(layer), keep=True)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int4_sym_g32", "uint4_asym_g32", "int3_asym_g64", "int4_asym_channel"])
def test_what_tinygemm_is_given(weights):
    """(code - 8) * scale + shift of what is packed is the simulated weight; what is padded is not read."""
    layer = calibrated(nn.Linear(64, 20).bfloat16(), weights, None, torch.empty(0))
    group = Scheme.parse(weights).group_size or 64
    pairs, scales = padded(*grouped(layer, group), group)
    assert pairs.shape == (24, 512) and scales.shape == (1024 // group, 24, 2) and scales.dtype == torch.bfloat16
    codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten(1).float()
    scale, shift = scales.float().repeat_interleave(group, 0).permute(2, 1, 0)
    found = ((codes - 8) * scale + shift)[:20, :64]
    want = layer.quantized().float()
    assert float((found - want).abs().max()) <= 2**-7 * float(want.abs().max())  # scales are rounded to bfloat16
    assert not pairs[20:].any() and not pairs[:, 32:].any()


def spec(device="cpu", weights="int8_sym_channel", inputs="int8_asym_tensor", dtype=torch.float32, **others):
    schemes = (None if text is None else Scheme.parse(text) for text in (weights, inputs))
    return LayerSpec("Linear", device, dtype, (64, 128), *schemes, **others)


@needs_torchao
def test_what_it_does_not_take():
    for found, why in (
        (spec(inputs="int8_sym_token_dynamic"), "finds other scales for them than were simulated"),
        (spec(inputs="int4_asym_tensor"), "rounds to 7 or 8 bits"),
        (spec(weights="int8_asym_channel"), "not symmetric with one scale per channel"),
        (spec(weights="int4_sym_g32", inputs=None), "not symmetric with one scale per channel"),
        (spec(weights="fp8_e4m3"), "its weights are fp8_e4m3"),
        (spec(plain=False), "its grid has noise"),
        (spec("cuda", "int4_sym_g32", None, torch.float32, capability=(9, 0)), 'precision="bf16-true"'),
        (spec("cuda", "int4_sym_g16", None, torch.bfloat16, capability=(9, 0)), "are 8 groups of 16"),
        (spec("cuda", "int4_sym_g32", None, torch.bfloat16, capability=(7, 5)), "tinygemm's products need 8.0"),
    ):
        assert why in choose(found, "torchao").why_not
    on_gpu = spec("cuda", "int4_sym_g32", None, torch.bfloat16, capability=(9, 0))
    assert choose(on_gpu, "torchao").kernel is TorchaoInt4Weights


def test_nobody_gets_it_who_has_not_asked():
    for found in (spec(), spec(inputs=None), spec("cuda", "int4_sym_g32", None, torch.bfloat16, capability=(9, 0))):
        assert "torchao" not in choose(found).kernel.name and "torchao" not in str(choose(found).why_not)


# ---------------------------------------------------------------- a whole model


@needs_torchao
@pytest.mark.parametrize("keep", [False, True])
def test_predict_is_validate(keep):
    case = Case(PostTrainingQuantization, {"attention": False})
    model = case.quantized()
    want = predictions(case, model)
    swap = KernelSwap("torchao", keep=keep)
    out = torch.cat(trainer(case(), swap).predict(model, datamodule=Sequences()))
    assert (out - want).norm() < 0.02 * want.norm()
    assert {row.kernel for row in swap.table.rows} == {TorchaoInt8Linear.name}
    assert keep or torch.equal(predictions(case, model), want)


@needs_torchao
def test_a_model_of_which_it_takes_nothing_is_refused():
    case = Case(PostTrainingQuantization, {"weights": "fp8_e4m3", "activations": "fp8_e4m3"})
    model = case.quantized()
    with pytest.raises(ValueError, match=r'backend="torchao" takes none of 10 quantized layers; `embed`: its inputs'):
        trainer(case(), KernelSwap("torchao")).predict(model, datamodule=Sequences())


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-quant\[torchao\]"'):
        KernelSwap("torchao")
    assert "torchao is not installed" in choose(spec(), "torchao").why_not
