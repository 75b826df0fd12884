"""Other callbacks beside ours: those that fail, average, stop early or keep checkpoints."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lightning_quant.checkpoint import record_of
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import HOOKS, left_as_it_was, refused, scales
from tests.cases import is_float, ptq, quantized, repq
from tests.models import NoBias, Sequences, TinyTransformer, trainer, validate


class Raises(L.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, *args, **kwargs):
        raise ArithmeticError("a fault in the user's own callback")


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_epoch_start", "on_validation_end"])
@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_fails_after_calibration_leaves_a_model_that_is_quantized_and_whole(method, hook, first):
    model, plain, callback = TinyTransformer(), TinyTransformer(), method()
    with pytest.raises(ArithmeticError):
        validate(model, *((Raises(hook), callback) if first else (callback, Raises(hook))))
    record = record_of(model)
    assert callback.is_calibrated(model) and not record.expected
    assert not any(vars(module)[kind] for module in model.modules() if module is not model for kind in HOOKS)
    assert not any(module.observer for module in model.modules() if isinstance(module, Quantizer))
    assert validate(model, callback) == validate(plain, method()) and scales(model) == scales(plain)


@pytest.mark.parametrize("hook", ["setup", "on_validation_start"])
def test_a_callback_that_fails_before_calibration_leaves_a_float_model(method, hook):
    model = TinyTransformer()
    with left_as_it_was(model), pytest.raises(ArithmeticError):
        validate(model, Raises(hook), method())
    assert is_float(model)


def test_a_callback_that_looks_at_the_model_in_on_validation_start_sees_it_quantized():
    seen = {}

    class Looks(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen["after" if quantized(pl_module) else "before"] = True

    validate(TinyTransformer(), Looks(), ptq(), Looks())
    assert seen == {"before": True, "after": True}


AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}
every_average = pytest.mark.parametrize("averaging", AVERAGING.values(), ids=AVERAGING)


@every_average
@pytest.mark.parametrize("ours_first", [True, False])
def test_averaging_the_weights_of_a_calibrated_model(method, averaging, ours_first, tmp_path):
    model = NoBias()
    validate(model, method())
    found, before = scales(model), model.head.weight.detach().clone()
    callbacks = [method(), averaging()] if ours_first else [averaging(), method()]
    run = trainer(*callbacks, ModelCheckpoint(tmp_path, save_last=True), max_epochs=3, enable_checkpointing=True)
    run.fit(model, datamodule=Sequences(32))
    assert scales(model) == found and not torch.equal(model.head.weight, before)
    want = validate(model, method())
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert validate(NoBias(), method(), ckpt_path=tmp_path / "after.ckpt") == want
    last = NoBias()
    validate(last, method(), ckpt_path=tmp_path / "last.ckpt")
    assert scales(last) == found


@every_average
@pytest.mark.parametrize("ours_first", [True, False])
def test_resuming_a_calibrated_model_whose_weights_are_averaged(method, averaging, ours_first, tmp_path):
    """The average is copied from a model that is float until the checkpoint is loaded."""

    def fit(model, epochs, **kwargs):
        callbacks = [method(), averaging()] if ours_first else [averaging(), method()]
        run = trainer(*callbacks, max_epochs=epochs, num_sanity_val_steps=0)
        run.fit(model, datamodule=Sequences(32), **kwargs)
        return run

    model, resumed = NoBias(), NoBias()
    validate(model, method())
    fit(model, 1).save_checkpoint(tmp_path / "q.ckpt")
    fit(resumed, 3, ckpt_path=tmp_path / "q.ckpt")
    assert scales(resumed) == scales(model) and method().is_calibrated(resumed)
    assert {name for name, _ in resumed.named_parameters()} == {name for name, _ in model.named_parameters()}
    difference = max((a - b).abs().max() for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    assert 0 < difference < 0.5


@every_average
@pytest.mark.parametrize("ours_first", [True, False])
def test_a_fit_that_averages_from_a_checkpoint_that_was_made_without(averaging, ours_first, tmp_path):
    model, run = NoBias(), trainer(repq(), max_epochs=1)
    run.validate(model, datamodule=Sequences(), verbose=False)
    run.fit(model, datamodule=Sequences(32))
    run.save_checkpoint(tmp_path / "q.ckpt")
    callbacks = [repq(), averaging()] if ours_first else [averaging(), repq()]
    resumed, run = NoBias(), trainer(*callbacks, max_epochs=3)
    if averaging is AVERAGING["swa"]:  # its copy is not told of the checkpoint, and lacks the biases of the fold
        with pytest.raises(ValueError, match="Averaging copied the float model before the checkpoint brought"):
            run.fit(resumed, datamodule=Sequences(32), ckpt_path=tmp_path / "q.ckpt")
        return
    run.fit(resumed, datamodule=Sequences(32), ckpt_path=tmp_path / "q.ckpt")
    assert scales(resumed) == scales(model)
    assert max((a - b).abs().max() for a, b in zip(resumed.parameters(), model.parameters(), strict=True)) < 0.5


def test_an_average_of_buffers_would_average_scales_and_is_refused(method):
    model = TinyTransformer()
    validate(model, method())
    with refused(model, r"EMAWeightAveraging would average the scales .*use_buffers=False", but=["record", "training"]):
        trainer(method(), EMAWeightAveraging(), max_epochs=1).fit(model, datamodule=Sequences(32))
    assert EMAWeightAveraging()._use_buffers is True  # the private name that this rests on


@every_average
def test_averaging_beside_an_uncalibrated_callback_is_plain_training(method, averaging):
    with_ours, plain = TinyTransformer(dropout=0.0), TinyTransformer(dropout=0.0)
    for model, callbacks in ((with_ours, [method(), averaging()]), (plain, [averaging()])):
        torch.manual_seed(0)
        trainer(*callbacks, max_epochs=2).fit(model, datamodule=Sequences(32))
    assert is_float(with_ours)
    assert all(torch.equal(a, b) for a, b in zip(with_ours.parameters(), plain.parameters(), strict=True))


@every_average
@pytest.mark.parametrize("ours_first", [True, False])
def test_calibrating_in_a_fit_that_averages_weights_is_refused(method, averaging, ours_first):
    model = NoBias()
    callbacks = [method(during_fit=True), averaging()]
    run = trainer(*(callbacks if ours_first else callbacks[::-1]), max_epochs=3, num_sanity_val_steps=0)
    with refused(model, r"Averaging copied the float model, which \w+\(during_fit=True\) .* trainer\.validate before"):
        run.fit(model, datamodule=Sequences(32))
    assert is_float(model)


def test_early_stopping_and_checkpoints_beside_calibration_in_fit(method, tmp_path):
    model = TinyTransformer()
    best = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=1)
    stopping = EarlyStopping("loss", patience=1)
    run = trainer(stopping, method(during_fit=True), best, max_epochs=3, enable_checkpointing=True)
    run.fit(model, datamodule=Sequences(32))
    found = scales(model)
    fresh = TinyTransformer()
    metrics = validate(fresh, method(during_fit=True), ckpt_path=best.best_model_path)
    assert metrics["loss"] == pytest.approx(best.best_model_score.item()) and scales(fresh) == found
