"""Roofline: what quantization can buy at best, operator by operator (LLM-Viewer, 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.calibration import check_feedable, feed, sample_count, undisturbed
from lightning_quant.callbacks.roofline_section import Comparison, roofline_section
from lightning_quant.checkpoint import record_of
from lightning_quant.graph import Bits, Machine, Traced, kv_bytes, trace_operators, work
from lightning_quant.graph.roofline import Stage
from lightning_quant.layers import Plan, as_float
from lightning_quant.quantizers import Scheme
from lightning_quant.reports import Section

FLOAT = 16.0  # bits of what is not quantized


class Roofline(Callback):
    r"""Says for every operator what it computes and moves, and how long that takes at best, in float and quantized.

    .. math:: t = \max \left( \frac{\text{OPs}}{P}, \frac{\text{bytes}}{BW} \right)

    where P and BW are the peaks of a machine that need not be there. An operator whose arithmetic intensity, OPs per
    byte, is below :math:`P / BW` is bound by memory: fewer bits move faster. One above it is bound by computing, which
    is faster only if weights and activations both have 8 bits at most. Times are lower bounds; only their relations
    mean something.

    One validation batch is run once more in float and every linear layer, convolution, attention, norm, sum, product
    and activation function is noted with its shapes; the rest follows for any batch and prompt: *prefill* runs all
    tokens of the prompt (the last layer for one of them), *decode* one more token behind them, *forward* all tokens, as
    a model without a prompt does. Bits are those of the plans in the model, 16 where nothing is quantized; the scales
    of groups count, and so do the indices of 2:4 pruning. What a rotation costs that runs online is not counted, nor
    embeddings. The first table row of attention has the keys and values that it loads in the format that the plan has
    for them.

    ``QuantReport`` beside it shows the table and the plot; the totals are logged as ``roofline/<stage>_speedup``.

    Reference: Yuan et al., *LLM Inference Unveiled: Survey and Roofline Model Insights*, 2024; deviations of its
    released code from its own formulas are not taken over.

    Args:
        hardware: name of a machine, as ``"A100-80G"``, or a :class:`~lightning_quant.graph.Machine`.
        stages: which of ``"prefill"``, ``"decode"`` and ``"forward"``.
        batch: samples; default: those of the batch that was traced.
        tokens: of the prompt; default: those of the batch that was traced.
        fused_attention: whether scores and probabilities stay on the chip, as with FlashAttention.

    Attributes:
        comparisons: by stage, the operators in float and as quantized; empty before a validation.

    Raises:
        ValueError: for a machine or a stage that is not known.

    >>> callbacks = [PostTrainingQuantization("int4_g128", None), Roofline("A100-80G")]  # doctest: +SKIP
    >>> L.Trainer(callbacks=callbacks).validate(model, datamodule=dm)  # doctest: +SKIP
    [{..., 'roofline/prefill_speedup': 1.0, 'roofline/decode_speedup': 3.6}]
    """

    def __init__(
        self,
        hardware: str | Machine = "A100-80G",
        stages: Sequence[Stage] = ("prefill", "decode"),
        batch: int | None = None,
        tokens: int | None = None,
        fused_attention: bool = False,
    ) -> None:
        self.machine = Machine.named(hardware) if isinstance(hardware, str) else hardware
        self.stages: list[Stage] = list(stages)
        if not stages or not {*stages} <= {"prefill", "decode", "forward"}:
            raise ValueError(f"stages={list(stages)} must be of 'prefill', 'decode' and 'forward'")
        self.batch, self.tokens, self.fused_attention = batch, tokens, fused_attention
        self.comparisons: dict[Stage, Comparison] = {}
        self._traced: Traced | None = None

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._traced = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Trace the first batch."""
        if self._traced is None and not trainer.sanity_checking:
            check_feedable(pl_module)
            with undisturbed(pl_module), as_float(pl_module):
                self._traced = trace_operators(
                    pl_module, lambda: feed(trainer, pl_module, batch), sample_count(batch) or 1
                )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and log the totals."""
        if self._traced is None:
            return
        record = record_of(pl_module)
        bits = bits_of([] if record is None else list(record.plans.values()))
        batch, tokens = self.batch or self._traced.samples, self.tokens or self._traced.tokens
        for stage in self.stages:
            before, after = (
                work(self._traced.operators, self.machine, stage, batch, tokens, given, self.fused_attention)
                for given in ({}, bits)
            )
            self.comparisons[stage] = Comparison(self.machine, stage, batch, tokens, before, after)
            speedup = self.comparisons[stage].speedup
            pl_module.log(f"roofline/{stage}_speedup", speedup, batch_size=1, sync_dist=True)
            rank_zero_info(
                f"Roofline on {self.machine.name}: {stage} at best {speedup:.2f} times as fast as in 16 bits."
            )

    # ---------------------------------------------------------------- the report

    def report_sections(self, trainer: Trainer, pl_module: LightningModule) -> Iterable[Section]:
        """The table and the plot."""
        if not self.comparisons or self._traced is None:
            return []
        first = next(iter(self.comparisons.values()))
        cache = kv_bytes(self._traced.operators, first.batch, first.tokens)
        return [roofline_section(list(self.comparisons.values()), cache)]


def bits_of(plans: Sequence[Plan]) -> dict[str, Bits]:
    """The bits that plans give to the operators, by name; those of a layer on which several work add up to one."""
    found: dict[str, Bits] = {}
    for plan in plans:
        for name, layer in plan.layers.items():
            weights, activations, kv = found.get(name, Bits(FLOAT, FLOAT, FLOAT))
            if layer.weights is not None:
                scheme = Scheme.parse(layer.weights)
                weights = scheme.bits + (FLOAT / scheme.group_size if scheme.group_size else 0)
            if layer.pruned == "2:4":  # two of four numbers, and two bits for each that tell which
                weights = weights / 2 + 1
            if layer.inputs is not None:
                activations = kv = float(Scheme.parse(layer.inputs).bits)
            found[name] = Bits(weights, activations, kv)
        for name, site in plan.attention.items():
            operand, values = (FLOAT if x is None else float(Scheme.parse(x).bits) for x in (site.query, site.value))
            found[name] = Bits(0, operand, values)
    return found
