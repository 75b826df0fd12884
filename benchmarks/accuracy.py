"""Measure the table of accuracies, row by row, and write it to ``tests/references.yaml`` and ``docs/results.md``.

``python -m benchmarks.accuracy`` measures the rows that are missing, or whose settings have changed; what is there is
kept. ``--list`` shows all of them, ``--only "RepQuant W4A4*"`` takes rows by name, ``--again`` measures them even so.
Both files are written after every row. Interrupted at any moment, the same command goes on; a reconstruction does so
with the block it was in.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import torch
import yaml

from benchmarks.accuracy_page import figure, page
from benchmarks.accuracy_rows import Row, rows
from lightning_quant import Fidelity

if TYPE_CHECKING:
    from benchmarks.accuracy_models import Subject

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCES, PAGE = REPOSITORY / "tests" / "references.yaml", REPOSITORY / "docs" / "results.md"
SCRATCH = Path(tempfile.gettempdir()) / "lightning_quant_accuracy"

Measured = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]  # by model, method, bits; one entry a draw


class Stopwatch(L.Callback):
    """How much work of the cores quantizing is; it stands before the callbacks that do it."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.core_seconds = time.process_time()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.core_seconds = time.process_time() - self.core_seconds


def measure(row: Row, scratch: Path = SCRATCH) -> dict[str, Any]:
    """Quantize and validate; what came of it, how long it took, and with what."""
    from benchmarks.accuracy_models import SUBJECTS

    subject: Subject = SUBJECTS[row.model]
    folder, began = scratch / row.name.replace(" ", "_"), time.perf_counter()
    resumed, callback, clock = any(folder.rglob("*.pt")), row.callback(), Stopwatch()
    compare = [Fidelity([subject.metric.removeprefix("fidelity/")])] if subject.metric.startswith("fidelity/") else []
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[clock, *([callback] if callback else []), *compare],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    logged = trainer.validate(subject.model(), datamodule=subject.data(row.draw), verbose=False)[0]
    shutil.rmtree(folder, ignore_errors=True)  # what is left there would pass for the state of an interrupted run
    percent = 1 if compare else 100
    return {
        "draw": row.draw,
        subject.metric.removeprefix("fidelity/"): round(percent * logged[subject.metric], 4 if compare else 2),
        "seconds": None if resumed else round(time.perf_counter() - began),
        "core_seconds": None if resumed else round(clock.core_seconds),
        "settings": row.settings,
        "date": date.today(),
        "versions": versions(),
    }


def versions() -> str:
    """What computed: packages, the widest instructions of the processor, threads."""
    names = ("torch", "lightning", "timm", "transformers", "lightning-quant")
    packages = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    return f"{', '.join(packages)}; {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def read() -> Measured:
    """What was measured so far."""
    return yaml.safe_load(REFERENCES.read_text()).get("measured") or {}


def found(measured: Measured, row: Row) -> dict[str, Any] | None:
    """The entry of a row, if it was measured."""
    entries = measured.get(row.model, {}).get(row.method, {}).get(row.bits, [])
    return next((entry for entry in entries if entry["draw"] == row.draw), None)


def write(row: Row, entry: dict[str, Any]) -> Measured:
    """Enter a row, whatever others have entered meanwhile, all or nothing; the part written by hand stays."""
    measured = read()
    entries = measured.setdefault(row.model, {}).setdefault(row.method, {}).setdefault(row.bits, [])
    entries[:] = sorted([*(e for e in entries if e["draw"] != row.draw), entry], key=lambda e: e["draw"])
    by_hand = REFERENCES.read_text().partition("\nmeasured:")[0]
    text = yaml.safe_dump({"measured": measured}, sort_keys=False, default_flow_style=None, width=10_000)
    replace(REFERENCES, f"{by_hand}\n{text}")
    return measured


def replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def expected(measured: Measured, row: Row) -> float | None:
    """Seconds that a row may take: as long as the same method took with other bits or draws."""
    entries = [entry for bits in measured.get(row.model, {}).get(row.method, {}).values() for entry in bits]
    seconds = [entry["seconds"] for entry in entries if entry["seconds"] is not None]
    return statistics.mean(seconds) if seconds else None


def left(measured: Measured, todo: list[Row]) -> str:
    """How long the rest will take, as far as that is known."""
    seconds = [expected(measured, row) for row in todo]
    known = [x for x in seconds if x is not None]
    if not todo:
        return "that was all"
    if not known:
        return "time left unknown"
    return f"about {statistics.mean(known) * len(todo) / 60:.0f} min left"


def main(args: list[str] | None = None) -> int:
    """The command line; the number of rows that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", action="append", default=[], help="rows whose name begins so")
    parser.add_argument("--list", action="store_true", help="show the rows and what is there, and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure rows that are there too")
    parser.add_argument("--page", action="store_true", help=f"only write docs/{PAGE.name} from what is there")
    parser.add_argument("--assets", metavar="FOLDER", help="models and data; default: $LIGHTNING_QUANT_ASSETS")
    options = parser.parse_args(args)
    if options.assets:
        os.environ["LIGHTNING_QUANT_ASSETS"] = options.assets
    chosen, measured = [row for row in rows() if row.matches(options.only)], read()
    if not chosen:
        parser.error(f"--only {options.only} matches no row: --list shows them")
    kept = [row for row in chosen if (entry := found(measured, row)) and entry["settings"] == row.settings]
    if options.page:
        replace(PAGE, page(measured))
    elif options.list:
        for row in chosen:
            print(f"{row.name:40} {state(found(measured, row), row)}")
    else:
        todo = chosen if options.again else [row for row in chosen if row not in kept]
        print(f"{len(todo)} rows to measure, {len(chosen) - len(todo)} are there; {left(measured, todo)}", flush=True)
        return run(todo)
    return 0


def state(entry: dict[str, Any] | None, row: Row) -> str:
    """What ``--list`` says of a row."""
    if entry is None:
        return "-"
    changed = "" if entry["settings"] == row.settings else "  (measured with other settings)"
    return f"{figure(entry):14} {entry['seconds'] or '?':>5} s  {entry['date']}{changed}"


def run(todo: list[Row]) -> int:
    """Measure rows one after another; the number of those that failed."""
    warnings.filterwarnings("ignore")
    for library in ("lightning.pytorch", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    began, failures = time.perf_counter(), 0
    for number, row in enumerate(todo, 1):
        try:
            entry = measure(row)
        except (KeyboardInterrupt, SystemExit):
            print(f"interrupted in {row.name}; the same command goes on from there", flush=True)
            return failures + 1
        except Exception as error:
            failures += 1
            told = f"{type(error).__name__}: {error}"
            print(f"[{number}/{len(todo)}] {row.name}: FAILED, {told}", flush=True)
            if not isinstance(error, FileNotFoundError):
                traceback.print_exc()
            continue
        measured = write(row, entry)
        replace(PAGE, page(measured))
        took = f"{entry['seconds']} s" if entry["seconds"] is not None else "resumed"
        elapsed = (time.perf_counter() - began) / 60
        line = f"{row.name}: {figure(entry)} ({took}); {elapsed:.0f} min elapsed, {left(measured, todo[number:])}"
        print(f"[{number}/{len(todo)}] {line}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
