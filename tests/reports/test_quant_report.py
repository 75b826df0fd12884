"""QuantReport in the runs in which people use it."""

import json
import re
import sys
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import (
    Fidelity,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    QuantReport,
    RepQViT,
    load_quantized,
    save_quantized,
)
from lightning_quant.reports import Section, tag
from tests.callbacks.unchanged import left_as_it_was
from tests.cases import quantized
from tests.models import Sequences, TinyTransformer, trainer, validate


def ptq(bits=4, **arguments):
    return PostTrainingQuantization(weights=f"int{bits}", activations=f"int{bits}", ranges="minmax", **arguments)


def facts(report):
    return json.loads((report.dirpath / "report.json").read_text())


def sqnrs(report):
    return {layer["name"]: (layer["sqnr"], layer["sqnr_accumulated"]) for layer in facts(report)["layers"]}


def test_beside_every_method(case, tmp_path):
    report, callback, model = QuantReport(tmp_path / "report"), case(), case.model()
    case.run(model, callback, report)
    found = facts(report)
    assert {path.name for path in report.dirpath.iterdir()} == {"report.html", "report.json"}
    assert report.path == report.dirpath / "report.html"
    assert found["summary"]["method"] == type(callback).__name__
    assert found["summary"]["quantized"] == len(found["layers"])
    assert {layer["name"] for layer in found["layers"]} >= {*quantized(model)}
    samples = min(callback.calibration_samples, 64)  # all there are
    assert found["made"]["calibration"] == [f"{samples} samples from the train loader, unshuffled"]
    assert found["made"]["methods"] == [
        {"method": type(callback).__name__, "part": "", "arguments": json.loads(json.dumps(callback.arguments))}
    ]
    assert all(float(layer["sqnr"]) > 0 for layer in found["layers"])
    assert "accuracy" in found["metrics"]


def test_worst_layers_are_those_that_are_quantized_worst(tmp_path):
    report = QuantReport(tmp_path, worst=2)
    validate(TinyTransformer(), ptq(8, overrides={"blocks.1.fc1": "int2", "head": "int3"}), report)
    assert [layer["name"] for layer in facts(report)["worst"]] == ["blocks.1.fc1", "head"]


def test_it_changes_nothing_about_the_run(tmp_path):
    class Noisy(TinyTransformer):
        def forward(self, x):
            logits = super().forward(x)
            self.accuracy.update(logits, torch.zeros(len(logits), dtype=torch.long))
            return logits

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("noise", torch.rand(()))

    def run(*callbacks):
        model = Noisy()
        validate(model, ptq())
        torch.manual_seed(5)
        running = trainer(*callbacks)
        result = running.validate(model, datamodule=Sequences(), verbose=False)
        return result, {key: value.item() for key, value in running.callback_metrics.items()}, torch.rand(1)

    plain = run()
    assert run(QuantReport(tmp_path)) == plain
    assert run(QuantReport(tmp_path, float_metrics=True)) == plain


def test_the_model_is_left_as_it_was(tmp_path):
    model = TinyTransformer()
    validate(model, ptq())
    with left_as_it_was(model):
        validate(model, QuantReport(tmp_path, float_metrics=True))


@pytest.mark.parametrize("function", ["validate", "test"])
def test_float_metrics_are_those_of_the_float_model(function, tmp_path):
    class Both(TinyTransformer):
        """Keeps what its steps gave until the epoch ends, as people do, and uses two loaders' worth of hooks."""

        def on_validation_epoch_start(self):
            self.kept = []

        on_test_epoch_start = on_validation_epoch_start

        def validation_step(self, batch, batch_idx):
            logits = self(batch[0])
            self.kept.append(logits)
            self.accuracy(logits, batch[1])
            self.log("loss", F.cross_entropy(logits, batch[1]), batch_size=len(logits))
            self.log("accuracy", self.accuracy)

        test_step = validation_step

        def on_validation_epoch_end(self):
            self.log("spread", torch.cat(self.kept).std())

        on_test_epoch_end = on_validation_epoch_end

    def run(model, *callbacks):
        running = trainer(*callbacks, limit_val_batches=5, limit_test_batches=5)
        return getattr(running, function)(model, datamodule=Sequences(), verbose=False)[0]

    exact, model, report = run(Both()), Both(), QuantReport(tmp_path, float_metrics=True)
    validate(model, ptq(2))
    after = run(model, report)
    found = facts(report)["metrics"]
    assert {name: fact["before"] for name, fact in found.items()} == pytest.approx(exact, rel=1e-5)
    assert {name: fact["after"] for name, fact in found.items()} == pytest.approx(after)
    assert after["loss"] != pytest.approx(exact["loss"], rel=1e-3)


