"""What a reconstruction learns, how long and from what: plain settings, and the presets of the literature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_quant.solvers.rounding import ROUNDINGS


@dataclass(frozen=True)
class Reconstruction:
    r"""How the units of a quantized model are fitted to their float twins, one after another.

    .. math:: \min_{V, s} \; \|f(x) - \hat f(\hat x; V, s)\|^p + \lambda \sum 1 - |2 h(V) - 1|^\beta

    where :math:`f` is a unit of the float model, :math:`\hat f` the quantized one, :math:`V` the rounding of its
    weights and :math:`s` the scales of its activations.

    Args:
        granularity: what a unit is: ``"layer"``, ``"block"`` (what repeats, and layers outside of that alone),
            ``"inner"`` (as small as can be: the residual and attention blocks of a U-Net), ``"stage"`` (a module that
            holds several blocks), or name patterns of modules.
        phases: what is learned in which pass over the units: ``"weights"`` (activations are float meanwhile),
            ``"activations"``, or ``"joint"`` for both at once.
        rounding: ``"adaround"``, ``"joint"`` (with the step size), ``"weights"`` (the float weight itself), ``"free"``
            (the weight, its scale and its zero point) or ``"nearest"`` (nothing is learned).
        inputs: what a unit is fed: the output of the ``"quantized"`` units before it, that of the ``"float"`` ones, or
            ``"mixed"``, element by element (QDrop).
        keep: the probability that an element stays quantized, in mixed inputs and in the unit's own activations;
            1 drops none.
        iterations: steps per unit.
        batch_size: samples per step.
        samples: how many samples are drawn; their inputs and outputs of one unit are kept at a time.
        learning_rate: of the rounding, with Adam; for ``"free"`` in steps of the grid.
        scale_learning_rate: of the scales, with Adam, falling to 0 along a cosine; ``None`` leaves them alone. It is
            relative to the scale itself.
        bias_learning_rate: of biases, with Adam, where a method gives its layers one of their own.
        penalty: :math:`\lambda`, what an undecided weight costs.
        warmup: the part of the steps without penalty.
        sharpness: :math:`\beta` after the warm-up and at the end, falling in a straight line.
        norm: the exponent :math:`p` of the error.
        loss: ``"mse"``, or ``"fisher"``, which weights the error by how much the model's output depends on it.
        layer_weight: what the errors of the layers inside a unit count, beside that of its output.
        layer_loss: what these errors are: ``"mse"``, or ``"moments"`` for mean and standard deviation of each channel.
        last_layer: whether the last layer of a unit is among these; its output is nearly the unit's own.
        global_weight: what the error of the model's own output counts, when the unit's output runs through the float
            layers behind it.
        global_loss: what that error is: ``"kl"`` between softmaxes along the last axis, or ``"mse"``.
        global_every: in every how many steps it is evaluated; it counts as many times then.
        balance: whether these errors are measured by what they are before anything is learned, on average of a few
            batches, in units of what the unit's own is then; otherwise they are added as they are.
        patience: end a unit when its loss has not fallen for that many steps; 0 never does.
        cache: where a unit's inputs and outputs are kept: ``"ram"``, ``"disk"``, or ``"recompute"`` for nowhere.
        seed: of the order of samples and of dropped elements.

    Raises:
        ValueError: for a value that is out of range.

    Example:
        >>> Reconstruction.parse("qdrop").keep
        0.5
        >>> Reconstruction.parse(Reconstruction(iterations=100)).iterations
        100
    """

    granularity: Literal["layer", "block", "inner", "stage"] | list[str] = "block"
    phases: list[str] = field(default_factory=lambda: ["joint"])
    rounding: str = "adaround"
    inputs: Literal["quantized", "float", "mixed"] = "mixed"
    keep: float = 0.5
    iterations: int = 200
    batch_size: int = 16
    samples: int = 256
    learning_rate: float = 1e-2
    scale_learning_rate: float | None = 1e-3
    bias_learning_rate: float = 1e-3
    penalty: float = 0.01
    warmup: float = 0.2
    sharpness: tuple[float, float] = (20.0, 2.0)
    norm: float = 2.0
    loss: Literal["mse", "fisher"] = "mse"
    layer_weight: float = 0.0
    layer_loss: Literal["mse", "moments"] = "mse"
    last_layer: bool = True
    global_weight: float = 0.0
    global_loss: Literal["kl", "mse"] = "kl"
    global_every: int = 4
    balance: bool = False
    patience: int = 0
    cache: Literal["ram", "disk", "recompute"] = "ram"
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[str]] = {
            "rounding": [*ROUNDINGS, "nearest"],
            "inputs": ["quantized", "float", "mixed"],
            "loss": ["mse", "fisher"],
            "layer_loss": ["mse", "moments"],
            "global_loss": ["kl", "mse"],
            "cache": ["ram", "disk", "recompute"],
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, allowed))}")
        if isinstance(self.granularity, str) and self.granularity not in ("layer", "block", "inner", "stage"):
            raise ValueError(
                f"granularity={self.granularity!r} is none of 'layer', 'block', 'inner', 'stage'; "
                "name patterns go in a list"
            )
        if not self.phases or not set(self.phases) <= {"weights", "activations", "joint"}:
            raise ValueError(f"phases={self.phases} must be of 'weights', 'activations' and 'joint'")
        if sum(phase != "activations" for phase in self.phases) > 1:
            raise ValueError(f"phases={self.phases} decide the rounding of weights more than once")
        if not 0 <= self.keep <= 1 or not 0 <= self.warmup <= 1:
            raise ValueError(f"keep={self.keep} and warmup={self.warmup} are parts, from 0 to 1")
        for name in ("iterations", "batch_size", "samples", "global_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("layer_weight", "global_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, found {getattr(self, name)}")

    @classmethod
    def parse(cls, given: str | Reconstruction | dict[str, Any]) -> Reconstruction:
        """A preset by its name, or settings as they are."""
        if isinstance(given, str):
            if given not in PRESETS:
                raise ValueError(f"reconstruct={given!r} is none of {', '.join(map(repr, PRESETS))}")
            return cls(**PRESETS[given])
        return cls(**given) if isinstance(given, dict) else given

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the result, as strings and numbers."""
        kept = asdict(self)
        del kept["cache"]
        return {**kept, "sharpness": list(self.sharpness)}

    def sharpness_at(self, step: int) -> float | None:
        """The exponent of the penalty at a step; ``None`` during the warm-up, which has no penalty.

        Example:
            >>> plan = Reconstruction(iterations=100)
            >>> plan.sharpness_at(19), plan.sharpness_at(20), plan.sharpness_at(100)
            (None, 20.0, 2.0)
        """
        start = self.warmup * self.iterations
        if step < start:
            return None
        first, last = self.sharpness
        return first + (last - first) * (step - start) / max(1, self.iterations - start)


