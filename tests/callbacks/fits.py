"""Fits of a small model, and what the tests of training look at."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_quant import CalibrationMixin, QuantizationAwareTraining
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import bits
from tests.models import TOKENS, NoDropout, Sequences, trainer


class Net(NoDropout):
    """With the optimizer that a test asks for."""

    def __init__(self, lr=0.05, **optimizer):
        super().__init__()
        self.options = {"lr": lr, **optimizer}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.options)


class NetWithMixin(CalibrationMixin, Net):
    pass


class WithBatchNorm(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(TOKENS)

    def forward(self, x):
        return super().forward(self.norm(x))


class InOrder(Sequences):
    """Deterministic: four batches, in order."""

    def __init__(self):
        super().__init__(batch_size=16, shuffle=False)


def qat(weights="int3", activations="int4", ranges="minmax", **kwargs):
    return QuantizationAwareTraining(weights, activations, ranges, **kwargs)


def fit(model, *callbacks, epochs=2, data=None, **options):
    run = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
    running = trainer(*callbacks, max_epochs=epochs, **options)
    running.fit(model, datamodule=data or InOrder(), **run)
    return running


def weights_of(model):
    return {name: bits(value) for name, value in model.state_dict().items()}


def quantizers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def training_loss(model):
    x, y = Sequences().train.tensors
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y).item()


class Look(L.Callback):
    """Calls functions at the hooks they are named after, with the model, and keeps what they return."""

    def __init__(self, **functions):
        self.seen = {name: [] for name in functions}
        for name, function in functions.items():
            setattr(self, name, lambda t, m, *rest, n=name, f=function: self.seen[n].append(f(m)))


class Killed(Exception):
    pass


class Kill(L.Callback):
    def __init__(self, epoch, batch):
        self.when = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.when:
            raise Killed


def killed_and_resumed(build, callbacks, folder, epochs=4, kill=(2, 1), **options):
    """The weights of an undisturbed run, and of one that was killed and resumed in a new model with new callbacks."""
    options = {"enable_checkpointing": True, "epochs": epochs, **options}
    undisturbed = build()
    fit(undisturbed, *callbacks(), ModelCheckpoint(folder / "undisturbed"), **options)
    last = ModelCheckpoint(folder / "killed", save_last=True)
    with pytest.raises(Killed):
        fit(build(), *callbacks(), last, Kill(*kill), **options)
    resumed = build()
    with torch.no_grad():
        resumed.head.weight.add_(1)  # so that what was not restored is seen
    fit(resumed, *callbacks(), ModelCheckpoint(folder / "resumed"), ckpt_path=last.last_model_path, **options)
    return undisturbed, resumed
