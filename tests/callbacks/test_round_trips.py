"""What every method promises of a model that goes away and comes back: by file, by state dict, by copy, by YAML."""

import copy
import json
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI

from lightning_quant import CalibrationMixin, load_quantized, save_quantized
from tests.callbacks.fits import killed_and_resumed, weights_of
from tests.cases import TRAINING, metrics, predictions, quantized, steady
from tests.models import Sequences, TinyTransformer, validate


def test_a_checkpoint_loads_in_three_ways_and_fails_with_one_error_otherwise(case, tmp_path):
    build, model = case.model, case.model()
    running = case.run(model)
    running.save_checkpoint(tmp_path / "q.ckpt")
    running.save_checkpoint(tmp_path / "weights_only.ckpt", weights_only=True)
    save_quantized(model, tmp_path / "folder")
    want, answers = validate(model), predictions(case, model)

    for file in ("q.ckpt", "weights_only.ckpt"):
        torch.load(tmp_path / file, weights_only=True)
        fresh = build()
        assert validate(fresh, case(), ckpt_path=tmp_path / file) == want
        assert torch.equal(predictions(case, fresh), answers)
        WithMixin = type("WithMixin", (CalibrationMixin, build), {})
        assert validate(WithMixin.load_from_checkpoint(tmp_path / file)) == want
    for path in ("folder", "q.ckpt"):
        fresh = build()
        load_quantized(fresh, tmp_path / path)
        assert validate(fresh, case()) == want
        assert torch.equal(predictions(case, fresh), answers)

    plain = build()
    for load in (
        lambda: build.load_from_checkpoint(tmp_path / "q.ckpt"),
        lambda: validate(plain, ckpt_path=tmp_path / "q.ckpt"),
        lambda: plain.load_state_dict(model.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=r"(?s)the callback that made it .*CalibrationMixin.*load_quantized"):
            load()


def test_a_float_checkpoint_loads_into_a_quantized_model(case, tmp_path):
    source, model = case.model(), case.model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.1)
    torch.save({"state_dict": source.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "float.ckpt")
    want, keys = validate(source), list(model.state_dict())
    case.quantized(model)
    model.load_state_dict(source.state_dict())
    assert not quantized(model) and list(model.state_dict()) == keys
    assert validate(model) == want
    again = validate(model, case())
    assert quantized(model) and again != want
    assert (
        validate(case.model(), case(), ckpt_path=tmp_path / "float.ckpt") == again
    )  # calibrated after the weights came


class Outer(L.LightningModule):
    """A LightningModule around another one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    training_step = TinyTransformer.training_step
    configure_optimizers = TinyTransformer.configure_optimizers


def test_float_weights_into_a_submodule_uncalibrate_and_unfold_it(case):
    model, plain = Outer(case.model()), case.model()
    first = metrics(case.run(model))
    model.net.load_state_dict(plain.state_dict())
    assert [name for name, _ in model.net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not case().is_calibrated(model)
    assert metrics(case.run(model)) == first


def test_state_in_the_callback_is_its_arguments_only(case, tmp_path):
    case.run(case.model()).save_checkpoint(tmp_path / "q.ckpt")
    (state,) = torch.load(tmp_path / "q.ckpt", weights_only=True)["callbacks"].values()
    assert state == case().arguments


def test_pickle_and_deepcopy_of_the_quantized_model(case):
    model, keys = case.model(), list(case.model().state_dict())
    case.quantized(model)
    want = validate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert validate(twin, case()) == want
        twin.load_state_dict(model.state_dict())
        twin.load_state_dict(case.model().state_dict())
        assert not quantized(twin) and list(twin.state_dict()) == keys and quantized(model)
    assert validate(model) == want


def test_pickle_and_deepcopy_of_the_callback(case):
    want = metrics(case.run(case.model()))
    for twin in (copy.deepcopy(case()), pickle.loads(pickle.dumps(case()))):
        assert twin.arguments == case().arguments and twin.state_key == case().state_key
    assert metrics(case.run(case.model(), twin)) == want


def test_arguments_in_yaml_do_what_they_do_in_python(case, tmp_path):
    callback = {"class_path": f"lightning_quant.{case.method.__name__}", "init_args": case.arguments}
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    run = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "callbacks": [callback], **quiet}
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": run, "seed_everything": False}))
    args = [f"--config={tmp_path / 'config.yaml'}"]
    cli = LightningCLI(case.model, Sequences, args=args, run=False, save_config_callback=None)
    case.quantize(cli.trainer, cli.model)
    assert metrics(cli.trainer) == metrics(case.run(case.model()))


@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING)
def test_a_run_that_is_killed_and_resumed_ends_like_an_undisturbed_one(case, tmp_path):
    undisturbed, resumed = killed_and_resumed(case.model, lambda: [case()], tmp_path, data=steady())
    assert weights_of(resumed) == weights_of(undisturbed) and quantized(resumed)
    assert validate(resumed) == validate(undisturbed)
