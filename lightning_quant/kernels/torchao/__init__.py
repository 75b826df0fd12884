"""torchao's kernels, with the integers and scales that were calibrated here.

Its tensors take both as they are, so a layer computes what was simulated: W8A8 (static, and dynamic where torchao
finds the same scales), W8A16 on any device, W4A16 on GPUs. Written for ``torch.compile``, which fuses what torchao does
step by step: ``KernelSwap(backend="torchao", compile=True)``. On a GPU nothing of it was measured. Left out are formats
that

- torchao rounds in its own way: dynamic symmetric activations (it divides the range by 127.5, not by 127), and fp8 and
  2:4-sparse fp8 activations, whose scales it always finds by itself;
- call an operator of torch that a kernel of ours calls already: int4 on a CPU, in torchao a prototype, is
  :class:`~lightning_quant.kernels.weight_only.Int4Weights`, and fp8 is
  :class:`~lightning_quant.kernels.cuda.fp8.Fp8Linear`;
- need a library that its wheels for x86 do not bring: 1 to 7 bits with 8-bit activations, which are for ARM.
"""

from lightning_quant.kernels.torchao.needs import has_torchao, why_no_torchao

__all__ = ["has_torchao", "why_no_torchao"]
