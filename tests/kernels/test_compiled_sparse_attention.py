"""The Triton kernels of sparse attention as they are compiled for GPUs, on a machine without one."""

import importlib

import pytest

triton = pytest.importorskip("triton")

SHARED = {80: 166_912, 90: 232_448}  # bytes that a block of threads may have
ROOM = "lightning_quant.kernels.sparse_attention"
FORWARD = {"BLOCK": 128, "ROWS": 128, "COLUMNS": 64, "TILES": 2, "CAUSAL": False, "PADDED": True, "RECTIFIED": True}


def compiled(kernel, types, constants, capability, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"scale": "fp32", "index_ptr": "*i32", "count_ptr": "*i32", "valid_ptr": "*u8"} | types
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if "*" in signature[name]}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True, **options}
    )


@pytest.mark.evidence  # the compiler takes its time
@pytest.mark.parametrize(("capability", "dim", "codes"), [(80, 128, False), (80, 64, True), (90, 128, True)])
def test_attention_uses_tensor_cores_and_fits(capability, dim, codes):
    kernel = importlib.import_module(f"{ROOM}.block_sparse_triton")._forward
    types = {name: "*i8" if codes and name in ("q_ptr", "k_ptr") else "*bf16" for name in ("q_ptr", "k_ptr")}
    types |= {"v_ptr": "*bf16", "out_ptr": "*bf16"}
    constants = {**FORWARD, "DIM": dim, "VALUE_DIM": dim, "INT8": codes}
    found = compiled(kernel, types, constants, capability, num_warps=4 if dim <= 64 else 8, num_stages=2)
    products = [line for line in found.asm["ptx"].splitlines() if "mma" in line]
    assert any("f32.bf16.bf16" in line for line in products)
    assert any("s32.s8.s8" in line for line in products) is codes
    assert found.metadata.shared <= SHARED[capability]
    assert ".local" not in found.asm["ptx"]  # nothing is kept outside of the registers


def test_pooling_reads_a_block_once():
    kernel = importlib.import_module(f"{ROOM}.pooling_triton")._pool
    constants = {"BLOCK": 128, "ROWS": 128, "DIM": 128, "PADDED": False}
    found = compiled(kernel, {"x_ptr": "*bf16"}, constants, 90, num_warps=8)
    assert found.asm["ttir"].count("tt.load") == 1
