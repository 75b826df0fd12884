"""``lightning-quant``: LightningCLI with the quantization callbacks at hand."""

import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback

import lightning_quant
from lightning_quant.cli import main

MODEL = """
import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(F.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, -1))).mean(1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())
        self.log("output", self(batch[0]).abs().sum())
        quantizer = getattr(self.head, "weight_quantizer", None)
        self.log("bits", 32.0 if quantizer is None else float(quantizer.scheme.bits))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def __init__(self, samples: int = 64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        inputs, labels = torch.randn(samples, 4, 16, generator=generator), torch.arange(samples) % 2
        self.set = TensorDataset(inputs, labels)

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=16)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""
ISSUE = """
trainer:
  callbacks:
    - class_path: lightning_quant.RepQViT
      init_args: {weights: int4, activations: int4}
"""
VERBS = ("methods", "plan", "validate", "fit", "test", "predict")
MODEL_AND_DATA = """
model: my_model.Net
data: my_model.Data
"""
QUIET = """
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a model of one's own, and no trace of it afterwards."""
    monkeypatch.setattr(sys, "argv", ["lightning-quant"])
    (tmp_path / "my_model.py").write_text(MODEL)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("my_model", None)


def write(name, **parts):
    """A YAML file out of pieces: nested dicts are merged."""
    Path(name).write_text(yaml.safe_dump(parts))
    return name


def quiet(*callbacks, **trainer):
    quiet = yaml.safe_load(QUIET)["trainer"]
    return {
        **quiet,
        **trainer,
        "callbacks": [dict(zip(("class_path", "init_args"), c, strict=True)) for c in callbacks],
    }


def validate(*callbacks, **trainer):
    """Run the callbacks through a YAML file."""
    config = write("config.yaml", trainer=quiet(*callbacks, **trainer), **yaml.safe_load(MODEL_AND_DATA))
    main(["validate", "--config", config])


def metric(text, name):
    return float(re.search(rf"{name}\D+([0-9.]+)", text)[1])


# ---------------------------------------------------------------- in this process


@pytest.mark.parametrize("class_path", ["lightning_quant.RepQViT", "RepQViT", "lightning_quant.callbacks.RepQViT"])
def test_validate_prints_the_quantized_models_metrics(class_path, capsys):
    validate((class_path, {"weights": "int4", "activations": "int4"}))
    printed = capsys.readouterr().out
    assert metric(printed, "bits") == 4 and 0 <= metric(printed, "accuracy") <= 1


def test_the_yaml_of_the_issue_as_it_stands(capsys):
    Path("this.yaml").write_text(ISSUE)
    Path("mine.yaml").write_text(MODEL_AND_DATA)
    main(["validate", "--config", "mine.yaml", "--config", "this.yaml", "--trainer.accelerator=cpu"])
    assert metric(capsys.readouterr().out, "bits") == 4
    Path("whole.yaml").write_text(MODEL_AND_DATA + ISSUE)
    main(["validate", "--config", "whole.yaml", "--trainer.accelerator=cpu"])  # and again in the same folder
    assert metric(capsys.readouterr().out, "bits") == 4


def test_on_the_command_line_alone(capsys):
    model_and_data = ["--model=my_model.Net", "--data=my_model.Data"]
    callback = ["--trainer.callbacks+=PostTrainingQuantization", "--trainer.callbacks.weights=int6"]
    main(["validate", *model_and_data, *callback, "--trainer.accelerator=cpu", "--trainer.logger=false"])
    assert metric(capsys.readouterr().out, "bits") == 6


def test_every_argument_can_be_written_in_yaml(monkeypatch):
    from lightning_quant import PostTrainingQuantization, RepQViT

    seen = []
    for cls in (PostTrainingQuantization, RepQViT):
        monkeypatch.setattr(cls, "calibrate", lambda self, *args: seen.append(self))
    common = {
        "attention": False, "first_last": "int8", "embeddings": "int8", "overrides": {"head": "int8"}, "target": "net",
        "skip": ["head", "stem"], "calibration_samples": 7, "calibration_loader": "train", "during_fit": True,
    }  # fmt: skip
    ptq = {"weights": "int4_g8", "activations": None, "ranges": "kl"}
    repq = {"weights": "int3", "activations": "int5", "stem_activations": None, "percentiles": [0.99, 0.999], "round_zero_point": False}  # fmt: skip  # noqa: E501
    validate(("PostTrainingQuantization", {**common, **ptq, "first_last": None}), ("RepQViT", {**common, **repq}))
    first, second = seen
    decisive = {key: common[key] for key in ("attention", "first_last", "embeddings", "overrides", "target", "skip")}
    for callback, given in ((first, {**decisive, **ptq, "first_last": None}), (second, {**decisive, **repq})):
        assert {key: callback.arguments[key] for key in given} == given
    for callback in seen:
        assert (callback.calibration_samples, callback.calibration_loader, callback.during_fit) == (7, "train", True)