def test_float_metrics_can_be_given(tmp_path):
    report = QuantReport(tmp_path, float_metrics={"accuracy": 0.9})
    validate(TinyTransformer(), ptq(), report, Fidelity())
    found = facts(report)["metrics"]
    assert found["accuracy"]["before"] == 0.9 and found["loss"]["before"] is None
    assert found["fidelity/sqnr"]["after"] > 0
    assert facts(report)["summary"]["headline_metric"] == "accuracy"


def test_the_float_pass_is_seen_by_nobody(tmp_path):
    class Counts(L.Callback):
        starts = batches = 0

        def on_validation_start(self, trainer, pl_module):
            self.starts += 1

        def on_validation_batch_end(self, *args):
            self.batches += 1

    counts = Counts()
    running = trainer(ptq(), counts, QuantReport(tmp_path, float_metrics=True))
    loop, callbacks = running.validate_loop, list(running.callbacks)
    running.validate(TinyTransformer(), datamodule=Sequences(), verbose=False)
    assert (counts.starts, counts.batches) == (1, 8)
    assert running.validate_loop is loop and running.callbacks == callbacks


def test_a_failing_float_pass_leaves_the_trainer_whole(tmp_path):
    class Fails(TinyTransformer):
        def validation_step(self, batch, batch_idx):
            if self.trainer.callbacks == []:
                raise ArithmeticError
            super().validation_step(batch, batch_idx)

    running = trainer(ptq(), QuantReport(tmp_path / "report", float_metrics=True))
    loop, model = running.validate_loop, Fails()
    with pytest.raises(ArithmeticError):
        running.validate(model, datamodule=Sequences(), verbose=False)
    assert running.validate_loop is loop and len(running.callbacks) == 2
    assert not (tmp_path / "report").exists()
    assert all(module.observer is None for module in model.modules() if hasattr(module, "observer"))


def test_of_a_loaded_model(tmp_path):
    model, first, second = TinyTransformer(), QuantReport(tmp_path / "1"), QuantReport(tmp_path / "2")
    validate(model, RepQViT(weights="int4", activations="int4"), first)
    save_quantized(model, tmp_path / "saved")
    loaded = TinyTransformer()
    load_quantized(loaded, tmp_path / "saved")
    trainer(second).test(loaded, datamodule=Sequences(), verbose=False)
    ours, theirs = facts(first), facts(second)
    assert sqnrs(first).keys() == sqnrs(second).keys()
    for layer in theirs["layers"]:  # weights come back as what their codes stand for: no error of theirs is left
        errors = {name: float(tensor["sqnr"]) for name, tensor in layer["tensors"].items()}
        assert errors.pop("weight", torch.inf) == torch.inf
        assert 5 < min(errors.values()) < 60 and 5 < layer["sqnr"] < 60
    assert theirs["summary"]["weights_loaded_as_codes"] and not ours["summary"]["weights_loaded_as_codes"]
    note = "The weights were loaded as codes"
    assert note in second.path.read_text("utf-8") and note not in first.path.read_text("utf-8")
    assert theirs["made"]["calibration"] == ours["made"]["calibration"]
    assert theirs["summary"]["bytes_after"] == ours["summary"]["bytes_after"]


def test_of_a_checkpoint(tmp_path):
    first, second = QuantReport(tmp_path / "1"), QuantReport(tmp_path / "2")
    running = trainer(ptq(), first)
    running.validate(TinyTransformer(), datamodule=Sequences(), verbose=False)
    running.save_checkpoint(tmp_path / "a.ckpt")
    validate(TinyTransformer(), ptq(), second, ckpt_path=tmp_path / "a.ckpt")
    assert sqnrs(first) == sqnrs(second)


