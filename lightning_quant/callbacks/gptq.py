"""GPTQ: weights rounded column by column, each error made good by the columns behind it (ICLR 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_quant.calibration import Hessian
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.solving import Notes, blocks_of, solve_blocks
from lightning_quant.graph import ModelGraph, matches
from lightning_quant.layers import Plan, QuantizedLayer
from lightning_quant.modules.block_sequence import Block
from lightning_quant.quantizers import Scheme
from lightning_quant.solvers import ColumnSolver, Masking, Rounding, relative_error, settle


class GPTQ(PostTrainingQuantization):
    r"""Rounds the columns of a weight one after another; the columns that are left make good what each error did.

    .. math::
        \min_{\hat W} \| W X - \hat W X \|^2, \qquad H = 2 X X^\top, \quad (H + \lambda I)^{-1} = U^\top U, \qquad
        w_j \leftarrow w_j - \frac{w_i - \hat w_i}{U_{ii}} \, U_{ij} \quad (j > i)

    The blocks of the model are solved one after another, on what the solved ones before them make of the calibration
    data, and within a block the layers in the order in which they run. Weights are asymmetric in groups of 128 inputs.
    Layers outside the repeated blocks stay float, as the head and the embeddings of a language model do, unless
    ``overrides`` names them; then they are rounded to the nearest. The float Parameters are left alone: codes and
    scales live in the quantizers.

    A layer that calibration never reaches stays float. An input that is always 0 gets no weights.

    Reference: Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*,
    ICLR 2023.

    Args:
        weights: format of the weights.
        activations: format of the layers' inputs and of the attention operands, such as ``"int8_token_dynamic"``;
            ``None`` for weight-only quantization.
        ranges: how ranges are found, those of groups when their turn comes. At two, three and four bits on
            stories260K, least :math:`L_p` errors give perplexities of 59, 5.9 and 3.9, extremes 840, 7.1 and 4.1.
        damp: :math:`\lambda` in parts of the mean of diag(H).
        act_order: take the inputs of the largest diag(H) first; the scales of groups are then static.
        static_groups: find the scales of groups before the first column is rounded; ``None``: with ``act_order``.
        block_size: how many columns pass between two updates of all others; no matter but of speed.
        blocks: name patterns of the modules that are solved one after another; default: the repeated blocks.
        min_tokens: calibration tokens for each input of a layer below which it warns.
        state_dir: where finished blocks are written, for a killed run to go on; default: a folder of the Trainer's.
        device: where one block at a time is solved, ``"cuda"`` for a model that stays on the CPU.
        calibration_samples: how many samples calibrate.
        arguments: see :class:`PostTrainingQuantization`.

    Attributes:
        solved: what was noted of each layer in this process: tokens, and the error of its output relative to it.

    Raises:
        ValueError: for an unknown format or pattern, NaN in the calibration
            data, or a model without blocks.

    >>> callback = GPTQ(weights="int4_g128", calibration_samples=128)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        weights: str = "int4_g128",
        activations: str | None = None,
        ranges: str = "lp",
        damp: float = 0.01,
        act_order: bool = False,
        static_groups: bool | None = None,
        block_size: int = 128,
        blocks: Sequence[str] | None = None,
        min_tokens: float = 4.0,
        state_dir: str | None = None,
        device: str | None = None,
        calibration_samples: int = 128,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, ranges, calibration_samples=calibration_samples, **arguments)
        self.formats = replace(self.formats, weight_defaults={"symmetric": False, "granularity": "channel"})
        self.static_groups = act_order if static_groups is None else static_groups
        if act_order and not self.static_groups:
            raise ValueError("act_order=True takes columns out of their groups: leave static_groups to None")
        self.solver = ColumnSolver(damp, act_order, block_size)
        self.blocks = [blocks] if isinstance(blocks, str) else None if blocks is None else list(blocks)
        self.min_tokens, self.state_dir, self.device = min_tokens, state_dir, device
        self.solved: dict[str, Notes] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {
            "damp": self.solver.damp,
            "act_order": self.solver.act_order,
            "static_groups": self.static_groups,
            "blocks": self.blocks,
        }
        return {**super().arguments, **own}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The layers inside blocks, and those that ``overrides`` names."""
        plan = super().plan_for(model, graph)
        blocks = tuple(f"{name}." for name in self.blocks_in(model, graph, plan))
        for name in list(plan.layers):
            if not name.startswith(blocks) and not any(matches(name, pattern) for pattern in self.formats.overrides):
                del plan.layers[name]
                plan.skipped[name] = "it is outside the repeated blocks; name it in overrides={...} to quantize it"
        for name, layer in plan.layers.items():
            _check_format(name, model.get_submodule(name), layer.weights)
        return plan

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Static activations are observed on the float stream; then the blocks are solved, one after another."""
        batches, pl_module = list(batches), cast(LightningModule, model)
        if all(quantizer.scheme.dynamic for quantizer in plan.activation_quantizers(model).values()):
            self.give_back_unreached(model, plan, set(graph.order))
        else:
            self.observe_activations(model, plan, batches, run, self.rule)
        blocks = self.blocks_in(model, graph, plan)
        inside = tuple(f"{block}." for block in blocks)
        layers = {
            name: layer
            for name, layer in plan.quantized_layers(model).items()
            if layer.weight_names == ("weight",) and layer.weight_quantizer and name.startswith(inside)
        }
        others = {name: layer for name, layer in plan.quantized_layers(model).items() if name not in layers}
        self.fit_weights(others, self.rule)  # until it is solved, a layer computes with its float weight
        self.solved = solve_blocks(
            pl_module.trainer,
            pl_module,
            self,
            blocks,
            layers,
            batches,
            run,
            {"method": type(self).__name__, **self.arguments},
            self.state_dir,
            self.device,
            self.min_tokens,
        )
        for name in layers.keys() - self.solved.keys():
            plan.give_back(model, name, "calibration never reached it")

    def blocks_in(self, model: nn.Module, graph: ModelGraph, plan: Plan) -> list[str]:
        """Names of the blocks that hold planned layers, in the order in which they run."""
        return blocks_of(model, graph, list(plan.layers), self.blocks)

    # ---------------------------------------------------------------- one layer, as solve_blocks asks for it

    def statistics(self, name: str, layer: nn.Module) -> Hessian:
        """The Hessian."""
        return Hessian.of(layer)

    def token_weights(self, block: Block) -> Sequence[Tensor] | None:
        """All tokens count alike."""
        return None

    def solve(self, name: str, layer: nn.Module, statistics: Hessian) -> Notes:
        """Round one weight; its scales and codes go into its quantizer."""
        assert isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None
        rows = layer.weight_rows().detach()
        weight, hessians = rows.flatten(1).double(), statistics.matrix()
        hessians = hessians.unsqueeze(0) if hessians.dim() == 2 else hessians  # convolutions: one for each group
        mask = layer.masks().get("weight")
        keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.keep.reshape(weight.shape)
        parts = [
            self.round(part, hessian, Rounding(layer.weight_quantizer, self.rule, self.static_groups), kept, statistics)
            for part, hessian, kept in zip(
                weight.chunk(len(hessians)), hessians, keep.chunk(len(hessians)), strict=True
            )
        ]
        values = torch.cat([part.values for part in parts])
        state = [
            torch.cat(found) if len(found) > 1 else found[0] for found in zip(*(p.state for p in parts), strict=True)
        ]
        settle(layer.weight_quantizer, state, values.reshape(rows.shape))
        return {"error": relative_error(weight, values, hessians), **parts[0].notes}

    def round(self, weight: Tensor, hessian: Tensor, rounding: Rounding, keep: Tensor, statistics: Hessian) -> Rounded:
        """Find the values of a weight, and their scales.

        Args:
            weight: (out, in).
            hessian: (in, in), not damped.
            rounding: rounds to its format.
            keep: false where another method has set a weight to 0, which it stays: (out, in).
            statistics: what the Hessian is of.
        """
        return self.solve_columns(weight, hessian, rounding, keep)

    def solve_columns(self, weight: Tensor, hessian: Tensor, rounding: Rounding, keep: Tensor) -> Rounded:
        """Column by column."""
        fix = rounding if bool(keep.all()) else Masking(mask=keep, then=rounding)
        return Rounded(self.solver.solve(weight, hessian, fix).values, rounding.state, {})


class Rounded(NamedTuple):
    """A weight as values of its format, their scales, and what is worth a note."""

    values: Tensor
    state: Sequence[Tensor]
    notes: Notes


def _check_format(name: str, layer: nn.Module, weights: str | None) -> None:
    """Refuse one scale for what is solved in parts."""
    scheme = Scheme.parse(weights or "int8")
    if scheme.granularity == "tensor" and getattr(layer, "groups", 1) > 1:
        raise ValueError(
            f"weights={weights!r}: the groups of channels of `{name}` are solved apart, each with scales of its own; "
            f"set overrides={{{name!r}: ...}} with one scale per channel"
        )