PRESETS: dict[str, dict[str, Any]] = {
    "adaround": {"granularity": "layer", "phases": ["weights"], "inputs": "quantized", "keep": 1.0},
    "brecq": {"granularity": "block", "phases": ["weights", "activations"], "inputs": "quantized", "keep": 1.0},
    "qdrop": {"granularity": "block", "phases": ["joint"], "inputs": "mixed", "keep": 0.5},
    "adaquant": {
        **{"granularity": "layer", "phases": ["joint"], "rounding": "free", "inputs": "quantized", "keep": 1.0},
        "learning_rate": 3e-3,
    },
    "mgrq": {
        **{"granularity": "block", "phases": ["joint"], "inputs": "quantized", "keep": 1.0, "balance": True},
        **{"global_weight": 0.05, "layer_weight": 0.5, "layer_loss": "moments"},
    },
    "edadm": {
        **{"granularity": "inner", "phases": ["joint"], "inputs": "mixed", "keep": 0.5, "penalty": 0.0},
        **{"layer_weight": 0.8, "last_layer": False, "learning_rate": 0.1},
    },
    "dilatequant": {
        **{"granularity": "inner", "phases": ["joint"], "rounding": "free", "inputs": "quantized", "keep": 1.0},
        **{"learning_rate": 5e-2, "scale_learning_rate": 1e-4},
    },
}