def test_a_fit_is_reported_at_its_end(tmp_path):
    report, model = QuantReport(tmp_path), TinyTransformer(dropout=0.0)
    qat = QuantizationAwareTraining(weights="int4", activations="int4", ranges="minmax")
    running = trainer(qat, report, max_epochs=2, num_sanity_val_steps=1)
    running.fit(model, datamodule=Sequences())
    found, trained = facts(report), sqnrs(report)
    assert found["made"]["measured"] == "in trainer.fit, on 8 samples"
    validate(model, qat, report)
    again = sqnrs(report)
    assert again == {name: pytest.approx(value, abs=1e-3) for name, value in trained.items()}


def test_a_fit_without_validation_tells_of_the_weights(tmp_path):
    report = QuantReport(tmp_path)
    qat = QuantizationAwareTraining(weights="int4", activations="int4", ranges="minmax")
    trainer(qat, report, max_epochs=1, limit_val_batches=0).fit(TinyTransformer(), datamodule=Sequences())
    found = facts(report)
    assert found["made"]["measured"] == "in trainer.fit, on 0 samples"
    assert {layer["depth"] for layer in found["layers"]} == {None}
    layers = [layer for layer in found["layers"] if "attention" not in layer["name"]]
    assert len(layers) == 10 and all(5 < layer["tensors"]["weight"]["sqnr"] < 60 for layer in layers)
    assert "No batch ran" in report.path.read_text("utf-8")


def test_nothing_quantized_is_said_and_no_error(tmp_path):
    report = QuantReport(tmp_path, float_metrics=True)
    with pytest.warns(UserWarning, match="QuantReport has nothing to compare: no layer of this TinyTransformer"):
        validate(TinyTransformer(), report)
    page, found = report.path.read_text("utf-8"), facts(report)
    assert "Nothing is quantized" in page and "Add a quantization callback" in page
    assert found["summary"]["quantized"] == 0
    assert found["summary"]["bytes_before"] == found["summary"]["bytes_after"] > 0
    assert "layers" not in found


def test_sanity_checking_and_float_validation_within_fit_write_nothing_early(tmp_path):
    report = QuantReport(tmp_path / "report")

    class Looks(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            assert not report.dirpath.exists()

    run = trainer(ptq(during_fit=True), report, Looks(), max_epochs=2, num_sanity_val_steps=1)
    run.fit(TinyTransformer(), datamodule=Sequences())
    assert facts(report)["summary"]["quantized"] == 12


def test_an_exception_leaves_nothing_behind(tmp_path):
    class Fails(TinyTransformer):
        def validation_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ArithmeticError
            super().validation_step(batch, batch_idx)

    model, report = Fails(), QuantReport(tmp_path / "report")
    with pytest.raises(ArithmeticError):
        validate(model, ptq(), report)
    assert not report.dirpath.exists() and report.path is None
    assert report._errors is None and report._kept == []
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks == []


def test_a_file_in_the_place_of_the_folder_is_refused_first(tmp_path):
    (tmp_path / "report").write_text("mine")
    model = TinyTransformer()
    with left_as_it_was(model), pytest.raises(ValueError, match=r"report' is a file; QuantReport needs a folder"):
        validate(model, ptq(), QuantReport(tmp_path / "report"))


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"worst": 0}])
def test_numbers_that_make_no_sense(arguments):
    with pytest.raises(ValueError, match="samples and worst of at least 1"):
        QuantReport(**arguments)


