"""Trainers and neighbours of all kinds: precision, loaders, flags, and other callbacks beside ours."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import CalibrationMixin, load_quantized, save_quantized
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import Quantizer
from tests.callbacks.cases import every_method, is_float, ptq, quantized, repq
from tests.callbacks.unchanged import HOOKS, facts, left_as_it_was, refused, scales
from tests.models import Sequences, TinyTransformer, trainer, validate


class NoBias(TinyTransformer):
    def __init__(self):
        super().__init__(bias=False)


class WithMixin(CalibrationMixin, NoBias):
    pass


def outputs(model):
    with torch.no_grad():
        return model.eval()(Sequences().val.tensors[0])


# ---------------------------------------------------------------- precision


@every_method
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(method, precision, tmp_path):
    model, run = NoBias(), trainer(method(), precision=precision)
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    exact = validate(NoBias())
    assert len(quantized(model)) == 10 and 0 < abs(want["loss"] - exact["loss"]) < 0.1
    assert run.validate(model, datamodule=Sequences(), verbose=False)[0] == want
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {p.dtype for p in model.parameters()} == {dtype}
    state = [b for m in model.modules() if isinstance(m, Quantizer) for b in m.buffers()]
    assert {b.dtype for b in state} == {torch.float32} and all(b.isfinite().all() for b in state)

    run.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    with_callback, by_folder = NoBias(), NoBias()
    assert validate(with_callback, method(), ckpt_path=tmp_path / "q.ckpt", precision=precision) == want
    with_mixin = WithMixin.load_from_checkpoint(tmp_path / "q.ckpt")
    assert validate(with_mixin, precision=precision) == want
    load_quantized(by_folder, tmp_path / "folder")
    assert validate(by_folder, precision=precision)["loss"] == pytest.approx(want["loss"], abs=0.02)
    assert scales(with_callback) == scales(with_mixin) == scales(by_folder) == scales(model)

    found = scales(model)
    for cast in ("half", "bfloat16", "double", "float"):
        getattr(model, cast)()
        assert scales(model) == found


def test_calibration_sees_the_activations_of_bf16_mixed():
    """Outside autocast the ranges would be those of float32."""
    mixed, full = TinyTransformer(), TinyTransformer()
    validate(mixed, ptq(), precision="bf16-mixed")
    validate(full, ptq())
    differing = {name for name, value in scales(mixed).items() if value != scales(full)[name]}
    assert any("input_quantizer" in name for name in differing) and not any("weight" in name for name in differing)


# ---------------------------------------------------------------- flags of the Trainer


@every_method
@pytest.mark.parametrize(
    "flags", [{"inference_mode": False}, {"num_nodes": 1}, {"deterministic": True}, {"detect_anomaly": True}], ids=str
)
def test_flags_that_change_nothing(method, flags):
    model, plain = TinyTransformer(), TinyTransformer()
    want = validate(plain, method())
    assert validate(model, method(), **flags) == want
    assert scales(model) == scales(plain)
    assert all(not tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


@every_method
def test_barebones(method):
    model, plain = TinyTransformer(), TinyTransformer()
    validate(plain, method())
    run = L.Trainer(accelerator="cpu", barebones=True, callbacks=[method()])
    run.validate(model, datamodule=Sequences(), verbose=False)
    assert scales(model) == scales(plain)
    run.predict(model, datamodule=Sequences())


@every_method
def test_with_a_progress_bar_a_logger_and_a_summary(method, tmp_path):
    model, plain = TinyTransformer(), TinyTransformer()
    want = validate(plain, method())
    run = L.Trainer(accelerator="cpu", callbacks=[method()], logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    assert run.validate(model, datamodule=Sequences())[0] == want
    assert scales(model) == scales(plain)


@every_method
def test_fast_dev_run(method):
    model = TinyTransformer()
    run = trainer(method(), fast_dev_run=True)
    run.validate(model, datamodule=Sequences(), verbose=False)
    assert len(quantized(model)) == 10
    run.fit(model, datamodule=Sequences(32))


@every_method
def test_limit_val_batches_limits_the_validation_and_not_the_calibration(method):
    model, plain = TinyTransformer(), TinyTransformer()
    validate(plain, method())
    validate(model, method(), limit_val_batches=1, limit_train_batches=1)
    assert scales(model) == scales(plain)


class TwoValLoaders(Sequences):
    def val_dataloader(self):
        return [DataLoader(self.val, batch_size=8), DataLoader(self.train, batch_size=16)]


class Several(TinyTransformer):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


@every_method
def test_two_validation_loaders(method):
    model, run = Several(), trainer(method())
    first, second = run.validate(model, datamodule=TwoValLoaders(), verbose=False)
    assert len(quantized(model)) == 10 and first["loss/dataloader_idx_0"] != second["loss/dataloader_idx_1"]
    plain = Several()
    validate(plain, method())
    assert scales(model) == scales(plain)  # both from the train loader
    by_val, first_only = Several(), Several()
    validate(by_val, method(calibration_loader="val"), data=TwoValLoaders())
    validate(first_only, method(calibration_loader="val"))
    assert scales(by_val) == scales(first_only) != scales(model)


# ---------------------------------------------------------------- strict_loading


class Lenient(NoBias):
    strict_loading = False


@every_method
def test_strict_loading_off(method, tmp_path):
    model, run = Lenient(), trainer(method())
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    fresh = Lenient()
    assert validate(fresh, method(), ckpt_path=tmp_path / "q.ckpt") == want and scales(fresh) == scales(model)
    stored = torch.load(tmp_path / "q.ckpt", weights_only=True)
    for key in [key for key in stored["state_dict"] if "blocks.1.fc2.weight_quantizer" in key]:
        del stored["state_dict"][key]
    torch.save(stored, tmp_path / "q.ckpt")
    fresh = Lenient()
    with refused(fresh, "truncated: .*weight_quantizer"):
        validate(fresh, method(), ckpt_path=tmp_path / "q.ckpt")


# ---------------------------------------------------------------- neighbours


class Raises(L.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, *args, **kwargs):
        raise ArithmeticError("a fault in the user's own callback")


@every_method
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


@every_method
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


@every_method
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


@every_method
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


@every_method
def test_an_average_of_buffers_would_average_scales_and_is_refused(method):
    model = TinyTransformer()
    validate(model, method())
    with refused(model, r"EMAWeightAveraging would average the scales .*use_buffers=False", but=["record", "training"]):
        trainer(method(), EMAWeightAveraging(), max_epochs=1).fit(model, datamodule=Sequences(32))
    assert EMAWeightAveraging()._use_buffers is True  # the private name that this rests on


@every_method
@every_average
def test_averaging_beside_an_uncalibrated_callback_is_plain_training(method, averaging):
    with_ours, plain = TinyTransformer(dropout=0.0), TinyTransformer(dropout=0.0)
    for model, callbacks in ((with_ours, [method(), averaging()]), (plain, [averaging()])):
        torch.manual_seed(0)
        trainer(*callbacks, max_epochs=2).fit(model, datamodule=Sequences(32))
    assert is_float(with_ours)
    assert all(torch.equal(a, b) for a, b in zip(with_ours.parameters(), plain.parameters(), strict=True))


@every_method
@every_average
@pytest.mark.parametrize("ours_first", [True, False])
def test_calibrating_in_a_fit_that_averages_weights_is_refused(method, averaging, ours_first):
    model = NoBias()
    callbacks = [method(during_fit=True), averaging()]
    run = trainer(*(callbacks if ours_first else callbacks[::-1]), max_epochs=3, num_sanity_val_steps=0)
    with refused(model, r"Averaging copied the float model, which \w+\(during_fit=True\) .* trainer\.validate before"):
        run.fit(model, datamodule=Sequences(32))
    assert is_float(model)


@every_method
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


# ---------------------------------------------------------------- the callback again


@every_method
def test_the_same_callback_twice_is_refused_by_the_trainer(method):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(method(), method())


@pytest.mark.filterwarnings("ignore:RepQViT.remove")
@every_method
def test_two_models_with_one_callback(method):
    callback, first, second = method(), TinyTransformer(), NoBias()
    want = validate(first, callback), validate(second, callback)
    assert (validate(first, callback), validate(second, callback)) == want
    with left_as_it_was(second, but=["record"]):
        callback.remove(first)
    assert callback.is_calibrated(second) and not callback.is_calibrated(first)


def test_two_callbacks_of_which_one_finds_its_part_float_again(tmp_path):
    """Float weights that went into one part take nothing from the part of the other callback."""
    ours, others = ptq(target="blocks.0"), ptq(target="blocks.1", weights="int4")
    model = NoBias()
    validate(model, ours, others)
    found = {name: value for name, value in scales(model).items() if name.startswith("blocks.1")}
    model.blocks[0].load_state_dict(NoBias().blocks[0].state_dict())
    validate(model, ours)
    assert {name: value for name, value in scales(model).items() if name.startswith("blocks.1")} == found
    assert ours.is_calibrated(model) and others.is_calibrated(model)


def test_float_weights_into_one_block_of_a_folded_model(tmp_path):
    """The biases that folding created in the other block still carry a part of its function."""
    model, callback = NoBias(), repq()
    want = outputs(model)
    validate(model, callback)
    model.blocks[0].load_state_dict(NoBias().blocks[0].state_dict())
    run = trainer(callback)
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    assert validate(NoBias(), repq(), ckpt_path=tmp_path / "q.ckpt") == metrics
    with pytest.warns(UserWarning, match="stay folded"):
        callback.remove(model)
    assert torch.allclose(outputs(model), want, atol=1e-4)


@pytest.mark.parametrize("again", [ptq, repq])
def test_another_method_after_a_fold_was_removed(again, tmp_path):
    model = NoBias()
    want = outputs(model)
    validate(model, repq())
    with pytest.warns(UserWarning, match="stay folded"):
        repq().remove(model)
    run = trainer(again())
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    assert validate(NoBias(), again(), ckpt_path=tmp_path / "q.ckpt") == metrics
    fresh = NoBias()
    load_quantized(fresh, tmp_path / "folder")
    assert validate(fresh) == pytest.approx(metrics, abs=1e-6)
    model.load_state_dict(NoBias().state_dict())
    assert not quantized(model) and torch.equal(outputs(model), want) and model.blocks[0].fc1.bias is None


@every_method
def test_a_failed_second_calibration_leaves_the_half_calibrated_model_as_it_was(method, monkeypatch):
    model = NoBias()
    validate(model, method())
    model.blocks[0].load_state_dict(NoBias().blocks[0].state_dict())
    with left_as_it_was(model, but=["record"]), monkeypatch.context() as patch:
        patch.setattr(Quantizer, "fit", Raises.fail)
        with pytest.raises(ArithmeticError):
            validate(model, method())
    assert not method().is_calibrated(model) and isinstance(model.head, QuantizedLayer)
    validate(model, method())
    assert method().is_calibrated(model)


def test_facts_sees_what_it_should():
    """The helper itself: each of these changes is found."""
    changes = {
        "value": lambda m: m.head.weight.data.__setitem__((0, 0), float("nan")),
        "sign of zero": lambda m: m.head.weight.data.mul_(-0.0),
        "parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone())),
        "class": lambda m: setattr(m.head, "__class__", type("Other", (nn.Linear,), {})),
        "hook": lambda m: m.head.register_forward_hook(lambda *_: None),
        "load hook": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
        "flag": lambda m: m.head.eval(),
        "grad flag": lambda m: m.head.weight.requires_grad_(False),
        "buffer": lambda m: m.head.register_buffer("folded", torch.tensor(False)),
        "attribute": lambda m: setattr(m.head, "observer", None),
        "dtype": lambda m: m.head.double(),
        "child": lambda m: setattr(m, "dropout", nn.Dropout()),
    }
    for name, change in changes.items():
        model = TinyTransformer()
        with pytest.raises(AssertionError), left_as_it_was(model):
            change(model)
        assert facts(model), name
