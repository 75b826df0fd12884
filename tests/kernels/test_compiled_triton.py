"""The Triton kernels of products as they are compiled for GPUs, on a machine without: what runs there is not tested."""

from types import SimpleNamespace

import pytest
import torch

from lightning_quant.kernels.cuda.nibbles import to_nibbles
from lightning_quant.kernels.cuda.operands import Int4Weight, Int8Inputs, Int8Weight

triton = pytest.importorskip("triton")

INT8 = {
    **{"w_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32", "column_scale_ptr": "*fp32", "total_ptr": "*i32"},
    **{"offset_ptr": "*i32", "bias_ptr": "*fp32", "found_scale_ptr": "*fp32", "found_zero_ptr": "*i32"},
    **{"x_ptr": "*bf16", "out_ptr": "*bf16", "code_ptr": "*i8"},
}
INT4 = {
    **{"packed_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*i8", "bias_ptr": "*fp32"},
    **{"x_ptr": "*bf16", "out_ptr": "*bf16"},
}
GRID = {"HALF": 128, "GRID": "asymmetric", "RECIPROCAL": True}
FLAGS = {"SHIFTED": True, "BIASED": True, "WIDE": False, "ACTIVATION": "gelu"}
SMALLEST = SimpleNamespace(kwargs={"ROWS": 16, "COLUMNS": 16, "DEPTH": 32}, num_warps=4, num_stages=2)
LARGEST = {80: 166_912, 90: 232_448}  # bytes of shared memory that a block may have


def compiled(kernel, types, constants, capability, tiles):
    """A kernel for a GPU that is not here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in {**constants, **tiles.kwargs}.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    options = {"enable_fp_fusion": False, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    aligned = ("inputs", "outputs", "stride_x", "stride_packed", "group")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in aligned
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_fits(kernel, capability, product):
    """It multiplies on tensor cores, and a block of it has room on the chip."""
    assert any(product in line for line in kernel.asm["ptx"].splitlines() if "mma" in line)
    assert kernel.metadata.shared <= LARGEST[capability]


def test_products_of_bytes_are_made_on_tensor_cores():
    from lightning_quant.kernels.cuda import int8_triton

    constants = {**GRID, **FLAGS, "INPUTS": "floats"}
    assert_fits(compiled(int8_triton._multiply, INT8, constants, 80, int8_triton.DECODE[0]), 80, ".s8.s8.s32")


def test_products_of_nibbles_are_made_on_tensor_cores():
    from lightning_quant.kernels.cuda import int4_triton

    constants = {"ZEROS": True, "BIASED": True, "ACTIVATION": "none"}
    tiles = int4_triton.configs(32, decode=True)[0]
    assert_fits(compiled(int4_triton._multiply, INT4, constants, 80, tiles), 80, "bf16.bf16.f32")


def test_quotients_are_rounded_before_the_nearest_integer_is_looked_for():
    """A fused multiply-add would round once, and take another integer where the quantizer finds a tie."""
    from lightning_quant.kernels.cuda import int8_triton

    ptx = compiled(int8_triton._encode, INT8, {**GRID, "FOUND": True}, 80, int8_triton.DECODE[0])
    assert "fma" not in ptx.asm["ptx"] and "div.rn.f32" in ptx.asm["ptx"]


@pytest.mark.evidence
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_branch_compiles(dtype):
    from lightning_quant.kernels.cuda import int4_triton, int8_triton

    types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    for grid in ("symmetric", "unsigned", "asymmetric"):
        for holds, activation in (("floats", "relu"), ("scaled", "silu"), ("codes", "none")):
            constants = {**GRID, **FLAGS, "GRID": grid, "INPUTS": holds, "ACTIVATION": activation, "BIASED": False}
            own = {**types, "x_ptr": "*i8"} if holds == "codes" else types
            assert_fits(compiled(int8_triton._multiply, {**INT8, **own}, constants, 80, SMALLEST), 80, ".s8.s8.s32")
    constants = {**GRID, **FLAGS, "INPUTS": "scaled", "WIDE": True}
    for out in ("*i64", "*i32", f"*{dtype}"):
        compiled(int8_triton._multiply, {**INT8, **types, "out_ptr": out}, constants, 80, SMALLEST)
    for zeros in (True, False):
        constants = {"ZEROS": zeros, "BIASED": False, "ACTIVATION": "silu"}
        compiled(int4_triton._multiply, {**INT4, **types}, constants, 80, SMALLEST)


@pytest.mark.evidence
@pytest.mark.long
@pytest.mark.parametrize("capability", LARGEST)
def test_all_tiles_that_are_tried_compile_and_fit(capability):
    from lightning_quant.kernels.cuda import int4_triton, int8_triton

    for constants, tiles in (
        *(({**GRID, **FLAGS, "INPUTS": "floats"}, tiles) for tiles in int8_triton.DECODE),
        *(({**GRID, **FLAGS, "INPUTS": "codes"}, tiles) for tiles in int8_triton.PREFILL),
    ):
        types = INT8 if constants["INPUTS"] == "floats" else {**INT8, "x_ptr": "*i8"}
        assert_fits(compiled(int8_triton._multiply, types, constants, capability, tiles), capability, ".s8.s8")
    constants = {"ZEROS": True, "BIASED": True, "ACTIVATION": "none"}
    for group in (32, 64, 128):
        for tiles in (*int4_triton.configs(group, decode=True), *int4_triton.configs(group, decode=False)):
            assert_fits(compiled(int4_triton._multiply, INT4, constants, capability, tiles), capability, "bf16.bf16")


def test_tiles_are_tuned_by_arguments_of_the_kernel_and_once():
    from lightning_quant.kernels.cuda import int4_triton, int8_triton, tiles

    for kernel, configs, keys in (
        (int8_triton._multiply, int8_triton.DECODE, int8_triton.KEYS),
        (int8_triton._multiply, int8_triton.PREFILL, int8_triton.KEYS),
        (int4_triton._multiply, int4_triton.configs(96, decode=True), int4_triton.KEYS),
    ):
        tuner = tiles._tuned(kernel, configs, keys)
        assert set(keys) <= set(tuner.arg_names) and tuner.configs == list(configs)
        assert tiles._tuned(kernel, configs, keys) is tuner


def test_a_tensor_of_the_cpu_is_refused():
    from lightning_quant.kernels.cuda import int4_triton, int8_triton

    x, codes = torch.randn(3, 32), torch.zeros(4, 32, dtype=torch.int8)
    weight = Int8Weight(codes, torch.ones(4), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="for CUDA devices and was given a tensor on cpu: move the model"):
        int8_triton.multiply(x, weight, Int8Inputs(8, "symmetric"), torch.float32)
    nothing = Int4Weight(to_nibbles(codes), torch.ones(1, 4), 8, 32, 32)
    with pytest.raises(RuntimeError, match="for CUDA devices and was given a tensor on cpu: move the model"):
        int4_triton.multiply(x, nothing)