def test_fit_and_calibrate_in_its_validation():
    config = write(
        "config.yaml",
        trainer=quiet(("PostTrainingQuantization", {"during_fit": True}), max_epochs=1, num_sanity_val_steps=0),
        **yaml.safe_load(MODEL_AND_DATA),
    )
    main(["fit", "--config", config, "--trainer.default_root_dir=run"])


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_names_every_verb_and_shows_a_config_that_works(args, capsys):
    main(args)
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\w+)   ", printed, re.MULTILINE) == [*VERBS]
    assert max(map(len, printed.splitlines())) <= 100
    example = re.search(r"a config:\n((?:  .*\n)+)", printed)[1]
    Path("example.yaml").write_text(textwrap.dedent(example))
    main(["validate", "--config", "example.yaml", "--trainer.logger=false"])
    assert metric(capsys.readouterr().out, "bits") == 4


@pytest.mark.parametrize("verb", ["plan", "validate", "fit", "test", "predict"])
def test_help_of_a_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--save_quantized" in printed and "--trainer.callbacks" in printed


def is_callback(found):
    return isinstance(found, type) and issubclass(found, Callback)


CALLBACKS = [name for name in lightning_quant.__all__ if is_callback(getattr(lightning_quant, name))]


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_of_a_callback_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit):
        main(["validate", f"--trainer.callbacks.help={name}"])
    printed = capsys.readouterr().out.partition("Help for")[2]
    explained = re.findall(r"^  --trainer\.callbacks\.(\w+).*?\n((?:   .*\n)+)", printed, re.MULTILINE)
    assert explained
    for argument, text in explained:
        assert not text.strip().startswith("(type"), argument


