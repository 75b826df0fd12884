"""The table that the generic tests run over. A new method adds its line, and is held to what every method promises.

One that only gives another method its arguments (LRPQViT, HTQ), or other levels or losses (DopQViT, MGRQ), shares that
one's line.

What that is stands in ``tests/callbacks``: lifecycle, round trips and ranks are tests of every line (the fixture
``case``), faults, foreign checkpoints, unusual models and trainers of METHODS (the fixture ``method``).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_quant import (
    GPTQ,
    PMQ,
    AdaQuant,
    MagnitudePruning,
    MixedPrecision,
    MPTQViT,
    NoisyQuant,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RepQuant,
    RepQViT,
    SmoothQuant,
)
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.layers import AttentionSite, QuantizedLayer
from tests.models import NoBias, NoDropout, Sequences, TinyTransformer, trainer


@dataclass(frozen=True, eq=False)
class Case:
    """A method, its arguments as YAML can say them, and the model that it quantizes.

    Calling it makes the callback; more arguments go on top: ``case(target="blocks.0")``.

    Args:
        method: the class of the callback.
        arguments: of the callback.
        model: the class of the LightningModule; it takes no arguments, and is the same each time it is built.
        stage: the verb of the Trainer in which the method does its work.
        learns: whether it takes gradient steps, so that two ranks agree with each other but not with one.
        solves: whether it finds the codes of weights without steps, so that the float weights have no say any more.
    """

    method: type[QuantizationCallback]
    arguments: dict[str, Any]
    model: type[L.LightningModule] = TinyTransformer
    stage: str = "validate"
    learns: bool = False
    solves: bool = False

    def __call__(self, **more: Any) -> QuantizationCallback:
        return self.method(**{**self.arguments, **more})

    def run(self, model: L.LightningModule, *callbacks: L.Callback, epochs: int = 1, **options: Any) -> L.Trainer:
        """A Trainer that has quantized the model, in the stage of the method, and validated it."""
        how = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
        running = trainer(*(callbacks or [self()]), max_epochs=epochs, num_sanity_val_steps=0, **options)
        self.quantize(running, model, **how)
        return running

    def quantize(self, running: L.Trainer, model: L.LightningModule, **how: Any) -> None:
        """Let a Trainer that has the callback quantize the model and validate it."""
        if self.stage != "validate":
            getattr(running, self.stage)(model, datamodule=steady(), **how)
            how = {}
        running.validate(model, datamodule=steady(), verbose=False, **how)

    def quantized(self, model: L.LightningModule | None = None, *callbacks: L.Callback) -> L.LightningModule:
        """The quantized model."""
        model = self.model() if model is None else model
        self.run(model, *callbacks)
        return model


INT8 = {"weights": "int8", "activations": "int8"}
INT4 = {"weights": "int4", "activations": "int4"}
FEW_STEPS = {"iterations": 3, "samples": 16, "batch_size": 4}

CASES = {
    "ptq": Case(PostTrainingQuantization, {**INT8, "ranges": "minmax"}),
    "ptq_w4": Case(PostTrainingQuantization, {"weights": "int4_g8", "activations": None}, NoBias),
    "ptq_fp8": Case(PostTrainingQuantization, {"weights": "fp8_e4m3", "activations": "fp8_e4m3", "ranges": "minmax"}),
    "ptq_dynamic": Case(
        PostTrainingQuantization, {"weights": "int8", "activations": "int8_token_dynamic", "ranges": "minmax"}
    ),
    "repq": Case(RepQViT, INT8),
    "repq_w4a4": Case(RepQViT, INT4, NoBias),
    "ptq_reconstructed": Case(
        PostTrainingQuantization, {**INT8, "ranges": "minmax", "reconstruct": FEW_STEPS}, NoBias, learns=True
    ),
    "repquant": Case(RepQuant, {**INT4, "clip_steps": 3, "reconstruct": FEW_STEPS}, NoBias, learns=True),
    "mptq_vit_w4a4": Case(MPTQViT, {**INT4, "gelu": ["fc2"]}, NoBias),
    "adaquant": Case(AdaQuant, {**INT8, "reconstruct": {**FEW_STEPS, "rounding": "free"}}, NoBias, learns=True),
    "noisyquant": Case(NoisyQuant, {**INT8, "ranges": "minmax", "steps": 5}),
    "mixed": Case(MixedPrecision, {"budget": "7bit", "weight_bits": [6, 8]}),
    "pmq": Case(PMQ, {"budget": "7bit", "weight_bits": [6, 8], "share": 1.0}),
    "smooth": Case(SmoothQuant, INT8, NoBias),
    "sparse": Case(MagnitudePruning, {"pattern": 0.5}, NoDropout),
    "gptq": Case(GPTQ, {"weights": "int4_g8", "activations": "int8"}, NoBias, solves=True),
    "qat": Case(QuantizationAwareTraining, {**INT4, "ranges": "minmax"}, NoDropout, "fit"),
}
# The first lines of the two methods that the others extend: mild, so that metrics stay close to float whatever a test
# does to the model.
METHODS = {name: CASES[name] for name in ("ptq", "repq")}
TRAINING = {name: case for name, case in CASES.items() if case.stage == "fit"}
VALIDATING = {name: case for name, case in CASES.items() if case.stage == "validate"}
ptq, repq = CASES["ptq"], CASES["repq"]


# ---------------------------------------------------------------- what the tests look at


def steady() -> Sequences:
    """The data in the same order each time."""
    return Sequences(shuffle=False)


def metrics(running: L.Trainer) -> dict[str, float]:
    """What the Trainer's last loop logged."""
    return {name: value.item() for name, value in running.callback_metrics.items()}


def predictions(case: Case, model: L.LightningModule) -> Tensor:
    """What ``trainer.predict`` answers for a quantized model.

    Where real kernels stand in for the simulated layers at predict time, their callback joins the method's here.
    """
    return torch.cat(trainer(case()).predict(model, datamodule=Sequences()))


def quantized(model: L.LightningModule) -> list[str]:
    """The names of the quantized layers."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


def is_float(model: L.LightningModule) -> bool:
    """Whether nothing in the model is quantized, nor remembered to be."""
    swapped = any(isinstance(module, (QuantizedLayer, AttentionSite)) for module in model.modules())
    return not swapped and "_lightning_quant" not in vars(model)


def removed(callback: QuantizationCallback, model: L.LightningModule) -> bool:
    """Let the callback take everything back; whether weights stay folded, which it has to say."""
    folded = any(bool(getattr(module, "folded", False)) for module in model.modules())
    with pytest.warns(UserWarning, match="stay folded") if folded else nullcontext():
        callback.remove(model)
    assert is_float(model)
    return folded
