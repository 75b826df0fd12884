"""RepQuant: RepQ-ViT with learned ranges per channel and reconstructed weights (2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_quant.calibration import record
from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.graph import NormPair
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import UniformQuantizer
from lightning_quant.solvers import Reconstruction, learn_clips


class RepQuant(RepQViT):
    r"""RepQ-ViT whose LayerNorm ranges are learned, upper and lower end of each channel apart, and then its weights.

    *Dual clipping per channel.* Before the fold, the range of channel :math:`j` is a learned part of its extremes,

    .. math:: hi_j = \sigma(a_j) M_j, \quad lo_j = \sigma(b_j) m_j, \qquad
              \min_{a, b} \; \| X W^\top - \hat X W^\top \|^2

    over all linear layers that read the norm, on the quantized stream: the error counts as it arrives behind the
    weights, so that a loud channel is not favoured for being loud. The start is what RepQ-ViT finds, and the best of
    what was seen is kept.

    *Weight reconstruction.* After the fold, which rescales the columns of the weights, each block is fitted to its
    float twin instead of rounding to the nearest; see :class:`~lightning_quant.Reconstruction`.

    The paper publishes no code: the form of the clips, their optimizer and the solver of the weights are
    reconstructed from its text. All clips are learned before the first block is reconstructed.

    Reference: Li et al., *RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale
    Reparameterization*, 2024.

    Args:
        weights: format of the weights.
        activations: format of layer inputs and of q, k, v; the probabilities take as many bits.
        clip_steps: steps for the clips of one norm; 0 keeps RepQ-ViT's ranges.
        clip_lr: learning rate of the clips.
        clip_objective: ``"output"``, or ``"input"`` for :math:`\|X - \hat X\|^2`.
        reconstruct: how the weights are fitted after the fold; ``None`` rounds to the nearest.
        arguments: see :class:`RepQViT`.

    >>> callback = RepQuant(weights="int4", activations="int4", reconstruct="qdrop")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4",
        activations: str = "int4",
        clip_steps: int = 300,
        clip_lr: float = 5e-2,
        clip_objective: Literal["output", "input"] = "output",
        reconstruct: str | Reconstruction | None = "qdrop",
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, reconstruct=reconstruct, **arguments)
        if clip_objective not in ("output", "input"):
            raise ValueError(f"clip_objective={clip_objective!r} is neither 'output' nor 'input'")
        if clip_steps < 0:
            raise ValueError(f"clip_steps={clip_steps} must be 0 or more")
        self.clip_steps, self.clip_lr, self.clip_objective = clip_steps, clip_lr, clip_objective

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {"clip_steps": self.clip_steps, "clip_lr": self.clip_lr, "clip_objective": self.clip_objective}
        return {**super().arguments, **own}

    def refine_ranges(
        self, model: nn.Module, pairs: Sequence[NormPair], batches: Sequence[Any], run: Callable[[Any], Any]
    ) -> None:
        """Learn the clips of one norm after another, each on what the quantized layers before it make."""
        for pair in pairs if self.clip_steps else ():
            linears = [model.get_submodule(name) for name in pair.linears]
            x = torch.cat([_input_of(linears[0], partial(run, batch)) for batch in batches])
            self._learn(x, [linear for linear in linears if isinstance(linear, QuantizedLayer)])

    def _learn(self, x: Tensor, linears: Sequence[QuantizedLayer]) -> None:
        quantizer = linears[0].input_quantizer
        assert isinstance(quantizer, UniformQuantizer)
        steps = quantizer.scheme.qmax - quantizer.scheme.qmin
        lo = (quantizer.scheme.qmin - quantizer.zero_point) * quantizer.scale
        hi = lo + steps * quantizer.scale
        weights = [linear.weight_rows() for linear in linears] if self.clip_objective == "output" else []
        lo, hi = learn_clips(x, weights, lo, hi, quantizer.scheme.bits, self.clip_steps, self.clip_lr)
        for linear in linears:
            assert linear.input_quantizer is not None
            linear.input_quantizer.freeze(lo, hi)


def _input_of(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a layer is given in one run of the model: (tokens, channels)."""
    calls = record(layer, run, calls=1)
    x = next(leaf for leaf in calls[0].inputs if isinstance(leaf, Tensor))
    return x.flatten(0, -2)
