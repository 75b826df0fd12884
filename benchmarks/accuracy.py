"""Measure the table of accuracies, row by row, and write it to ``tests/references.yaml`` and ``docs/results.md``.

``python -m benchmarks.accuracy`` measures the rows that are missing, or whose settings have changed; what is there is
kept. ``--list`` shows all of them, ``--only "RepQuant W4A4*"`` takes rows by name, ``--again`` measures them even so.
Both files are written after every row. Interrupted at any moment, the same command goes on; a reconstruction does so
with the block it was in.
"""

from __future__ import annotations

import argparse
import contextlib
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
from benchmarks.accuracy_rows import Row
from benchmarks.accuracy_rows import rows as accuracy_rows
from benchmarks.diffusion_rows import DiffusionRow, diffusion_rows
from benchmarks.language_rows import LanguageRow, language_rows
from lightning_quant import Fidelity

if TYPE_CHECKING:
    from benchmarks.accuracy_models import Subject

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCES, PAGE = REPOSITORY / "tests" / "references.yaml", REPOSITORY / "docs" / "results.md"
SCRATCH = Path(tempfile.gettempdir()) / "lightning_quant_accuracy"

AnyRow = Row | LanguageRow | DiffusionRow
Measured = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]  # by model, method, bits; one entry a draw


class Stopwatch(L.Callback):
    """How much work of the cores quantizing is; it stands before the callbacks that do it."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.core_seconds = time.process_time()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.core_seconds = time.process_time() - self.core_seconds


def rows() -> list[AnyRow]:
    """All rows, of whatever kind."""
    return [*accuracy_rows(), *language_rows(), *diffusion_rows()]


def measure(row: AnyRow, scratch: Path = SCRATCH, frechet: bool = False) -> dict[str, Any]:
    """Quantize and validate; what came of it, how long it took, and with what."""
    from benchmarks.accuracy_models import SUBJECTS
    from benchmarks.diffusion_samples import MANY, PAIRED, Digits, judged

    subject: Subject = SUBJECTS[row.model]
    folder, began = scratch / row.name.replace(" ", "_"), time.perf_counter()
    resumed, methods, clock = any(folder.rglob("*.pt")), row.callbacks(), Stopwatch()
    compare = [Fidelity([subject.metric.removeprefix("fidelity/")])] if subject.metric.startswith("fidelity/") else []
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[clock, *methods, *compare],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    model, data = subject.model(), subject.data(row.draw)
    if isinstance(data, Digits):
        data.samples = MANY if frechet else PAIRED
    _forget_peak()
    logged = trainer.validate(model, datamodule=data, verbose=False)[0]
    shutil.rmtree(folder, ignore_errors=True)  # what is left there would pass for the state of an interrupted run
    samples = judged(trainer, model, data, scratch / "samples", frechet) if isinstance(data, Digits) else {}
    percent = 100 if subject.metric == "top1" else 1
    digits = {"top1": 2, "perplexity": 3}.get(subject.metric, 4)
    peak = {"peak_mb": _peak()} if isinstance(row, LanguageRow) else {}
    return {
        "draw": row.draw,
        subject.metric.removeprefix("fidelity/"): round(percent * logged[subject.metric], digits),
        **samples,
        **peak,
        "seconds": None if resumed else round(time.perf_counter() - began),
        "core_seconds": None if resumed else round(clock.core_seconds),
        "settings": row.settings,
        "date": date.today(),
        "versions": versions(),
    }


def _forget_peak() -> None:
    """Let the most memory that this process has had be what it has now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """The most memory since then, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((round(int(line.split()[1]) * 1024 / 1e6) for line in lines if line.startswith("VmHWM")), None)


def versions() -> str:
    """What computed: packages, the widest instructions of the processor, threads."""
    names = ("torch", "lightning", "timm", "transformers", "lightning-quant")
    packages = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    return f"{', '.join(packages)}; {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def read() -> Measured:
    """What was measured so far."""
    return yaml.safe_load(REFERENCES.read_text()).get("measured") or {}


def found(measured: Measured, row: AnyRow) -> dict[str, Any] | None:
    """The entry of a row, if it was measured."""
    entries = measured.get(row.model, {}).get(row.method, {}).get(row.bits, [])
    return next((entry for entry in entries if entry["draw"] == row.draw), None)


def write(row: AnyRow, entry: dict[str, Any]) -> Measured:
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


def expected(measured: Measured, row: AnyRow) -> float | None:
    """Seconds that a row may take: as long as the same method took with other bits or draws."""
    entries = [entry for bits in measured.get(row.model, {}).get(row.method, {}).values() for entry in bits]
    seconds = [entry["seconds"] for entry in entries if entry["seconds"] is not None]
    return statistics.mean(seconds) if seconds else None


def left(measured: Measured, todo: list[AnyRow]) -> str:
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
    parser.add_argument(
        "--frechet", action="store_true", help="draw 640 samples of diffusion models, ten times as many"
    )
    parser.add_argument("--assets", metavar="FOLDER", help="models and data; default: $LIGHTNING_QUANT_ASSETS")
    options = parser.parse_args(args)
    if options.assets:
        os.environ["LIGHTNING_QUANT_ASSETS"] = options.assets
    chosen, measured = [row for row in rows() if row.matches(options.only)], read()
    if not chosen:
        parser.error(f"--only {options.only} matches no row: --list shows them")
    kept = [row for row in chosen if (entry := found(measured, row)) and entry["settings"] == row.settings]
    how = {}
    if options.frechet:
        how = {"frechet": True}
        chosen = [row for row in chosen if isinstance(row, DiffusionRow)]
        kept = [row for row in kept if "frechet" in (found(measured, row) or {})]
    if options.page:
        replace(PAGE, page(measured))
    elif options.list:
        for row in chosen:
            print(f"{row.name:40} {state(found(measured, row), row)}")
    else:
        todo = chosen if options.again else [row for row in chosen if row not in kept]
        print(f"{len(todo)} rows to measure, {len(chosen) - len(todo)} are there; {left(measured, todo)}", flush=True)
        return run(todo, **how)
    return 0


def state(entry: dict[str, Any] | None, row: AnyRow) -> str:
    """What ``--list`` says of a row."""
    if entry is None:
        return "-"
    changed = "" if entry["settings"] == row.settings else "  (measured with other settings)"
    return f"{figure(entry):14} {entry['seconds'] or '?':>5} s  {entry['date']}{changed}"


def run(todo: list[AnyRow], **how: Any) -> int:
    """Measure rows one after another; the number of those that failed."""
    warnings.filterwarnings("ignore")
    for library in ("lightning.pytorch", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    began, failures = time.perf_counter(), 0
    for number, row in enumerate(todo, 1):
        try:
            entry = measure(row, **how)
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
