"""What is learned of one unit: the rounding of its weights and the scales of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.layers import QuantAttention, QuantizedLayer, has_scale_to_learn, learn_scale, settle_scale
from lightning_quant.modules.unit_data import UnitBatch
from lightning_quant.quantizers import LearnedQuantizer, Quantizer, StepQuantizer
from lightning_quant.solvers import ROUNDINGS, Reconstruction, WeightRounding, moment_distance


class UnitLearning:
    """The Parameters of one unit in one phase, and the formulas that they are trained by.

    Args:
        model: the quantized model.
        unit: name of the unit.
        phase: ``"weights"``, ``"activations"`` or ``"joint"``.
        settings: what is learned and how.
        layers: names of the quantized layers that take part.
    """

    def __init__(
        self, model: nn.Module, unit: str, phase: str, settings: Reconstruction, layers: Sequence[str]
    ) -> None:
        self.model, self.unit, self.phase, self.settings = model, unit, phase, settings
        prefix = f"{unit}." if unit else ""
        inside = {
            f"{prefix}{name}".removesuffix("."): module for name, module in model.get_submodule(unit).named_modules()
        }
        self.layers = [name for name in inside if name in layers]
        self.channels = [
            len(layer.weight_rows()) for layer in inside.values()
            if isinstance(layer, QuantizedLayer) and layer.present_weights()[:1] == ["weight"]
        ]  # fmt: skip
        self.activations = [
            f"{name}.{key}"
            for name, module in inside.items()
            if isinstance(module, (QuantizedLayer, QuantAttention))
            for key, quantizer in module.activation_quantizers().items()
            if not isinstance(quantizer, StepQuantizer)  # the samples of a unit do not tell their steps
        ]
        self.roundings: dict[str, WeightRounding] = {}
        self.scales: dict[str, LearnedQuantizer] = {}
        self.biases: dict[str, nn.Parameter] = {}
        self.random: torch.Generator | None = None

    @property
    def has_something_to_learn(self) -> bool:
        """Whether there is a weight to round, or a scale to learn, in this phase."""
        layers = [self.model.get_submodule(name) for name in self.layers]
        rounded = any(isinstance(layer, QuantizedLayer) and layer.weight_quantizers() for layer in layers)
        scaled = self.settings.scale_learning_rate is not None and any(
            has_scale_to_learn(self._quantizer(name)) for name in self.activations
        )
        weights = self.phase != "activations" and self.settings.rounding != "nearest" and rounded
        return weights or (self.phase != "weights" and scaled)

    @contextmanager
    def learn(self, seed: int) -> Iterator[None]:
        """Put what is learned in the place of what is rounded; undone at the end."""
        with ExitStack() as stack:
            if self.phase != "activations" and self.settings.rounding != "nearest":
                for name in self.layers:
                    stack.enter_context(self._rounded(name))
            if self.phase != "weights":
                if self.settings.scale_learning_rate is not None:
                    stack.enter_context(self._scaled())
                if self.settings.keep < 1:
                    device = next(self.model.parameters()).device
                    self.random = torch.Generator(device).manual_seed(seed)
                    for name in self.activations:
                        stack.enter_context(self._quantizer(name).observed_by(self._dropping(self._quantizer(name))))
            yield

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is learned."""
        return [parameter for group in self.groups() for parameter in group["params"]]

    def groups(self) -> list[dict[str, Any]]:
        """The Parameters with their learning rates, as an optimizer takes them."""
        scale_lr = self.settings.scale_learning_rate or 0.0
        groups: list[dict[str, Any]] = []
        for rounding in self.roundings.values():
            size = getattr(rounding, "scale", torch.ones(())).detach().abs().mean().item()
            groups += rounding.groups(self.settings.learning_rate, scale_lr * size)
        for bias in self.biases.values():
            groups.append({"params": [bias], "lr": self.settings.bias_learning_rate, "decay": True})
        for quantizer in self.scales.values():
            size = quantizer.scale.detach().abs().mean().item()
            groups.append({"params": [quantizer.scale], "lr": scale_lr * size, "decay": True})
        return groups

    def mixed_inputs(self, batch: UnitBatch) -> list[Tensor]:
        """The arguments, element by element from the quantized stream or the float one."""
        if batch.quantized is None or batch.float_ is None:
            return batch.quantized or batch.float_ or []
        return [
            torch.where(self._kept(a), a, b) if a.is_floating_point() else a
            for a, b in zip(batch.quantized, batch.float_, strict=True)
        ]

    def penalty(self, step: int) -> Tensor | float:
        """What undecided weights cost at a step."""
        sharpness = self.settings.sharpness_at(step)
        if sharpness is None or not self.roundings:
            return 0.0
        return self.settings.penalty * sum(rounding.penalty(sharpness) for rounding in self.roundings.values())

    def distance(self, out: Tensor, target: Tensor, importance: Tensor | None) -> Tensor:
        """The error, summed over the channels and averaged over all else."""
        error = (out.float() - target.float()).abs().pow(self.settings.norm)
        if importance is not None:
            error = error * importance
        # The channels are the last axis, but axis 1 behind convolutions: the last layer's width tells.
        width = next((size for size in reversed(self.channels) if size in target.shape[1:]), target.shape[-1])
        return error.mean() * width

    def layer_distance(self, name: str, out: Tensor, target: Tensor) -> Tensor:
        """The error of a layer inside the unit."""
        if self.settings.layer_loss == "mse":
            return self.distance(out, target, None)
        layer = self.model.get_submodule(name)
        return moment_distance(out, target, layer.input_axis if isinstance(layer, QuantizedLayer) else -1)

    def after_step(self) -> None:
        """The optimizer may have pushed a scale below 0."""
        for quantizer in self.scales.values():
            quantizer.keep_positive()

    def harden(self) -> None:
        """Decide every weight of the unit.

        Raises:
            RuntimeError: if a quantized weight had no rounding, or what it hardens to is not what was computed with.
        """
        if self.phase == "activations" or self.settings.rounding == "nearest":
            return
        for layer_name in self.layers:
            layer = self.model.get_submodule(layer_name)
            assert isinstance(layer, QuantizedLayer)
            for weight, quantizer in layer.weight_quantizers().items():
                name = f"{layer_name}.{weight}"
                if name not in self.roundings:
                    raise RuntimeError(f"`{name}` was not covered by the reconstruction of `{self.unit}`")
                try:
                    self.roundings[name].harden(quantizer)
                except ValueError as error:
                    raise ValueError(f"`{name}`: {error}") from error
            if layer_name in self.biases:
                layer.settle_bias(self.biases[layer_name].detach())

    # ---------------------------------------------------------------- private

    @contextmanager
    def _rounded(self, name: str) -> Iterator[None]:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        with ExitStack() as stack:
            for weight, quantizer in layer.weight_quantizers().items():
                rounding = ROUNDINGS[self.settings.rounding](quantizer, layer.weight_rows(weight))
                self.roundings[f"{name}.{weight}"] = rounding
                stack.enter_context(quantizer.observed_by(_by(rounding)))
            if layer.bias_quantizer is not None:
                self.biases[name] = nn.Parameter(layer.float_bias().detach().clone().float())
                stack.enter_context(layer.with_bias(self.biases[name]))
            yield

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        for name in self.activations:
            learned = learn_scale(self.model, name)
            if learned is not None:
                self.scales[name] = learned
        try:
            yield
        finally:
            for name in self.scales:
                settle_scale(self.model, name)

    def _quantizer(self, name: str) -> Quantizer:
        quantizer = self.model.get_submodule(name)
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def _dropping(self, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(self._kept(x), quantizer.rounded(x), x)

    def _kept(self, x: Tensor) -> Tensor:
        if self.random is None:
            return torch.ones((), dtype=torch.bool, device=x.device)
        return torch.rand(x.shape, generator=self.random, device=x.device) < self.settings.keep


def _by(rounding: WeightRounding) -> Callable[[Tensor], Tensor]:
    return lambda weight: rounding.weight().to(weight.dtype)


@contextmanager
def activations_float(model: nn.Module) -> Iterator[None]:
    """Let only the weights of a quantized model be quantized for a while."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (QuantizedLayer, QuantAttention)):
                for quantizer in module.activation_quantizers().values():
                    stack.enter_context(quantizer.observed_by(_as_it_is))
        yield


def _as_it_is(x: Tensor) -> Tensor:
    return x
