"""Train a small ViT on handwritten digits, then quantize it by adding one callback: one table and a report."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from digits import DigitClassifier, Digits
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from lightning_quant import PostTrainingQuantization, QuantReport, RepQViT, save_quantized

REPORT = QuantReport("lightning_quant_demo", samples=250, float_metrics=True)
RUNS = {
    "float32, no callback": [],
    "PostTrainingQuantization W8A8": [PostTrainingQuantization(weights="int8", activations="int8")],
    "PostTrainingQuantization W4A4, min-max": [PostTrainingQuantization("int4", "int4", ranges="minmax")],
    "PostTrainingQuantization W4A4": [PostTrainingQuantization(weights="int4", activations="int4")],
    "RepQViT W4A4": [RepQViT(weights="int4", activations="int4"), REPORT],
}


def trainer(*callbacks: L.Callback, **kwargs: object) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


def size_on_disk(model: L.LightningModule, quantized: bool) -> int:
    """Bytes of the model's tensors as they are saved."""
    with tempfile.TemporaryDirectory() as folder:
        if quantized:
            save_quantized(model, folder)
        else:
            save_file(model.state_dict(), Path(folder) / "model.safetensors")
        return (Path(folder) / "model.safetensors").stat().st_size


def main(epochs: int = 40) -> dict[str, float]:
    """Train, quantize in several ways, print the table and the path of a report, and return the accuracies."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # such small tensors are slower on several
    L.seed_everything(0, verbose=False)
    console, began = Console(), time.perf_counter()
    model, data = DigitClassifier(), Digits()
    console.print("Training a vision transformer on scikit-learn's handwritten digits.")
    # No validation in between: it would draw a second bar.
    run = trainer(RichProgressBar(), enable_progress_bar=True, max_epochs=epochs, limit_val_batches=0)
    run.fit(model, datamodule=data)

    table = Table(title="Each row is one trainer.validate, calibrated on 32 training images")
    table.add_column("callback in the Trainer", no_wrap=True)
    table.add_column("accuracy on\n500 digits", justify="right")
    table.add_column("size on disk", justify="right")
    found = {}
    for name, callbacks in RUNS.items():
        quantized = copy.deepcopy(model)
        run = trainer(*callbacks)
        found[name] = 100 * run.validate(quantized, datamodule=data, verbose=False)[0]["accuracy"]
        size = size_on_disk(quantized, bool(callbacks))
        table.add_row(name, f"{found[name]:.1f} %", f"{size / 1024:.0f} KiB")
    console.print(table)
    console.print(f"{time.perf_counter() - began:.0f} s in all. The report of the last row, for a browser:")
    print(REPORT.path)
    return found


if __name__ == "__main__":
    main()
