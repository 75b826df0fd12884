"""LightningModules around causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_quant.metrics import Perplexity, next_tokens
from lightning_quant.modules.mixin import CalibrationMixin


class LanguageMixin:
    """The steps of a causal language model: it trains on the next token, is judged by perplexity and predicts logits.

    Put it before ``LightningModule`` in the bases of a module whose ``forward`` takes the entries of a batch as
    keywords and returns logits (B, T, V). A batch is a dict with ``input_ids`` (B, T), ``labels`` (B, T) where they
    differ (-100: not counted), and whatever else ``forward`` takes, or the ids alone.
    :class:`~lightning_quant.calibration.TokenWindows` cuts a stream of tokens into such batches, and counts no token
    twice.

    ``trainer.validate`` logs ``perplexity`` over all tokens that are counted, of all ranks; ``Fidelity(metrics=["kl",
    "agreement"], target=None)`` beside it compares the predictions of the very same tokens with the float twin's.

    >>> import lightning as L
    >>> class Bigrams(LanguageMixin, L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = nn.Embedding(32, 32)
    ...
    ...     def forward(self, input_ids):
    ...         return self.table(input_ids)
    >>> Bigrams().predict_step({"input_ids": torch.zeros(1, 5, dtype=torch.long)}, 0).shape
    torch.Size([1, 5, 32])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.perplexity = Perplexity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean cross entropy of the next token."""
        return cross_entropy(*next_tokens(self._logits(batch), _labels(batch)))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the perplexity."""
        self.perplexity(self._logits(batch), _labels(batch))
        self.log("perplexity", self.perplexity)  # type: ignore[attr-defined]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the perplexity."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The logits (B, T, V)."""
        return self._logits(batch)

    def calibration_step(self, batch: Any) -> Tensor:
        """What calibration runs: the logits of a batch."""
        return self._logits(batch)

    def fidelity_step(self, batch: Any) -> Tensor:
        """What :class:`~lightning_quant.Fidelity` compares: the logits (N, V) of the predictions that are counted."""
        return next_tokens(self._logits(batch), _labels(batch))[0]

    def _logits(self, batch: Any) -> Tensor:
        inputs = {**batch} if isinstance(batch, Mapping) else {"input_ids": _labels(batch)}
        inputs.pop("labels", None)
        logits: Tensor = self(**inputs)  # type: ignore[operator]
        return logits


class LanguageModule(LanguageMixin, CalibrationMixin, LightningModule):
    """A LightningModule around any causal language model, of transformers or one's own.

    Args:
        net: called with ``input_ids`` and whatever else a batch holds; returns logits (B, T, V), or an object that has
            them as ``logits``.
        learning_rate: of AdamW, for ``trainer.fit``.

    >>> from lightning_quant import GPTQ  # doctest: +SKIP
    >>> model = LanguageModule(AutoModelForCausalLM.from_pretrained(...))  # doctest: +SKIP
    >>> windows = DataLoader(TokenWindows(tokens, window=512), batch_size=4)  # doctest: +SKIP
    >>> L.Trainer(callbacks=[GPTQ(weights="int4_g128")]).validate(model, windows)  # doctest: +SKIP
    [{'perplexity': ...}]
    """

    def __init__(self, net: nn.Module, learning_rate: float = 1e-5) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """The logits (B, T, V)."""
        if hasattr(getattr(self.net, "config", None), "use_cache"):
            inputs.setdefault("use_cache", False)  # each window comes whole, and a cache takes memory
        output = self.net(input_ids=input_ids, **inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def _labels(batch: Any) -> Tensor:
    """The tokens that are to be predicted: the labels, or the ids themselves where there are none."""
    if isinstance(batch, Mapping):
        batch = batch["labels"] if "labels" in batch else batch["input_ids"]
    labels: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return labels
