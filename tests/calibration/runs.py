"""Small modules, and one way to call the calibration API where callbacks call it: in the hooks of a real Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    """Sample ``i`` is a vector filled with ``i``, and its label ``i``."""

    def __init__(self, size, width=3, start=0):
        self.size, self.width, self.start = size, width, start

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        value = self.start + index
        return torch.full((self.width,), float(value)), value


class Net(pl.LightningModule):
    """A linear layer with both loaders: samples 0, 1, ... to train on (shuffled), 100, 101, ... to validate on."""

    def __init__(self, train_size=20, batch_size=4, **loader):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.train_size, self.batch_size, self.loader = train_size, batch_size, loader

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(Numbers(self.train_size), batch_size=self.batch_size, shuffle=True, **self.loader)

    def val_dataloader(self):
        return DataLoader(Numbers(8, start=100), batch_size=4)


class OnValidationStart(pl.Callback):
    """Calls a function where a method calibrates, and keeps what it returns."""

    def __init__(self, function):
        self.function = function
        self.result = None

    def on_validation_start(self, trainer, pl_module):
        self.result = self.function(trainer, pl_module)


def trainer_with(*callbacks, **options):
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | options
    return pl.Trainer(callbacks=list(callbacks), logger=False, enable_checkpointing=False, **options)


def in_validate(function, module=None, data=None, datamodule=None, **options):
    """The result of ``function(trainer, pl_module)`` called at the start of a ``validate``."""
    callback = OnValidationStart(function)
    trainer_with(callback, **options).validate(module or Net(), data, datamodule=datamodule, verbose=False)
    return callback.result


def labels(batches):
    return [batch[1].tolist() for batch in batches]
