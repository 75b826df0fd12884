"""Loggers get what they can take, and cannot stop a run."""

import csv
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_quant import PostTrainingQuantization, QuantReport
from lightning_quant.reports import Section, log_sections, standard_sections, tag
from tests.models import TinyTransformer, validate
from tests.reports.test_page import findings


class Recorder(Logger):
    """What every Lightning logger has, and nothing more."""

    name, version = "recorder", 0

    def __init__(self):
        self.scalars, self.pictures = {}, {}

    def log_metrics(self, metrics, step=None):
        self.scalars |= metrics
        self.step = step

    def log_hyperparams(self, *args, **kwargs):
        pass


class LikeTensorBoard(Recorder):
    class Writer:
        def __init__(self):
            self.figures = {}

        def add_figure(self, tag, figure, global_step=None):
            self.figures[tag] = figure, global_step

    def __init__(self):
        super().__init__()
        self.experiment = self.Writer()


class LikeWandb(Recorder):
    def log_image(self, key, images, step=None, **kwargs):
        self.pictures[key] = images


class Broken(Recorder):
    def log_metrics(self, metrics, step=None):
        raise RuntimeError("no network")

    @property
    def experiment(self):
        raise ConnectionError


@pytest.fixture
def sections():
    return standard_sections(findings())


def test_figures_go_where_they_can(sections):
    board, wandb, plain = LikeTensorBoard(), LikeWandb(), Recorder()
    log_sections([board, wandb, plain], sections, step=7)
    assert set(board.experiment.figures) == {"quant_report/depth", "quant_report/worst"} == set(wandb.pictures)
    figure, step = board.experiment.figures["quant_report/depth"]
    assert step == 7 and len(figure.axes) == 1 and figure.axes[0].get_ylabel() == "SQNR in dB"
    (picture,) = wandb.pictures["quant_report/worst"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3 and picture.std() > 0
    assert plain.scalars == board.scalars == wandb.scalars and plain.step == 7
    assert set(plain.scalars) == {
        f"quant_report/{name}"
        for name in ("bytes_before", "bytes_after", "bits_per_parameter", "output_sqnr", "worst_layer_sqnr")
    }


def test_no_pyplot_figures_are_left_open(sections):
    def opened():
        pyplot = sys.modules.get("matplotlib.pyplot")
        return [] if pyplot is None else pyplot.get_fignums()

    before = opened()
    log_sections([LikeTensorBoard()], sections, step=0)
    assert opened() == before


def test_a_broken_logger_is_named_and_the_others_are_served(sections):
    recorder = Recorder()
    with pytest.warns(UserWarning, match=r"Broken took not all of the report \(RuntimeError: no network\)"):
        log_sections([Broken(), recorder], sections, step=0)
    assert recorder.scalars


def test_values_that_are_none_or_not_finite_are_left_out():
    recorder = Recorder()
    values = {"a": 1.0, "b": None, "c": float("nan"), "d": float("inf")}
    log_sections([recorder], [Section("s", "", {}, tag("p"), scalars=values)], step=0)
    assert recorder.scalars == {"quant_report/a": 1.0}


def test_without_matplotlib(monkeypatch, tmp_path):
    """The page has all pictures; only a logger that would take figures hears that it gets none."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lightning_quant.reports.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    callbacks = PostTrainingQuantization("int4", "int4", ranges="minmax"), QuantReport(tmp_path)
    board = LikeTensorBoard()
    with pytest.warns(UserWarning, match="LikeTensorBoard no pictures, because matplotlib is not installed"):
        validate(TinyTransformer(), *callbacks, logger=board)
    assert board.scalars["quant_report/bytes_before"] > 0 and board.experiment.figures == {}
    assert (tmp_path / "report.html").read_text("utf-8").count("<svg") > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_sections([Recorder(), CSVLogger(tmp_path)], standard_sections(findings()), step=0)


def test_csv_logger_gets_a_line(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = PostTrainingQuantization("int4", "int4", ranges="minmax"), QuantReport(tmp_path / "report")
    validate(TinyTransformer(), *callbacks, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = {key: float(row[key]) for row in rows for key in row if row[key] and key.startswith("quant_report/")}
    assert 2 < values["quant_report/bytes_before"] / values["quant_report/bytes_after"] < 8
