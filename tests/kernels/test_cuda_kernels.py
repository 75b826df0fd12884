"""Kernels for GPUs: which layers they take, and what they answer, as far as a CPU can tell.

Triton's kernels run in its interpreter, and torch multiplies fp8 on CPUs too; that torch takes such operands on a GPU
is checked on tensors without data.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_quant import KernelSwap, PostTrainingQuantization
from lightning_quant.kernels.cuda import needs
from lightning_quant.kernels.cuda.fp8 import Fp8Linear
from lightning_quant.kernels.cuda.int4 import TritonInt4Weights
from lightning_quant.kernels.cuda.int8 import TritonInt8Linear
from lightning_quant.kernels.decoded import DecodedWeights
from lightning_quant.kernels.layer_door import KernelLayer, run_on
from lightning_quant.kernels.registry import choose
from lightning_quant.kernels.spec import LayerSpec
from lightning_quant.kernels.swapped import SwappedKernels
from lightning_quant.layers import quantize_layer
from lightning_quant.quantizers import Scheme
from tests.cases import Case, ptq, quantized
from tests.kernels.interpreter import interpreted
from tests.kernels.layers import assert_same, calibrated, skewed
from tests.models import Sequences, trainer

CUDA = "lightning_quant.kernels.cuda"


def spec(weights, inputs, dtype=torch.bfloat16, shape=(64, 128), capability=(9, 0), kind="Linear", **rest):
    schemes = (None if text is None else Scheme.parse(text) for text in (weights, inputs))
    return LayerSpec(kind, "cuda", dtype, shape, *schemes, capability=capability, **rest)


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: object())


# ---------------------------------------------------------------- who takes what


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("asked", "kernel"),
    [
        (spec("int8_sym_channel", "int8_asym_tensor"), TritonInt8Linear),
        (spec("int4_asym_channel", "int8_sym_token", torch.float16, capability=(8, 0)), TritonInt8Linear),
        (spec("int8_sym_tensor", "uint8_sym_tensor_dynamic", torch.float32, (3, 5)), TritonInt8Linear),
        (spec("int8_sym_channel", "int8_sym_token", kind="Conv1D"), TritonInt8Linear),
        (spec("int4_sym_g32", None, capability=(8, 0)), TritonInt4Weights),
        (spec("int4_asym_g96", None, torch.float16, (3, 100)), TritonInt4Weights),
        (spec("int3_asym_channel", None, torch.float32), TritonInt4Weights),
        (spec("fp8_e4m3_channel", "fp8_e4m3_token"), Fp8Linear),
        (spec("fp8_e4m3_tensor", "fp8_e4m3_tensor", torch.float32, capability=(8, 9)), Fp8Linear),
        (spec("fp8_e4m3_tensor", "fp8_e4m3_tensor_dynamic", torch.float16, capability=(12, 0)), Fp8Linear),
    ],
    ids=lambda value: value.formats if isinstance(value, LayerSpec) else "",
)
def test_a_layer_on_a_gpu_has_its_kernel(asked, kernel):
    assert choose(asked).kernel is kernel
    assert choose(asked, "triton").kernel is kernel
    assert choose(replace(asked, device="cpu"), "triton").kernel is DecodedWeights
    alone = choose(asked, "torch")
    assert alone.kernel is (kernel if kernel is Fp8Linear else DecodedWeights)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (spec("int8_g32", "int8_asym_tensor"), "int8_g32, not with one scale per channel"),
        (spec("int8_sym_channel", "int8_asym_channel"), "not with one scale per tensor or token"),
        (spec("int8_sym_channel", None), "its inputs are float"),
        (spec("int8_sym_channel", "fp8_e4m3"), "its inputs are fp8_e4m3"),
        (spec("int8_sym_channel", "int8_asym_tensor", torch.float64), "not float32, bfloat16 or float16"),
        (spec("int8_sym_channel", "int8_asym_tensor", shape=(8, 2**17)), "its 131072 inputs may not fit 32 bits"),
        (
            spec("int8_sym_channel", "int8_asym_tensor", capability=(7, 5)),
            "compute capability 7.5, and products of int8 in Triton",
        ),
        (spec("int8_sym_channel", "int8_asym_tensor", plain=False), "its grid has noise"),
        (spec("int8_sym_channel", "int8_asym_tensor", stepwise=True), "depends on the step"),
        (spec("int4_g48", None), "its groups of 48 inputs are no multiple of 32"),
        (spec("int4_g32", None, torch.float64), "its inputs are float64"),
        (spec("int4_g32", None, capability=(7, 0)), "compute capability 7.0, and products in Triton need 8.0"),
        (spec("fp8_e5m2_tensor", "fp8_e4m3_tensor"), "its weights are fp8_e5m2_tensor, not fp8_e4m3"),
        (spec("fp8_e4m3_tensor", None), "its inputs are float, not fp8_e4m3"),
        (spec("fp8_e4m3_channel", "fp8_e4m3_tensor", torch.float16), 'precision="bf16-true"'),
        (spec("fp8_e4m3_channel", "fp8_e4m3_tensor", shape=(64, 100)), "its 100 inputs are no multiple of 16"),
        (spec("fp8_e4m3_channel", "fp8_e4m3_tensor", capability=(8, 6)), "8.6, and products of fp8 need 8.9"),
        (spec("fp8_e4m3_channel", "fp8_e4m3_tensor", capability=(12, 0)), "no products with scales of rows"),
        (spec("fp8_e4m3_g32", "fp8_e4m3_tensor"), "not with one scale per channel"),
        (spec("int8_sym_channel", "int8_asym_tensor", kind="Conv2d"), "no low-bit kernel for Conv2d on cuda"),
    ],
    ids=lambda value: value.formats if isinstance(value, LayerSpec) else "",
)
def test_a_layer_on_a_gpu_without_a_kernel_says_why(asked, why):
    choice = choose(asked)
    assert choice.kernel is DecodedWeights
    assert why in choice.why_not


def test_without_triton_only_torch_multiplies(monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    for weights, inputs in (("int8_sym_channel", "int8_sym_token"), ("int4_g32", None)):
        assert choose(spec(weights, inputs)).why_not == "triton is not installed: pip install lightning-quant[triton]"
    assert choose(spec("fp8_e4m3_channel", "fp8_e4m3_token")).kernel is Fp8Linear
    assert needs.why_not_on({"cuda"}) == "triton is not installed: pip install lightning-quant[triton]"


def test_the_triton_backend_refuses_a_model_on_the_cpu_before_anything_changes():
    model = ptq.quantized()
    swap = KernelSwap(backend="triton")
    with pytest.raises(ValueError, match=r'backend="triton" cannot serve: the model is on cpu, not on a CUDA device: '):
        trainer(ptq(), swap).predict(model, datamodule=Sequences())
    assert swap.table is None
    assert not any(isinstance(module, KernelLayer) for module in model.modules())


# ---------------------------------------------------------------- what they answer


@pytest.fixture(scope="module")
def in_the_interpreter():
    with interpreted(f"{CUDA}.int8_triton", f"{CUDA}.int4_triton", f"{CUDA}.tiles"):
        yield


@pytest.mark.usefixtures("in_the_interpreter")
@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "inputs", "shape"),
    [
        ("int8_sym_channel", "int8_asym_tensor", (2, 3, 30)),
        ("int8_asym_channel", "int8_asym_token", (2, 9, 30)),
        ("int8_sym_tensor", "int8_sym_token", (30,)),
        ("uint4_asym_channel", "uint8_sym_tensor_dynamic", (4, 30)),
        ("int4_sym_channel", "uint4_asym_tensor", (0, 30)),
        ("int3_asym_channel", "int8_asym_tensor_dynamic", (5, 30)),
        ("int8_sym_channel", "uint8_sym_token", (1, 30)),
    ],
)
def test_int8_layers(weights, inputs, shape):
    x = skewed(*shape)
    calibration = skewed(20, 30)
    layer = calibrated(nn.Linear(30, 18, bias=weights != "int8_sym_tensor"), weights, inputs, calibration)
    assert_same(layer, TritonInt8Linear, x, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("in_the_interpreter")
@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "inputs", "bias"),
    [
        ("int4_asym_g32", 80, True),  # the last group is shorter
        ("int4_sym_g64", 128, False),
        ("uint4_asym_channel", 41, True),
        ("int3_asym_tensor", 41, True),
        ("int2_sym_g32", 64, True),
    ],
)
def test_int4_layers_multiply_the_weights_of_the_simulated_ones(weights, inputs, bias):
    x = skewed(2, 3, inputs)
    layer = calibrated(nn.Linear(inputs, 18, bias=bias), weights, None, x)
    assert_same(layer, TritonInt4Weights, x, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("in_the_interpreter")
@torch.no_grad()
def test_other_precisions_and_autocast():
    x = skewed(3, 40)
    layer = calibrated(nn.Linear(40, 18), "int8_sym_channel", "int8_asym_token", x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(layer, TritonInt8Linear, x, rtol=2e-2, atol=5e-2)
    assert_same(layer.to(torch.bfloat16), TritonInt8Linear, x.to(torch.bfloat16), rtol=2e-2, atol=0.1)
    layer = calibrated(nn.Linear(40, 18), "int4_asym_g32", None, x)
    with torch.autocast("cpu", torch.float16):
        assert_same(layer, TritonInt4Weights, x, rtol=1e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "inputs", "dtype"),
    [
        ("fp8_e4m3_tensor", "fp8_e4m3_tensor", torch.float32),
        ("fp8_e4m3_tensor", "fp8_e4m3_tensor_dynamic", torch.float16),
        ("fp8_e4m3_channel", "fp8_e4m3_tensor", torch.bfloat16),
        ("fp8_e4m3_channel", "fp8_e4m3_token", torch.bfloat16),
        ("fp8_e4m3_tensor", "fp8_e4m3_token", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_fp8_layers(weights, inputs, dtype, bias):
    for shape in ((2, 3, 64), (64,), (0, 64)):
        x = skewed(*shape).to(dtype)
        layer = calibrated(nn.Linear(64, 32, bias=bias).to(dtype), weights, inputs, skewed(20, 64))
        if x.numel() or "dynamic" not in inputs:
            near = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
            assert_same(layer, Fp8Linear, x, rtol=near, atol=near)


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["fp8_e4m3_token", "fp8_e4m3_tensor", "fp8_e4m3_tensor_dynamic"])
@pytest.mark.parametrize("weights", ["fp8_e4m3_channel", "fp8_e4m3_tensor"])
def test_torch_takes_the_operands_on_a_gpu(weights, inputs):
    """It asks there for other layouts than on a CPU; tensors without data tell, and are wherever one says."""
    layer = calibrated(nn.Linear(64, 32).bfloat16(), weights, inputs, skewed(20, 64))
    kernel = Fp8Linear.of(layer)
    with FakeTensorMode():
        for module in (kernel, layer.input_quantizer):
            for name, buffer in list(module.named_buffers()):
                empty = torch.empty_strided(buffer.shape, buffer.stride(), dtype=torch.bfloat16, device="cuda")
                setattr(module, name, empty.to(buffer.dtype))
        out = kernel.run(layer, torch.empty(2, 3, 64, dtype=torch.bfloat16, device="cuda"))
    assert out.shape == (2, 3, 32) and out.dtype == torch.bfloat16 and out.is_cuda


@pytest.mark.usefixtures("in_the_interpreter", "with_triton")
@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"weights": "int4_g32", "activations": None}], ids=["W8A8", "W4A16"])
def test_a_whole_model_answers_alike(arguments):
    """Its layers are swapped as on a GPU; that they are on one is only said."""
    case = Case(PostTrainingQuantization, {"attention": False, **arguments})
    model = case.quantized().eval()
    x = torch.randn(2, 5, 16)
    simulated = model(x)
    found = {name: model.get_submodule(name) for name in quantized(model)}
    said = {name: replace(LayerSpec.of(layer), device="cuda", capability=(9, 0)) for name, layer in found.items()}
    swapped = SwappedKernels({name: (found[name], said[name]) for name in found}, False, False, "triton")
    assert not swapped.without
    assert all("Triton" in row.kernel for row in swapped.swap())
    out = model(x)
    assert (out - simulated).norm() < 0.02 * simulated.norm()
    swapped.give_back()
    assert torch.equal(model(x), simulated)


@pytest.mark.usefixtures("in_the_interpreter")
@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "weights", "inputs", "smaller"),
    [
        (TritonInt8Linear, "int8_sym_channel", "int8_asym_tensor", 3.8),
        (TritonInt4Weights, "int4_asym_g128", None, 6.4),
        (Fp8Linear, "fp8_e4m3_tensor", "fp8_e4m3_tensor", 3.9),
    ],
)
def test_a_kept_kernel_is_small_and_keeps_its_scales(kernel, weights, inputs, smaller):
    x = skewed(2, 512)
    layer = calibrated(nn.Linear(512, 32), weights, inputs, x)
    before = sum(tensor.nbytes for tensor in layer.parameters())
    codes = layer.weight_quantizer.encode(layer.weight)
    run_on(layer, kernel.of(layer, packed=True), keep=True)
    assert before / sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()]) > smaller
    want = layer(x)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.kernel.codes(layer, "weight"), codes)
    assert layer.kernel.scale.dtype == torch.float32
    assert want.shape == (2, 32)


@pytest.mark.usefixtures("in_the_interpreter")
@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "weights", "inputs"),
    [
        (TritonInt8Linear, "int8_asym_channel", "int8_asym_token"),
        (TritonInt8Linear, "int8_sym_channel", "int8_asym_tensor"),
        (TritonInt4Weights, "int4_asym_g32", None),
        (Fp8Linear, "fp8_e4m3_tensor", "fp8_e4m3_tensor"),
    ],
)
def test_a_compiled_network_calls_them_without_a_break(kernel, weights, inputs):
    x = skewed(3, 64)
    layer = calibrated(nn.Linear(64, 32), weights, inputs, x)
    run_on(layer, kernel.of(layer))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_a_layer_of_the_cpu_has_no_capability():
    layer = quantize_layer(nn.Linear(4, 4), Scheme.parse("int8_sym_channel"), Scheme.parse("int8_asym_tensor"))
    assert LayerSpec.of(layer).capability == (0, 0)
