"""Quantize a zoo of models by one callback and write what came of it to ``docs/models.md``.

``python -m benchmarks.zoo`` shows the table, ``--only NAME`` takes models whose name contains it, ``--write`` writes
the page. Every model gets ``PostTrainingQuantization(weights="int8", activations="int8")`` and ``trainer.validate``,
and nothing else.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.macs import MacCounter
from benchmarks.zoo_models import ZOO, Specimen
from benchmarks.zoo_modules import first_tensor
from benchmarks.zoo_noise import sources_of_noise, sqnr
from benchmarks.zoo_page import GOOD_SQNR, Result, page, show
from benchmarks.zoo_weights import call
from lightning_quant import PostTrainingQuantization
from lightning_quant.checkpoint import record_of

ALTERNATIVES: dict[str, dict[str, Any]] = {
    "a range per token": {"activations": "int8_token"},
    "the extremes as ranges": {"ranges": "minmax"},
    "float activations": {"activations": None},
    "float weights": {"weights": None},
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def quantize(name: str, specimen: Specimen) -> Result:
    """Validate one model with the callback and compare it with its float self on the validation batch."""
    module, data = specimen.make()
    batch = data.first("val")
    exact, counted = observe(module, batch)
    result = Result(name)
    start = time.perf_counter()
    try:
        validate(module, data, PostTrainingQuantization(weights="int8", activations="int8"))
        result.seconds = time.perf_counter() - start
        rounded, recounted = observe(module, batch)
    except Exception as error:
        result.error = located(error)
        return result
    for plan in record_of(module).plans.values():
        result.layers, result.skipped = len(plan.layers), plan.skipped
        result.sites = sum(site.query is not None for site in plan.attention.values())
    result.layer_macs = counted.macs(False), recounted.macs(False, quantized=True)
    result.attention_macs = counted.macs(True), recounted.macs(True, quantized=True)
    result.float_layers = recounted.float_layers()
    result.sqnr = sqnr(exact, rounded)
    if result.sqnr < GOOD_SQNR:
        result.noise = sources_of_noise(module, batch, exact)
        result.others = {label: alternative(specimen, **arguments) for label, arguments in ALTERNATIVES.items()}
        sizes = exact.flatten(1).square().mean(1).sqrt()
        result.spread = float(sizes.max() / sizes.min())
    return result


def validate(module: L.LightningModule, data: L.LightningDataModule, callback: L.Callback) -> None:
    """What a user does."""
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, datamodule=data, verbose=False)


def alternative(specimen: Specimen, **arguments: Any) -> float:
    """The output's SQNR with other arguments."""
    module, data = specimen.make()
    exact, _ = observe(module, data.first("val"))
    validate(module, data, PostTrainingQuantization(**{"weights": "int8", "activations": "int8", **arguments}))
    return sqnr(exact, observe(module, data.first("val"))[0])


@torch.no_grad()
def observe(module: nn.Module, batch: Any) -> tuple[Tensor, MacCounter]:
    """The first tensor of the output, and the products behind it, counted in a forward of their own."""
    module.eval()
    with MacCounter(module).counting() as counter:
        call(module, batch)
    return first_tensor(call(module, batch)), counter


def located(error: Exception) -> str:
    """Type and message, and the innermost place in the package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "lightning_quant" in Path(f.filename).parts]
    place = f" [{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}]" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def main(args: list[str] | None = None) -> list[Result]:
    """Run the zoo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", action="append", help="models whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.parent.name}/{PAGE.name}")
    options = parser.parse_args(args)
    names = [n for n in ZOO if not options.only or any(part.lower() in n.lower() for part in options.only)]
    if not names:
        parser.error(f"--only: there are {', '.join(ZOO)}")
    warnings.filterwarnings("ignore")
    for library in ("lightning.pytorch", "transformers", "diffusers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    console, results = Console(), []
    for name in names:
        with console.status(name):
            results.append(quantize(name, ZOO[name]))
    show(results, console)
    if options.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(results))
        console.print(f"wrote {PAGE}")
    return results


if __name__ == "__main__":
    main()
