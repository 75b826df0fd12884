"""Train a small ViT on handwritten digits, then quantize it by adding one callback; prints one table."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
from digits import DigitClassifier, Digits
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from lightning_quant import PostTrainingQuantization, RepQViT, save_quantized

RUNS = {
    "float32": None,
    "PostTrainingQuantization W8A8": PostTrainingQuantization(weights="int8", activations="int8"),
    "PostTrainingQuantization W4A4": PostTrainingQuantization(weights="int4", activations="int4"),
    "PostTrainingQuantization W4A4, min-max": PostTrainingQuantization(
        weights="int4", activations="int4", ranges="minmax"
    ),
    "RepQViT W4A4": RepQViT(weights="int4", activations="int4"),
}


def trainer(*callbacks: L.Callback, epochs: int = 1, bar: bool = False) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=bar, num_sanity_val_steps=0, limit_val_batches=1.0, callbacks=list(callbacks),
        log_every_n_steps=1, check_val_every_n_epoch=epochs,
    )  # fmt: skip


def size_on_disk(model: L.LightningModule, quantized: bool) -> int:
    """Bytes of the model's tensors as they are saved."""
    if not quantized:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(model, folder)
        return (Path(folder) / "model.safetensors").stat().st_size


def main(epochs: int = 30) -> dict[str, float]:
    """Train, quantize in several ways, and print the table."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    L.seed_everything(0, verbose=False)
    model, data, began = DigitClassifier(), Digits(), time.perf_counter()
    trainer(RichProgressBar(), epochs=epochs, bar=True).fit(model, datamodule=data)
    console = Console()
    console.print(f"Trained a ViT of six blocks on scikit-learn's digits in {time.perf_counter() - began:.0f} s.\n")

    table = Table(
        "model",
        "accuracy on 500 digits",
        "size on disk",
        title="One callback each, through nothing but trainer.validate",
    )
    found = {}
    for name, callback in RUNS.items():
        quantized = copy.deepcopy(model)
        run = trainer(*([callback] if callback else []))
        found[name] = 100 * run.validate(quantized, datamodule=data, verbose=False)[0]["accuracy"]
        table.add_row(name, f"{found[name]:.1f} %", f"{size_on_disk(quantized, callback is not None) / 1024:.0f} KiB")
    console.print(table)
    return found


if __name__ == "__main__":
    main()
