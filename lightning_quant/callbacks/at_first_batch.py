"""Callbacks that change a model for the time of a validate, test or predict, and leave nothing behind."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class AtFirstBatch(Callback):
    """Begins at the first batch of a validate, test or predict, when every callback has calibrated; fit is left alone.

    It ends with the run, also after an exception.
    """

    @abstractmethod
    def begin(self, pl_module: LightningModule) -> None:
        """A batch is about to run: change the model, unless that is done."""

    @abstractmethod
    def end(self) -> None:
        """Give the model back as it was, if it was changed."""

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *where: int) -> None:
        """Begin, in a validate."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.begin(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self.end()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *where: int) -> None:
        """Begin."""
        self.begin(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self.end()

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *where: int) -> None:
        """Begin."""
        self.begin(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no other hook after an exception."""
        self.end()
