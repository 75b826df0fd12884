"""What Triton kernels of products share: tiles, which are tuned for each shape when it is first met, and activations.

Imported only when a kernel is about to serve. With ``TRITON_INTERPRET=1`` in the environment before that, kernels run
on the CPU.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this many rows are one token of each sample: the product waits for its weights, and its tiles are flat.
DECODE_ROWS = 16
# For the interpreter, which has one program run after the other.
SMALL = {"ROWS": 16, "COLUMNS": 16, "DEPTH": 32}
# An autotuner remembers the arguments of the call that it is in; threads may share a model.
_ONE_BY_ONE = threading.Lock()


@triton.jit
def tile_of(rows, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of this program's tile; eight rows of tiles go together, and share weights in the cache."""
    program = tl.program_id(0)
    width = 8 * tl.cdiv(outputs, COLUMNS)
    first = program // width * 8
    height = tl.minimum(tl.cdiv(rows, ROWS) - first, 8)
    return first + program % width % height, program % width // height


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """The activation function behind a product."""
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


def config(rows: int, columns: int, depth: int, warps: int, stages: int) -> Any:
    """One way to cut a product into tiles."""
    tiles = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
    return triton.Config(tiles, num_warps=warps, num_stages=stages)


def require_device(x: Tensor) -> None:
    """Refuse a tensor that no kernel can reach.

    Raises:
        RuntimeError: naming the device.
    """
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"this layer runs on a kernel for CUDA devices and was given a tensor on {x.device.type}: move the model "
            f"to the GPU, or leave the kernels with keep=False"
        )


def launch(
    kernel: Any, configs: tuple[Any, ...], keys: tuple[str, ...], out: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Have programs compute all tiles of a product.

    Args:
        kernel: a function of Triton.
        configs: tiles to try on a GPU.
        keys: arguments of the kernel; where they have other values, it is tuned anew.
        out: where the answer goes, (rows, outputs).
        *arguments: of the kernel.
        **constants: of the compiler.
    """
    rows, outputs = out.shape

    def programs(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(outputs, meta["COLUMNS"]),)

    if not out.is_cuda:
        kernel[programs](*arguments, **constants, **SMALL)
        return
    with torch.cuda.device_of(out), _ONE_BY_ONE:
        # Without fused multiply-adds: the quantizer rounds a quotient before it looks for the nearest integer.
        _tuned(kernel, configs, keys)[programs](*arguments, **constants, enable_fp_fusion=False)


@functools.cache
def _tuned(kernel: Any, configs: tuple[Any, ...], keys: tuple[str, ...]) -> Any:
    return triton.autotune(list(configs), list(keys))(kernel)  # not where it is defined: it asks for a driver
