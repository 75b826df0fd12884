"""Trainers of all kinds: precision, loaders, flags."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_quant import CalibrationMixin, load_quantized, save_quantized
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import refused, scales
from tests.cases import ptq, quantized
from tests.models import NoBias, Sequences, TinyTransformer, trainer, validate


class WithMixin(CalibrationMixin, NoBias):
    pass


# ---------------------------------------------------------------- precision


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


@pytest.mark.parametrize(
    "flags", [{"inference_mode": False}, {"num_nodes": 1}, {"deterministic": True}, {"detect_anomaly": True}], ids=str
)
def test_flags_that_change_nothing(method, flags):
    model, plain = TinyTransformer(), TinyTransformer()
    want = validate(plain, method())
    assert validate(model, method(), **flags) == want
    assert scales(model) == scales(plain)
    assert all(not tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


def test_barebones(method):
    model, plain = TinyTransformer(), TinyTransformer()
    validate(plain, method())
    run = L.Trainer(accelerator="cpu", barebones=True, callbacks=[method()])
    run.validate(model, datamodule=Sequences(), verbose=False)
    assert scales(model) == scales(plain)
    run.predict(model, datamodule=Sequences())


def test_with_a_progress_bar_a_logger_and_a_summary(method, tmp_path):
    model, plain = TinyTransformer(), TinyTransformer()
    want = validate(plain, method())
    run = L.Trainer(accelerator="cpu", callbacks=[method()], logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    assert run.validate(model, datamodule=Sequences())[0] == want
    assert scales(model) == scales(plain)


def test_fast_dev_run(method):
    model = TinyTransformer()
    run = trainer(method(), fast_dev_run=True)
    run.validate(model, datamodule=Sequences(), verbose=False)
    assert len(quantized(model)) == 10
    run.fit(model, datamodule=Sequences(32))


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
