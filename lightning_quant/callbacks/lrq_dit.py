"""LRQDiT: logarithmic weights, and a rotation chosen for each layer (2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_quant.calibration import channel_extremes, first_samples, fluctuations, sampled_inputs
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.checkpoint import record_of
from lightning_quant.graph import ModelGraph, matching
from lightning_quant.layers import (
    BlockRotation,
    Plan,
    QuantizedLayer,
    RotationPlan,
    SmoothedRotation,
    any_kind,
    as_float,
    online_rotation,
    rotates,
    weight_rows,
)
from lightning_quant.transforms import (
    fit_block_rotation,
    fold_smoothed,
    require_same,
    smoothing,
    unfolded_on_failure,
)


class LRQDiT(PostTrainingQuantization):
    r"""Smooths and rotates what each linear layer reads, and rounds its weights to levels spaced logarithmically.

    *Smoothing*, in front of everything else, with :math:`\alpha = 1/2` by default:

    .. math:: c_j = \frac{\max |W_{:j}|^\alpha}{\max |X_j|^{1-\alpha}}, \qquad x' = x \odot c, \quad W' = W / c

    *ARS*, a rotation chosen for each layer, :math:`y = (x' R)(W' R)^\top`. Most layers get a Hadamard matrix with
    random signs, which spreads outliers of any channel alike. The layers that fluctuate most, by
    :math:`\text{mean} \max|x'| / Q_{0.99}(|x'|)`, get a rotation found for the outliers they have: greedily in blocks
    of 128, with channels dealt out anew, and greedily again (as DuQuant, one for each block). The paper's code names
    these layers by hand; the rule, and that it takes a share of them, are reconstructed.

    *TLQ* (``"twinlog_N"``, :class:`~lightning_quant.quantizers.TwinLogQuantizer`): weights of each sign on levels

    .. math:: \hat w = \text{sign}(w) \, (2^{(q + z) \delta} - \eta)

    which lie close where the mass of a bell is, and reach into its tails. Activations are symmetric, with a range for
    each token as it arrives.

    Both transformations run in front of the layer, and are part of the plan and the state dict, so a checkpoint
    reloads; ``remove`` rotates back. Rounded logarithmically or not is a question of the weights: levels beat a clipped
    uniform grid on heavy tails, and not on what is bell-shaped or even flat. ``weights="int4"`` rotates, and rounds
    uniformly.

    Reference: *LRQ-DiT: Log-Rotation Post-Training Quantization of Diffusion Transformers for Image and Video
    Generation*, 2025. It leaves embeddings, modulations and the head float; say so with ``skip=``.

    Args:
        weights: format of the weights, ``None`` for float.
        activations: format of the layers' inputs, ``None`` for float; symmetric and per token where it does not say.
        ranges: how the ranges of uniform formats are found; see :class:`PostTrainingQuantization`.
        smooth: :math:`\alpha`, 0 to 1; ``None`` smooths nothing.
        rotation: ``"adaptive"`` as above, ``"hadamard"`` or ``"greedy"`` for all layers, ``None`` for none.
        massive: which layers have the greedy rotation if it is adaptive: a share of all, from 0 to 1, or name patterns.
        block: channels in a block of the greedy rotation.
        seed: of the rotations.
        attention: whether q, k, v and the attention probabilities are quantized.
        arguments: see :class:`PostTrainingQuantization`.

    Raises:
        ValueError: for a number out of range, an unknown rotation, a model that is rotated already, or one that
            computes something else afterwards.

    >>> callback = LRQDiT(weights="twinlog_4", activations="int8")
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    """

    step: ClassVar[str] = "rewrite"

    def __init__(
        self,
        weights: str | None = "twinlog_4",
        activations: str | None = "int8",
        ranges: str = "mse",
        smooth: float | None = 0.5,
        rotation: Literal["adaptive", "hadamard", "greedy"] | None = "adaptive",
        massive: float | Sequence[str] = 0.1,
        block: int = 128,
        seed: int = 0,
        attention: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(weights, activations, ranges, attention, **arguments)
        self.formats = replace(self.formats, activation_defaults={"symmetric": True, "granularity": "token"})
        if rotation not in ("adaptive", "hadamard", "greedy", None):
            raise ValueError(f"rotation={rotation!r} is none of 'adaptive', 'hadamard', 'greedy', None")
        if not (smooth is None or 0 <= smooth <= 1) or (isinstance(massive, (int, float)) and not 0 <= massive <= 1):
            raise ValueError(f"smooth={smooth} and massive={massive} must be from 0 to 1")
        if block < 2:
            raise ValueError(f"block={block} must be at least 2")
        self.smooth, self.rotation, self.block, self.seed = smooth, rotation, block, seed
        self.massive = massive if isinstance(massive, (int, float, str)) else list(massive)

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides the result."""
        own = {name: getattr(self, name) for name in ("smooth", "rotation", "massive", "block", "seed")}
        return {**super().arguments, **own}

    def plan_for(self, model: nn.Module, graph: ModelGraph) -> Plan:
        """The formats; refuses a model that is rotated already."""
        for name, module in model.named_modules():
            if rotates(module):
                raise ValueError(f"`{name}` rotates already: call remove(model) of the callback that made it do so")
        return super().plan_for(model, graph)

    def calibrate_plan(
        self, model: nn.Module, plan: Plan, graph: ModelGraph, batches: Iterable[Any], run: Callable[[Any], Any]
    ) -> None:
        """Smooth, choose the rotations, see that nothing has changed, and quantize."""
        batches = list(batches)
        samples = first_samples(batches[0], 2)
        shared = {name.rpartition(".")[0] for group in graph.tied for name in group}
        shared |= {name for names in graph.functional.values() for name in names}
        layers = {
            name: layer
            for name, layer in plan.quantized_layers(model).items()
            if name in graph.order and name not in shared and _reads_rows(layer)
        }
        if self.smooth is None and self.rotation is None:
            layers = {}
        with unfolded_on_failure(list(layers.values())):
            with as_float(model):
                exact = run(samples)
                self.smooth_and_rotate(model, plan, layers, batches, run)
                require_same(exact, run(samples), "set smooth=None or rotation=None")
            super().calibrate_plan(model, plan, graph, batches, run)

    def smooth_and_rotate(
        self,
        model: nn.Module,
        plan: Plan,
        layers: dict[str, QuantizedLayer],
        batches: list[Any],
        run: Callable[[Any], Any],
    ) -> None:
        """Find what each input is multiplied and rotated with, and fold its inverse into the weight behind it."""
        scales = {}
        if self.smooth is not None:
            for name, extremes in channel_extremes(layers, batches, run).items():
                weights = [weight_rows(layers[name])]
                scales[name] = 1 / smoothing(*extremes, weights, 1 - self.smooth, centre=False).divisor.float()
        massive = self.massive_layers(layers, scales, batches, run)
        read = sampled_inputs({name: layers[name] for name in massive}, lambda: run(batches[0]))
        for name, layer in layers.items():
            kind = any_kind(weight_rows(layer).shape[1]) if self.rotation is not None else "none"
            rotation = RotationPlan("greedy" if name in massive else kind, self.seed, smoothed=True)
            rotation.block = self.block if name in massive else None
            rotation.online[name] = "input"
            rotation.put_online(model)
            plan.rotations.append(rotation)
            smoothed = cast(SmoothedRotation, online_rotation(layer))
            smoothed.scale.copy_(scales.get(name, smoothed.scale))
            if isinstance(smoothed.rotation, BlockRotation) and name in read:
                fit_block_rotation(smoothed.rotation, read[name] * smoothed.scale, seed=self.seed)
            fold_smoothed(layer, smoothed)
        rank_zero_info(f"{type(self).__name__} rotates {len(layers)} inputs, {len(massive)} of them greedily.")

    def massive_layers(
        self,
        layers: dict[str, QuantizedLayer],
        scales: dict[str, Tensor],
        batches: list[Any],
        run: Callable[[Any], Any],
    ) -> list[str]:
        """The layers whose rotation is found for what they read."""
        if self.rotation != "adaptive":
            return list(layers) if self.rotation == "greedy" else []
        if not isinstance(self.massive, (int, float)):
            patterns = [self.massive] if isinstance(self.massive, str) else self.massive
            return list(dict.fromkeys(name for one in patterns for name in matching(layers, one, "massive")))
        found = fluctuations(layers, batches, run, scales)
        return sorted(found, key=lambda name: -found[name])[: round(self.massive * len(layers))]

    def remove(self, model: nn.Module) -> None:
        """Give the float model back, rotated back up to rounding."""
        record = record_of(model)
        plan = None if record is None else record.plans.get(self.state_key)
        rotated = [name for rotation in (plan.rotations if plan is not None else []) for name in rotation.online]
        smoothed = {name: online_rotation(model.get_submodule(name)) for name in rotated}
        super().remove(model)
        for name, rotation in smoothed.items():
            fold_smoothed(model.get_submodule(name), cast(SmoothedRotation, rotation), inverse=True)
        if rotated:
            rank_zero_warn(
                f"{type(self).__name__}.remove: the model is float again and rotated back; it computes the same "
                f"function up to rounding. Load the float checkpoint to have the original weights."
            )


def _reads_rows(layer: nn.Module) -> bool:
    """Whether a layer multiplies one input, channels last, with one weight."""
    return (
        isinstance(layer, QuantizedLayer) and layer.input_quantizers == ("input_quantizer",) and layer.input_axis == -1
    )
