"""Quantize a LightningModule of your own, save it, and load it in three ways."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import CalibrationMixin, PostTrainingQuantization, load_quantized, save_quantized


class Regressor(CalibrationMixin, L.LightningModule):
    """Learns the sum of its inputs. The mixin lets ``load_from_checkpoint`` take quantized checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8) -> (B,)."""
        return self.net(x).squeeze(-1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the squared error."""
        x, y = batch
        self.log("mse", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(*callbacks: L.Callback, **kwargs: object) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **kwargs)


def main() -> list[float]:
    """Print the error of the float model, of the quantized one, and of the same one loaded in three ways."""
    L.seed_everything(0, verbose=False)
    inputs = torch.rand(2048, 8)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1)), batch_size=64)
    model = Regressor()
    run = trainer(max_epochs=5)
    run.fit(model, loader)
    print("float     ", run.validate(model, loader, verbose=False))

    run = trainer(PostTrainingQuantization(weights="int8", activations="int8"))
    found = [run.validate(model, loader, verbose=False)[0]["mse"]]
    print("quantized ", found[0])

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, packed = Path(folder) / "w8a8.ckpt", Path(folder) / "w8a8"
        run.save_checkpoint(checkpoint)
        save_quantized(model, packed)

        with_callback = trainer(PostTrainingQuantization(weights="int8", activations="int8"))
        found += [with_callback.validate(Regressor(), loader, ckpt_path=checkpoint, verbose=False)[0]["mse"]]
        with_mixin = Regressor.load_from_checkpoint(checkpoint)
        found += [trainer().validate(with_mixin, loader, verbose=False)[0]["mse"]]
        from_folder = Regressor()
        load_quantized(from_folder, packed)
        found += [trainer().validate(from_folder, loader, verbose=False)[0]["mse"]]
    print("loaded    ", found[1:])
    return found


if __name__ == "__main__":
    main()
