"""``lightning-quant``: LightningCLI with the quantization callbacks at hand."""

import re
import subprocess
import sys
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
        quantizer = getattr(self.head, "weight_quantizer", None)
        self.log("bits", 32.0 if quantizer is None else float(quantizer.scheme.bits))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def __init__(self, samples: int = 64):
        super().__init__()
        self.set = TensorDataset(torch.randn(samples, 4, 16), torch.randint(2, (samples,)))

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=16)

    val_dataloader = train_dataloader
"""
ISSUE = """
trainer:
  callbacks:
    - class_path: lightning_quant.RepQViT
      init_args: {weights: int4, activations: int4}
"""
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
def folder(tmp_path):
    """A working directory with a model of one's own, and no trace of it afterwards."""
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
    assert first.arguments == {
        **{key: common[key] for key in ("attention", "embeddings", "overrides", "target", "skip")},
        **{**ptq, "first_last": None},
    }
    assert second.arguments == {
        **{key: common[key] for key in ("attention", "first_last", "embeddings", "overrides", "target", "skip")},
        **repq,
    }
    for callback in seen:
        assert (callback.calibration_samples, callback.calibration_loader, callback.during_fit) == (7, "train", True)


def test_fit_and_calibrate_in_its_validation():
    config = write(
        "config.yaml",
        trainer=quiet(("PostTrainingQuantization", {"during_fit": True}), max_epochs=1, num_sanity_val_steps=0),
        **yaml.safe_load(MODEL_AND_DATA),
    )
    main(["fit", "--config", config, "--trainer.default_root_dir=run"])


@pytest.mark.parametrize("args", [["--help"], ["validate", "--help"]])
def test_help(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "usage:" in printed and ("--config" in printed or "validate" in printed)


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


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (("RepQViT", {"weigths": "int4"}), "weigths"),
        (("RepQViT", {"calibration_samples": "many"}), "calibration_samples"),
        (("lightning_quant.RepQVit", {}), "RepQVit"),
    ],
    ids=["misspelt argument", "wrong type", "misspelt class"],
)
def test_mistakes_exit_with_2_and_say_why(callback, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        validate(callback)
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_a_wrong_format_says_so():
    with pytest.raises(ValueError, match='weights: "int1" is not a number format'):
        validate(("RepQViT", {"weights": "int1"}))


def test_the_working_directory_is_put_on_the_path_once(folder):
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["--help"])
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
