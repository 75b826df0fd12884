"""What every quantized twin of a layer shares.

A float layer becomes its quantized twin *in place*: the object, its Parameters, its hooks, its name and its training
flag stay, only the class changes and quantizers are added as children. So an optimizer built earlier still trains it,
``isinstance(m, nn.Linear)`` still holds, and the way back is to take the quantizers out and to set the class again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_quant.layers.dilation import Dilation
from lightning_quant.layers.low_rank import LowRank
from lightning_quant.quantizers import (
    CrossQuantizer,
    Mask,
    NoisyQuantizer,
    Pattern,
    Quantizer,
    Scheme,
    build_quantizer,
)


class QuantizedLayer(nn.Module):
    """A layer that computes with quantized weights and inputs, or pruned weights; mixed in before the float class.

    It has slots: for every weight ``p`` a child ``p_quantizer`` and, in front of that, a child ``p_pruning``, and for
    every input a child like ``input_quantizer``; a child that is ``None`` leaves its tensor as it is. In
    ``bias_quantizer`` is another bias, where a method has found one; it stands in codes like solved weights, and the
    float one stays. Several methods may work on one layer, each in slots of its own: :attr:`WEIGHTS`, :attr:`INPUTS`,
    :attr:`PRUNED`, :attr:`BIASES`. ``folded`` says whether a neighbouring norm has been folded into the weights.
    """

    WEIGHTS: ClassVar[str] = "weights"
    INPUTS: ClassVar[str] = "inputs"
    PRUNED: ClassVar[str] = "pruned"
    BIASES: ClassVar[str] = "biases"
    SLOTS: ClassVar[tuple[str, ...]] = (WEIGHTS, INPUTS, PRUNED, BIASES)

    float_class: ClassVar[type[nn.Module]]
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    input_quantizers: ClassVar[tuple[str, ...]] = ("input_quantizer",)
    input_axis: ClassVar[int] = -1
    transposed: ClassVar[bool] = False  # whether the weight is stored as (in, out)
    takes_bias: ClassVar[bool] = True  # whether it can have another bias than the float layer has

    folded: Tensor
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    bias_quantizer: Quantizer | None

    def add_quantizers(
        self,
        weights: Scheme | None,
        inputs: Scheme | None,
        pruned: Pattern | None = None,
        biases: Scheme | None = None,
    ) -> None:
        """Fill slots with uncalibrated quantizers and undecided masks; what is in the others stays."""
        for slot, content in zip(self.SLOTS, (weights, inputs, pruned, biases), strict=True):
            for name in self._children_of(slot):
                if content is not None and getattr(self, name, None) is not None:
                    raise ValueError(f"its {slot} slot is not free: `{name}` is {getattr(self, name)}")
                if isinstance(content, Pattern):
                    self.register_module(name, Mask(content).to(self.device).train(self.training))
                elif content is not None or not hasattr(self, name):
                    self.set_quantizer(name, content, axis=self.input_axis if slot == self.INPUTS else 0)
        if "folded" not in self._buffers:
            self.register_buffer("folded", torch.tensor(False, device=self.device))

    def empty(self, slot: str) -> None:
        """Take out what is in a slot, and give back the codes that were solved for before pruning."""
        for name, mask in self.masks().items() if slot == self.PRUNED else ():
            quantizer = self.weight_quantizers().get(name)
            if quantizer is not None and mask.before is not None:
                quantizer.codes = mask.before
        for name in self._children_of(slot):
            setattr(self, name, None)
        if slot == self.WEIGHTS:
            self._drop_beside()

    def filled(self) -> set[str]:
        """The slots that something is in."""
        return {
            slot
            for slot in self.SLOTS
            if any(getattr(self, name, None) is not None for name in self._children_of(slot))
        }

    def drop_quantizers(self) -> None:
        """Take all slots out again, as far as they were put in: adding them may have been interrupted."""
        for name in [*(name for slot in self.SLOTS for name in self._children_of(slot)), "folded"]:
            if hasattr(self, name):
                delattr(self, name)
        self._drop_beside()

    def _drop_beside(self) -> None:
        for name in ("weight_low_rank", "input_dilation"):
            self._modules.pop(name, None)

    def _children_of(self, slot: str) -> list[str]:
        if slot == self.INPUTS:
            return list(self.input_quantizers)
        if slot == self.BIASES:
            return ["bias_quantizer"] if self.takes_bias else []
        return [f"{name}_{'quantizer' if slot == self.WEIGHTS else 'pruning'}" for name in self.present_weights()]

    def set_quantizer(self, name: str, scheme: Scheme | None, axis: int, parts: Sequence[int] | None = None) -> None:
        """Put an uncalibrated quantizer under a name, in the place of what was there."""
        quantizer = None if scheme is None else build_quantizer(scheme, axis, parts)
        self.register_module(name, quantizer)
        if quantizer is not None:
            quantizer.to(self.device).train(self.training)  # born in training mode otherwise

    def make_noisy(self) -> None:
        """Let the input's quantizer have a fixed noise in front of it, none for now."""
        assert self.input_quantizer is not None
        noisy = NoisyQuantizer(self.input_quantizer.scheme, self.input_axis)
        self.input_quantizer = noisy.to(self.device).train(self.training)

    def add_low_rank(self, rank: int) -> None:
        """Put a branch beside the weight, unknown for now; it goes with what is in the slot of weights."""
        self.register_module("weight_low_rank", LowRank(rank).to(self.device).train(self.training))

    def low_rank_branch(self, name: str = "weight") -> LowRank | None:
        """The branch beside a weight, if there is one."""
        branch = self._modules.get(f"{name}_low_rank")
        return branch if isinstance(branch, LowRank) else None

    def make_dilated(self) -> None:
        """Let input channels be divided by what the weights that read them are multiplied with: by 1 for now."""
        self.register_module(
            "input_dilation", Dilation(self.weight_rows().shape[1]).to(self.device).train(self.training)
        )

    @property
    def dilated_by(self) -> Dilation | None:
        """What its input channels are divided by, if anything."""
        return cast(Dilation | None, self._modules.get("input_dilation"))

    def narrowed(self, x: Tensor) -> Tensor:
        """The input as it is quantized, divided where the weights were dilated."""
        dilation = self.dilated_by
        return x if dilation is None else dilation.narrow(x, self.input_axis)

    def make_crossed(self, alpha: float) -> None:
        """Let the input's step be a mixture of its token's and its channel's."""
        assert self.input_quantizer is not None
        crossed = CrossQuantizer(self.input_quantizer.scheme, self.input_axis, alpha)
        self.input_quantizer = crossed.to(self.device).train(self.training)

    def make_split(self, parts: Sequence[int]) -> None:
        """Let each part of a joined input have a scale of its own, and the input channels of the weight behind it."""
        for name, axis in (("input_quantizer", self.input_axis), ("weight_quantizer", 0)):
            quantizer = getattr(self, name)
            if quantizer is not None:
                self.set_quantizer(name, quantizer.scheme, axis, parts)

    @property
    def device(self) -> torch.device:
        """Where the layer's weights live."""
        return next(self.parameters(recurse=False)).device

    def present_weights(self) -> list[str]:
        """Names of the weight Parameters that this layer has."""
        return [name for name in self.weight_names if getattr(self, name, None) is not None]

    def float_rows(self, name: str = "weight") -> Tensor:
        """The float weight with output channels first: (out, ...)."""
        weight: Tensor = getattr(self, name)
        return weight.t() if self.transposed else weight

    def weight_rows(self, name: str = "weight") -> Tensor:
        """What is quantized: the float weight without what is pruned, dilated, output channels first: (out, ...)."""
        mask = getattr(self, f"{name}_pruning", None)
        rows: Tensor = self.float_rows(name) if mask is None else mask(self.float_rows(name))
        return rows if self.dilated_by is None else self.dilated_by.widen(rows)

    def masks(self) -> dict[str, Mask]:
        """The masks of pruned weights, by the name of the Parameter."""
        found = {name: getattr(self, f"{name}_pruning", None) for name in self.present_weights()}
        return {name: mask for name, mask in found.items() if mask is not None}

    def weight_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the weights, by the name of the Parameter."""
        found = {name: getattr(self, f"{name}_quantizer") for name in self.present_weights()}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def activation_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the inputs, by their own name."""
        found = {name: getattr(self, name) for name in self.input_quantizers}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def float_bias(self) -> Tensor:
        """The float bias, zeros where there is none: (out,)."""
        bias = cast(Tensor | None, self.bias)
        rows = self.float_rows()
        return rows.new_zeros(len(rows)) if bias is None else bias

    def full_bias(self) -> Tensor | None:
        """The bias as the layer computes with it: its own or what was found for it, and what makes good for pruning."""
        bias, mask = cast(Tensor | None, self.bias), self.masks().get("weight")
        if self.bias_quantizer is not None:
            bias = through(self.bias_quantizer, self.float_bias())
        if mask is None or mask.correction is None or mask.observer is not None:
            return bias
        return mask.correction if bias is None else bias + mask.correction

    def with_bias(self, bias: Tensor) -> AbstractContextManager[None]:
        """Let the layer add this bias for a while, which may be a Parameter that learns."""
        assert self.bias_quantizer is not None
        return self.bias_quantizer.observed_by(lambda given: bias.to(given.dtype))

    def settle_bias(self, bias: Tensor) -> None:
        """Find this bias for the layer, rounded to the format of ``bias_quantizer``."""
        assert self.bias_quantizer is not None
        self.bias_quantizer.fit(bias, "minmax")
        self.bias_quantizer.solve(self.bias_quantizer.encode(bias.detach()))

    def quantized(self, name: str = "weight") -> Tensor:
        """The weight as the layer computes with it, stored as the Parameter is."""
        rows = self.rounded_rows(name)
        return rows.t() if self.transposed else rows

    def rounded_rows(self, name: str = "weight") -> Tensor:
        """The same with output channels first: (out, ...)."""
        rows = through(getattr(self, f"{name}_quantizer"), self.weight_rows(name))
        branch = self.low_rank_branch(name)
        return rows if branch is None else cast(Tensor, branch(rows))

    def weight_integers(self, weight: Tensor) -> Tensor:
        """A weight on the grid of ``weight_quantizer``, counted in steps from 0, stored as the Parameter is."""
        assert self.weight_quantizer is not None
        scale, shape = self.weight_quantizer.scale, [1] * weight.dim()
        shape[-1 if self.transposed else 0] = -1
        return (weight * scale.reciprocal().view(shape if scale.dim() else ())).round_()

    @torch.no_grad()
    def prune(self, keep: Tensor, rows: Tensor | None = None, name: str = "weight") -> None:
        """Decide a mask: what it keeps, and what became of that.

        Codes that were solved for are pruned with it: those of pruned weights become the code of 0.

        Args:
            keep: bool (out, ...).
            rows: the kept weights where a solver changed them, (out, ...); ``None`` keeps what the layer computes with.
            name: of the weight.
        """
        mask, quantizer = self.masks()[name], self.weight_quantizers().get(name)
        codes = None if quantizer is None else quantizer.codes
        if quantizer is not None and codes is not None:
            quantizer.codes = None
            solved = codes.int() if rows is None else quantizer.encode(rows)
            quantizer.solve(solved.where(keep, quantizer.encode(torch.zeros_like(self.float_rows(name)))))
            mask.before = codes
            rows = None
        offset = None if rows is None else (rows - self.float_rows(name)).to(self.float_rows(name)) * keep
        mask.decide(keep, offset)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """A float state dict knows nothing of ``folded``: its weights are not."""
        own = [key for key in state_dict if key.startswith(prefix)]
        if not any("_quantizer" in key or "_pruning." in key or key == f"{prefix}folded" for key in own):
            state_dict[f"{prefix}folded"] = torch.tensor(False)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)


def through(quantizer: Quantizer | None, x: Tensor) -> Tensor:
    """``x`` as the quantizer gives it back, or ``x`` itself where there is none."""
    if quantizer is None:
        return x
    quantized: Tensor = quantizer(x)
    return quantized