def test_print_config_round_trips(capsys):
    write("config.yaml", trainer=quiet(("RepQViT", {"weights": "int4"})), **yaml.safe_load(MODEL_AND_DATA))
    with pytest.raises(SystemExit):
        main(["validate", "--config", "config.yaml", "--print_config"])
    printed = capsys.readouterr().out
    (callback,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_quant.RepQViT" and callback["init_args"]["weights"] == "int4"
    assert callback["init_args"]["percentiles"] == [0.999, 0.9999, 0.99999]
    Path("whole.yaml").write_text(printed)
    main(["validate", "--config", "whole.yaml"])
    assert metric(capsys.readouterr().out, "bits") == 4


# ---------------------------------------------------------------- verbs of our own


def test_plan_shows_the_layers_and_changes_nothing(capsys):
    write("config.yaml", trainer=quiet(("RepQViT", {"weights": "int4"})), **yaml.safe_load(MODEL_AND_DATA))
    before = sorted(Path.cwd().rglob("*"))
    main(["plan", "--config", "config.yaml"])
    printed = capsys.readouterr().out
    assert "RepQViT would quantize" in printed and "Nothing was changed" in printed
    assert re.search(r"qkv +│ Linear +│ int4_asym_channel", printed) and "accuracy" not in printed
    assert [path for path in sorted(Path.cwd().rglob("*")) if "__pycache__" not in path.parts] == before


def test_plan_of_two_callbacks_is_two_tables(capsys):
    first = ("PostTrainingQuantization", {"target": "qkv", "attention": False})
    second = ("PostTrainingQuantization", {"target": "head", "weights": "int4"})
    config = write("config.yaml", trainer=quiet(first, second), **yaml.safe_load(MODEL_AND_DATA))
    main(["plan", "--config", config])
    printed = capsys.readouterr().out
    assert printed.count("would quantize") == 2 and "int8" in printed and "int4" in printed


def test_plan_needs_a_quantization_callback(capsys):
    config = write("config.yaml", trainer=quiet(("Fidelity", {})), **yaml.safe_load(MODEL_AND_DATA))
    assert "names no quantization callback" in mistake(["plan", "--config", config], capsys)


def test_methods_lists_every_callback_as_it_describes_itself(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["methods"])
    printed = capsys.readouterr().out
    for name in CALLBACKS:
        sentence = getattr(lightning_quant, name).__doc__.splitlines()[0].replace("``", "")
        assert re.search(rf"^{name} +{re.escape(sentence)} *$", printed, re.MULTILINE)


def test_a_saved_model_comes_back_with_the_same_metrics(capsys):
    config = write("c.yaml", trainer=quiet(("RepQViT", {"weights": "int4"})), **yaml.safe_load(MODEL_AND_DATA))
    main(["validate", "--config", config, "--save_quantized", "w4a4"])
    printed = capsys.readouterr().out
    assert "The quantized model is in w4a4" in printed
    assert sorted(path.name for path in Path("w4a4").iterdir()) == ["model.safetensors", "quantization.json"]
    main(["test", "--config", config, "--load_quantized", "w4a4", "--seed_everything=7"])  # other float weights
    assert metric(capsys.readouterr().out, "output") == metric(printed, "output")
    main(["predict", "--config", config, "--load_quantized", "w4a4"])


def test_quantization_aware_training_is_saved_after_fit(capsys):
    callback = ("QuantizationAwareTraining", {"weights": "int4"})
    config = write("c.yaml", trainer=quiet(callback, max_epochs=1), **yaml.safe_load(MODEL_AND_DATA))
    main(["fit", "--config", config, "--save_quantized", "trained", "--trainer.enable_checkpointing=false"])
    main(["test", "--config", config, "--load_quantized", "trained"])
    assert metric(capsys.readouterr().out, "bits") == 8  # the head is the last layer: first_last


def test_without_a_logger_no_config_is_written_over_ones_own():
    config = write("config.yaml", trainer=quiet(("RepQViT", {})), **yaml.safe_load(MODEL_AND_DATA))
    before = Path(config).read_text()
    main(["validate", "--config", config])
    assert Path(config).read_text() == before


def test_version_names_what_decides_the_result(capsys):
    main(["--version"])
    names = capsys.readouterr().out.split(", ")
    assert [name.split()[0] for name in names] == ["lightning-quant", "lightning", "torch"]
    assert names[0] == f"lightning-quant {lightning_quant.__version__}"


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "pip install 'lightning-quant[cli]'" in mistake(["validate", "--config", "config.yaml"], capsys)
    main(["methods"])  # needs no parser


# ---------------------------------------------------------------- mistakes


def mistake(args, capsys):
    """The one line that a mistake leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and len(line) < 300
    return line


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (("RepQViT", {"weigths": "int4"}), "RepQViT: Option 'weigths' is not accepted; did you mean weights?"),
        (("RepQViT", {"calibration_samples": "many"}), "calibration_samples: expected a int. Got value: many"),
        (("RepQViT", {"overrides": 3}), "overrides: expected a collections.abc.Mapping, found 3"),
        (("RepQVit", {}), "trainer.callbacks: there is no class RepQVit; did you mean RepQViT?"),
        (("lightning_quant.RepQVit", {}), "module 'lightning_quant' has no attribute 'RepQVit'"),
        (("my_model.Net", {}), "import path my_model.Net does not correspond to a subclass of Callback"),
        (("RepQViT", {"weights": "int1"}), 'weights: "int1" is not a number format: signed integers have 2 to 16'),
        (("PostTrainingQuantization", {"ranges": "best"}), '"best" is not a range rule'),
        (("RepQViT", {"skip": ["hed"]}), "skip: the pattern 'hed' matches no layer that can be quantized; there are"),
        (("RepQViT", {"overrides": {"hed": "int8"}}), "overrides: the pattern 'hed' matches no layer"),
        (("RepQViT", {"target": "hed"}), "target: the pattern 'hed' matches no layer"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else re.sub(r"\W+", "-", value)[:40],
)
def test_a_mistake_in_a_callback(callback, line, capsys):
    config = write("config.yaml", trainer=quiet(callback), **yaml.safe_load(MODEL_AND_DATA))
    assert line in mistake(["validate", "--config", config], capsys)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["validate", "--config", "no.yaml"], "config: file does not exist"),
        (["validate", "--config", "mine.yaml", "--ckpt_path", "no.ckpt"], "--ckpt_path: there is no no.ckpt"),
        (["validate", "--config", "mine.yaml", "--load_quantized", "no"], "no lacks `quantization.json`"),
        (["validate", "--config", "mine.yaml", "--modle.width=3"], "unrecognized arguments: --modle.width=3"),
        (["validate", "--config", "mine.yaml", "--trainer.acelerator=cpu"], "did you mean trainer.accelerator?"),
        (["validate", "--config", "mine.yaml", "--trainer.max_epochs=many"], "max_epochs: expected a int, found many"),
        (["validate", "--config", "mine.yaml", "--model=my_model.Nett"], "module 'my_model' has no attribute 'Nett'"),
        (["validate", "--config", "mine.yaml", "--model=my_modle.Net"], "No module named 'my_modle'"),
        (["validate", "--config", "mine.yaml", "--model.widht=3"], "Option 'widht' is not accepted"),
        (["validate", "--config", "mine.yaml", "--save_quantized", "to"], "Net is not quantized: run trainer.validate"),
        (["validate", "--config", "broken.yaml"], "Problems parsing config: while parsing"),
        (["validate"], "validate.model; name it in a config"),
        (["valdate", "--config", "mine.yaml"], "invalid choice: 'valdate' (choose from"),
        (["test", "--config", "quantized.yaml"], "PostTrainingQuantization has not calibrated this Net: run"),
        (["validate", "--model=my_model.Net", "--trainer.logger=false"], "`val_dataloader` must be implemented"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line(args, line, capsys):
    parts = yaml.safe_load(MODEL_AND_DATA)
    write("mine.yaml", trainer=quiet(), **parts)
    write("quantized.yaml", trainer=quiet(("PostTrainingQuantization", {})), **parts)
    Path("broken.yaml").write_text("trainer: [")
    assert line in mistake(args, capsys)


def test_a_callback_that_is_listed_twice(capsys):
    twice = quiet(("RepQViT", {"weights": "int4"}), ("RepQViT", {"weights": "int8"}))
    config = write("config.yaml", trainer=twice, **yaml.safe_load(MODEL_AND_DATA))
    line = mistake(["validate", "--config", config], capsys)
    assert "RepQViT is listed twice; give each a target= of its own" in line


@pytest.mark.parametrize("verb", ["plan", "validate"])
def test_a_bug_in_the_model_keeps_its_trace(verb, folder):
    (folder / "my_model.py").write_text(MODEL.replace(".chunk(3, -1)", ".reshape(3, 5)"))
    config = write("config.yaml", trainer=quiet(("RepQViT", {})), **yaml.safe_load(MODEL_AND_DATA))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        main([verb, "--config", config])


@pytest.mark.parametrize("error", ["ValueError", "TypeError"])
def test_an_error_that_the_model_raises_keeps_its_trace(error, folder):
    (folder / "my_model.py").write_text(MODEL.replace("return self.head", f"raise {error}('mine'); self.head"))
    config = write("config.yaml", trainer=quiet(("RepQViT", {})), **yaml.safe_load(MODEL_AND_DATA))
    with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[error], match="mine"):
        main(["validate", "--config", config])


def test_an_operation_that_fails_in_this_package_keeps_its_trace(monkeypatch):
    monkeypatch.setattr("lightning_quant.callbacks.base.select", None)
    config = write("config.yaml", trainer=quiet(("RepQViT", {})), **yaml.safe_load(MODEL_AND_DATA))
    with pytest.raises(TypeError, match="not callable"):
        main(["validate", "--config", config])


def test_what_a_run_logs_goes_to_stdout_and_logging_is_put_back(capsys):
    handlers = [handler for handler in logging.getLogger("lightning.pytorch").handlers if hasattr(handler, "stream")]
    streams = [handler.stream for handler in handlers]
    validate(("RepQViT", {}))
    assert streams and [handler.stream for handler in handlers] == streams
    assert not any(handler.filters for handler in handlers)
    printed = capsys.readouterr()
    assert "RepQViT quantized 2 layers" in printed.out and "Tip" not in printed.out and printed.err == ""


def test_the_working_directory_is_put_on_the_path_once(folder):
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["validate", "--help"])
    assert sys.path.count(str(folder)) == 1


# ---------------------------------------------------------------- as installed


def test_the_installed_command_in_a_folder_with_a_model():
    Path("this.yaml").write_text(MODEL_AND_DATA + ISSUE)
    command = Path(sys.executable).with_name("lightning-quant")
    done = subprocess.run(
        [command, "validate", "--config", "this.yaml", "--trainer.accelerator=cpu", "--trainer.logger=false"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert metric(done.stdout, "bits") == 4
    assert "RepQViT quantized 2 layers" in done.stderr + done.stdout
