"""Which kernel answers for which layer, and for which attention.

To add a kernel: write its file, and add its line to ``KERNELS``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_quant.kernels.cuda.fp8 import Fp8Linear
from lightning_quant.kernels.cuda.int4 import TritonInt4Weights
from lightning_quant.kernels.cuda.int8 import TritonInt8Linear
from lightning_quant.kernels.decoded import DecodedWeights
from lightning_quant.kernels.int8_attention import Int8Attention
from lightning_quant.kernels.int8_conv import Int8Conv
from lightning_quant.kernels.int8_linear import Int8Linear
from lightning_quant.kernels.kernel import Kernel
from lightning_quant.kernels.spec import AnySpec
from lightning_quant.kernels.stepwise import StepwiseConv, StepwiseLinear
from lightning_quant.kernels.torchao.int4 import TorchaoInt4Weights
from lightning_quant.kernels.torchao.int8 import TorchaoInt8Linear, TorchaoInt8Weights
from lightning_quant.kernels.weight_only import Int4Weights, Int8Weights

# The first one that takes a layer answers for it.
KERNELS: tuple[type[Kernel], ...] = (
    *(Int8Conv, Int8Linear, StepwiseConv, StepwiseLinear, Int4Weights, Int8Weights, Int8Attention),  # CPU
    *(TritonInt8Linear, TritonInt4Weights, Fp8Linear),  # CUDA
    *(TorchaoInt8Linear, TorchaoInt8Weights, TorchaoInt4Weights),  # where asked for
)
FALLBACK = DecodedWeights


@dataclass(frozen=True)
class Choice:
    """The kernel for one layer or attention.

    Args:
        kernel: its class.
        why_not: why no low-bit kernel took it; ``None`` if one did.
    """

    kernel: type[Kernel]
    why_not: str | None


def choose(spec: AnySpec, backend: str = "auto") -> Choice:
    """The first kernel that takes a layer or an attention.

    Args:
        spec: what it is like.
        backend: which kernels are asked; ``"auto"``: all but those that want to be asked for.

    >>> import torch
    >>> from lightning_quant.kernels.spec import LayerSpec
    >>> from lightning_quant.quantizers import Scheme
    >>> int8 = Scheme.parse("int8_sym_channel"), Scheme.parse("int8_asym_tensor")
    >>> choose(LayerSpec("Linear", "cpu", torch.float32, (32, 64), *int8)).kernel.name
    'int8 (oneDNN)'
    >>> choose(LayerSpec("Linear", "cpu", torch.float32, (32, 64), Scheme.parse("fp8_e4m3"), None)).why_not
    'its weights are fp8_e4m3'
    """
    refusals = {
        kernel: kernel.why_not(spec)
        for kernel in KERNELS
        if kernel.considers(spec) and (kernel.automatic if backend == "auto" else backend in kernel.backends)
    }
    for kernel, refusal in refusals.items():
        if refusal is None:
            return Choice(kernel, None)
    why = next(reversed(refusals.values()), None)  # the last one is the most general of its kind
    those = "" if backend == "auto" else f' with backend="{backend}"'
    why = why or f"there is no low-bit kernel for {spec.kind} on {spec.device}{those}"
    return Choice(FALLBACK, why)
