"""PMQ: mixed precision by layer on a Pareto front, and by patch at inference (2023)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.mixed_precision import MixedPrecision
from lightning_quant.callbacks.mixed_precision_section import mixed_precision_section
from lightning_quant.layers import PatchBits
from lightning_quant.reports import Section, tag


class PMQ(MixedPrecision):
    r"""Bits of each layer from a Pareto front, and fewer of them at inference for patches that attention passes over.

    *Sensitivity* of a tensor to b bits, at the model's output, of one forward and backward for all tensors,

    .. math:: S(b) = \sum_i g_i^2 \, (Q_b(x_i) - x_i)^2

    *Allocation*: the convex hulls of all products are merged by :math:`b_c = \arg\min_b S_c(b) + \mu \, C_c(b)`, and
    the point of the front within the budget is taken.

    *Patches*: the tokens of a layer are ranked by what the attention map of the layer before gives them,
    :math:`I_t = \text{mean}_{h, q} A_{hqt}`. The upper share :math:`\rho` and the class token keep the bits b of query,
    key and value, the others have b - 2, over the same range. That is so while this callback is in the Trainer, in
    validate, test and predict; without it the model computes with all bits. The mean bits of those tensors are
    :math:`\rho b + (1 - \rho)(b - 2)`; the budget counts b.

    No code is published: the sensitivity (here its sign-safe form, without labels), the share, the two bits and
    where they are given up are reconstructed from the abstract.

    Reference: Xiao et al., *Patch-wise Mixed-Precision Quantization of Vision Transformer*, 2023.

    Args:
        budget: what it may cost; see :class:`MixedPrecision`.
        share: of the tokens that keep their bits, :math:`\rho`; 1 keeps the model as its layers are.
        fewer_bits: how many bits the other tokens give up.
        class_tokens: so many first tokens keep their bits always.
        weight_bits: the numbers of bits that weights may have.
        sensitivity: who says what is lost.
        search: who chooses.
        method: who calibrates.
        arguments: see :class:`MixedPrecision`.

    >>> callback = PMQ(budget="6bit", share=0.5)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: str | Sequence[str] = "6.0bit",
        share: float = 0.5,
        fewer_bits: int = 2,
        class_tokens: int = 1,
        weight_bits: Sequence[int] = (4, 6, 8),
        sensitivity: str = "patch",
        search: str = "pareto",
        method: str | QuantizationCallback = "repq",
        **arguments: Any,
    ) -> None:
        super().__init__(budget, method, sensitivity, search, weight_bits, **arguments)
        if not 0 < share <= 1 or fewer_bits < 0 or class_tokens < 0:
            raise ValueError(
                f"share={share} is above 0 and at most 1, fewer_bits={fewer_bits} and class_tokens={class_tokens} not "
                f"below 0"
            )
        self.patches = PatchBits(share, fewer_bits, class_tokens)
        self._at_work = ExitStack()

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {"share": self.patches.share, "fewer_bits": self.patches.fewer, "class_tokens": self.patches.always}
        return {**super().arguments, **own}

    def as_deployed(self, model: nn.Module) -> AbstractContextManager[None]:
        """With fewer bits for some patches."""
        return self.patches.at_work(model)

    def report_sections(self, trainer: Trainer, pl_module: LightningModule) -> list[Section]:
        """What was chosen, and what patches leave of it."""
        choice = self.choice_of(pl_module)
        if choice is None:
            return []
        bits = [number for slot, number in choice.bits.items() if slot.part in ("query", "key", "value")]
        few = [max(2, number - self.patches.fewer) for number in bits]
        share = self.patches.share
        mean = share * sum(bits) / max(1, len(bits)) + (1 - share) * sum(few) / max(1, len(few))
        told = f"Query, key and value have {mean:.2f} bits in the mean over patches, behind the first attention."
        return [mixed_precision_section(choice, self.budgets, [tag("p", told)])]

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, unless that is done; then begin to look at patches."""
        super().on_validation_start(trainer, pl_module)
        if self.is_calibrated(pl_module):
            self._begin(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self._at_work.close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look at patches."""
        super().on_test_start(trainer, pl_module)
        self._begin(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self._at_work.close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look at patches."""
        super().on_predict_start(trainer, pl_module)
        self._begin(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self._at_work.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._at_work.close()
        super().on_exception(trainer, pl_module, exception)

    def _begin(self, pl_module: LightningModule) -> None:
        self._at_work.close()
        self._at_work.enter_context(self.as_deployed(pl_module))
