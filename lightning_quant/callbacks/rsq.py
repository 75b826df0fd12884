"""RSQ: GPTQ on Hessians in which important tokens count more (2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_quant.calibration import attention_received, token_weights
from lightning_quant.callbacks.gptq import GPTQ
from lightning_quant.modules.block_sequence import Block


class RSQ(GPTQ):
    r"""Weighs the tokens of the calibration data by the attention that they receive, and solves as GPTQ does.

    .. math::
        r_j = \sum_{\text{heads}} \sum_{\text{queries}} A_{h, q, j}, \quad \text{scaled to } [r_{min}, 1], \qquad
        H = \frac{2}{n} \sum_t w_t \, x_t x_t^\top, \quad w_t = \frac{T \, r_t^p}{\sum_s r_s^p}

    The attention is that of the block before any of its layers is solved, on what the solved blocks before it make of
    the data; one weight for each token serves all its layers. Nobody looks at padding, which then has no weight. The
    paper rotates the model first: put :class:`RotatedPTQ` before it. Alone, at three bits on stories260K, it has a
    perplexity of 5.62 where :class:`GPTQ` has 5.88, calibrated on WikiText-2, and 5.87 against 5.60 on stories that the
    model wrote; on SmolLM2-135M, at two bits, 505 where it has 244. Its eightfold shifted calibration set is not
    offered.

    Reference: Sung et al., *RSQ: Learning from Important Tokens Leads to Better Quantized LLMs*, 2025.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs, ``None`` for weight-only quantization.
        ranges: how ranges are found.
        importance: ``"attention"``, ``"norm"`` of what enters the block, or ``"change"`` that the block makes.
        r_min: the importance of the least important token, of the most important one's.
        power: p; 1 as in the published code, 2 as in the paper.
        arguments: see :class:`GPTQ`.

    Raises:
        ValueError: for an unknown importance, a block that does not attend, and where :class:`GPTQ` does.

    >>> callback = RSQ(weights="int3_g128", calibration_samples=128)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4_g128",
        activations: str | None = None,
        ranges: str = "lp",
        importance: Literal["attention", "norm", "change"] = "attention",
        r_min: float = 0.005,
        power: float = 1.0,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, ranges, **arguments)
        if importance not in ("attention", "norm", "change"):
            raise ValueError(f"importance={importance!r} is none of 'attention', 'norm' and 'change'")
        if not 0 < r_min <= 1 or power < 0:
            raise ValueError(f"r_min={r_min} must be above 0 and up to 1, power={power} at least 0")
        self.importance, self.r_min, self.power = importance, r_min, power

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        return {**super().arguments, "importance": self.importance, "r_min": self.r_min, "power": self.power}

    def token_weights(self, block: Block) -> Sequence[Tensor]:
        """One weight for each token of each batch."""
        return [token_weights(self._importance(block, batch), self.r_min, self.power) for batch in range(len(block))]

    def _importance(self, block: Block, batch: int) -> Tensor:
        entering = block.hidden(batch)
        if self.importance == "norm":
            return _length(entering)
        if self.importance == "change":
            leaving = next(x for x in tree_leaves(block(batch)) if isinstance(x, Tensor) and x.shape == entering.shape)
            return _length(leaving - entering)
        with torch.no_grad():
            received = attention_received(lambda: block(batch), len(entering))
        if received is None:
            raise ValueError(
                f"`{block.name}` does not attend from all tokens to all tokens; take importance='norm' or 'change'"
            )
        return received


def _length(x: Tensor) -> Tensor:
    return x.float().square().sum(-1).sqrt()