class Keywords(L.LightningModule):
    """Its forward takes keywords only, its batches are dicts with things that are no tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, *, pixels, scale=1.0):
        return {"note": "text", "logits": self.second(self.first(pixels * scale).relu())}

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(pixels=batch["pixels"])["logits"].mean())

    def val_dataloader(self):
        return DataLoader([{"pixels": torch.randn(8), "caption": "a", "label": i} for i in range(10)], batch_size=4)


def test_keywords_and_dicts(tmp_path):
    report, model = QuantReport(tmp_path, samples=7), Keywords()
    trainer(ptq(), report).validate(model, verbose=False)
    found = facts(report)
    assert [layer["name"] for layer in sorted(found["layers"], key=lambda layer: layer["depth"])] == ["first", "second"]
    assert found["made"]["measured"] == "in trainer.validate, on 7 samples"
    assert float(found["summary"]["output_sqnr"]) > 5


def test_only_a_part_is_quantized(tmp_path):
    report = QuantReport(tmp_path)
    validate(TinyTransformer(), ptq(target="blocks.1", skip=["blocks.1.fc1"]), report)
    found = facts(report)
    assert {layer["name"].split(".")[1] for layer in found["layers"]} == {"1"}
    assert found["left_float"]["layers"] == {"blocks.1.fc1": "skip='blocks.1.fc1'"}


def test_two_methods_on_two_parts(tmp_path):
    report = QuantReport(tmp_path)
    repq = RepQViT(weights="int8", activations="int8", target="blocks.1")
    validate(TinyTransformer(), ptq(target="blocks.0"), repq, report)
    found = facts(report)
    assert found["summary"]["method"] == "PostTrainingQuantization + RepQViT"
    assert [method["arguments"]["target"] for method in found["made"]["methods"]] == ["blocks.0", "blocks.1"]


def test_callbacks_and_modules_add_sections(tmp_path):
    class Model(TinyTransformer):
        def report_sections(self, trainer, pl_module):
            return [Section("images", "Images", {"shown": 3}, tag("p", "three images"))]

    class Kernels(L.Callback):
        def report_sections(self, trainer, pl_module):
            yield Section("kernels", "Kernels", {"int8": 10}, tag("p", "ten layers"), {"kernels": 10.0})

    report = QuantReport(tmp_path)
    validate(Model(), ptq(), Kernels(), report)
    assert facts(report)["images"] == {"shown": 3} and facts(report)["kernels"] == {"int8": 10}
    headings = re.findall("<h2>(.*?)</h2>", report.path.read_text("utf-8"))
    assert headings[-4:] == ["Kernels", "Images", "What stayed float", "How this was made"]


def test_rank_0_writes_of_its_own_samples(tmp_path):
    report = QuantReport(tmp_path / "2", float_metrics=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking, and about validating on more than one device
        run = trainer(ptq(), report, devices=2, strategy="ddp_fork")
        run.validate(TinyTransformer(), datamodule=Sequences(), verbose=False)
    alone = QuantReport(tmp_path / "1", float_metrics=True)
    validate(TinyTransformer(), ptq(), alone)
    assert {path.name for path in report.dirpath.iterdir()} == {"report.html", "report.json"}
    found = facts(report)
    assert found["made"]["measured"] == "in trainer.validate, on 8 samples of rank 0 of 2"
    assert found["metrics"]["accuracy"] == pytest.approx(facts(alone)["metrics"]["accuracy"])
    assert found["summary"]["bytes_after"] == facts(alone)["summary"]["bytes_after"]
    assert sqnrs(report).keys() == sqnrs(alone).keys()


YAML = """
model: tests.models.TinyTransformer
data: tests.models.Sequences
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: PostTrainingQuantization
      init_args: {weights: int4, activations: int4, ranges: minmax}
    - class_path: QuantReport
      init_args: {dirpath: here, samples: 8, float_metrics: FLOAT}
"""


@pytest.mark.parametrize("value", ["true", "{accuracy: 0.25}"])
def test_in_yaml_by_its_bare_name(tmp_path, value):
    from lightning_quant.cli import main

    (tmp_path / "run.yaml").write_text(YAML.replace("FLOAT", value))
    path = list(sys.path)
    try:
        main(["validate", "--config", "run.yaml"])
    finally:
        sys.path[:] = path
    found = json.loads((tmp_path / "here" / "report.json").read_text())
    assert found["summary"]["bits"] == "W4A4" and found["made"]["measured"].endswith("on 8 samples")
    before = found["metrics"]["accuracy"]["before"]
    assert before == 0.25 if "accuracy" in value else 0 <= before <= 1
