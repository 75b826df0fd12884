"""Quantization-aware training: what Lightning's own callback of that name never did."""

import copy

import pytest
import torch

from lightning_quant import (
    PostTrainingQuantization,
    load_quantized,
    save_quantized,
)
from lightning_quant.checkpoint import record_of
from lightning_quant.quantizers import UniformQuantizer
from tests.callbacks.fits import (
    Look,
    Net,
    NetWithMixin,
    fit,
    qat,
    quantizers,
    training_loss,
    weights_of,
)
from tests.models import Sequences, trainer, validate

# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize("weights", ["int2", "int3"])
def test_training_is_better_than_post_training_quantization(weights):
    float_model = Net()
    fit(float_model, epochs=15)
    after_training = copy.deepcopy(float_model)
    validate(after_training, PostTrainingQuantization(weights, "int4", first_last="int8"))
    trained = copy.deepcopy(float_model)
    fit(trained, qat(weights, ranges="mse"), epochs=8)
    assert training_loss(trained) < training_loss(after_training) - 0.05
    assert trained.blocks[0].fc1.quantized().unique().numel() <= 2 ** int(weights[-1]) * 64


def test_learning_the_scales_alone_is_better_too():
    model = Net()
    fit(model, epochs=15)
    start = copy.deepcopy(model)
    validate(start, qat("int2"))
    model.options["lr"] = 1e-9
    fit(model, qat("int2", scale_lr=0.02), epochs=8)
    assert training_loss(model) < training_loss(start) - 0.05


# ---------------------------------------------------------------- the life of the scales


def test_scales_exist_before_the_optimizer_and_are_trained_by_it():
    class Watching(Net):
        def configure_optimizers(self):
            self.then = dict(self.named_parameters())
            return super().configure_optimizers()

    model = Watching()
    look = Look(
        on_train_start=lambda m: {n: p.detach().clone() for n, p in m.named_parameters()},
        on_train_end=lambda m: dict(m.named_parameters()),
    )
    fit(model, qat(), look)
    (before,), (after,) = look.seen.values()
    scales = {name for name in before if "quantizer.scale" in name}
    assert len(scales) == 28  # weights and inputs of 10 layers, and 4 operands of 2 attention sites
    assert all(after[name] is model.then[name] for name in scales)
    assert all(not torch.equal(after[name], before[name]) for name in scales)
    assert not any("quantizer" in name for name, _ in model.named_parameters())  # afterwards they rest


def test_the_start_is_post_training_quantization():
    want = validate(Net(), PostTrainingQuantization("int3", "int4", "minmax", first_last="int8"))
    model = Net()
    fit(model, qat(), limit_train_batches=0)
    assert validate(model) == want and validate(Net(), qat()) == want


def test_validate_before_the_fit_reports_the_start_and_the_fit_takes_it_over():
    model, callback = Net(), qat(calibration_samples=16)
    validate(model, callback)
    found = weights_of(model)
    fit(model, qat(calibration_samples=8), limit_train_batches=0)
    assert weights_of(model) == found
    fit(model, callback)
    assert weights_of(model) != found


def test_validation_within_the_fit_and_the_sanity_check_report_the_quantized_model():
    class Showing(Net):
        def validation_step(self, batch, batch_idx):
            self.shown[self.trainer.sanity_checking].append(self(batch[0]).clone())
            super().validation_step(batch, batch_idx)

    model, start = Showing(), Net()
    model.shown = {True: [], False: []}
    fit(model, qat(), epochs=1, num_sanity_val_steps=-1)
    validate(start, qat())
    x = Sequences().val.tensors[0]
    with torch.no_grad():
        assert torch.equal(torch.cat(model.shown[True]), start.eval()(x))
        assert torch.allclose(torch.cat(model.shown[False]), model.eval()(x), atol=1e-5)


def test_scales_are_positive_after_every_step():
    def signs(model):
        return min(module.scale.min().item() for module in quantizers(model).values())

    look = Look(on_train_batch_end=signs)
    fit(Net(), qat(scale_lr=1000.0), look, limit_val_batches=0)
    assert len(look.seen["on_train_batch_end"]) == 8 and min(look.seen["on_train_batch_end"]) > 0


def test_validation_moves_nothing():
    def look(model):
        return weights_of(model)

    seen = Look(on_validation_start=look, on_validation_end=look)
    fit(Net(), qat(), seen, val_check_interval=2)
    before, after = seen.seen.values()
    assert len(before) == 5 and before == after


def test_after_the_fit_the_model_is_like_any_quantized_one(tmp_path):
    model, callback = Net(), qat()
    running = fit(model, callback, enable_checkpointing=False)
    want = {name: value.item() for name, value in running.callback_metrics.items()}
    assert validate(model) == pytest.approx(want) and validate(model, callback) == validate(model)
    assert {type(quantizer) for quantizer in quantizers(model).values()} == {UniformQuantizer}
    running.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    want, logits = validate(model), torch.cat(running.predict(model, datamodule=Sequences()))
    running.test(model, datamodule=Sequences(), verbose=False)

    torch.load(tmp_path / "q.ckpt", weights_only=True)
    assert validate(Net(), qat(), ckpt_path=tmp_path / "q.ckpt") == want
    assert validate(NetWithMixin.load_from_checkpoint(tmp_path / "q.ckpt")) == want
    for path in ("q.ckpt", "folder"):
        fresh = Net()
        load_quantized(fresh, tmp_path / path)
        assert torch.equal(torch.cat(trainer(qat()).predict(fresh, datamodule=Sequences())), logits)
    codes = sum(f.stat().st_size for f in (tmp_path / "folder").glob("*.safetensors"))
    assert codes < 0.6 * sum(p.numel() * 4 for p in model.parameters())

    latent = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback.remove(model)
    assert not quantizers(model) and record_of(model) is None
    assert all(torch.equal(p, latent[name]) for name, p in model.named_parameters())


def test_a_second_fit_goes_on_from_the_scales_of_the_first():
    model = Net()
    fit(model, qat())
    found = weights_of(model)
    fit(model, qat(), limit_train_batches=0)
    assert weights_of(model) == found
    fit(model, qat(scale_lr=1e-9, calibration_samples=1), epochs=1)
    other = {name for name, value in weights_of(model).items() if value != found[name] and "scale" not in name}
    assert "head.weight" in other


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_end"])
def test_an_exception_leaves_an_ordinary_model(hook):
    def fail(model):
        raise ZeroDivisionError

    model = Net()
    with pytest.raises(ZeroDivisionError):
        fit(model, qat(delay_epochs=1 if hook == "on_train_start" else 0), Look(**{hook: fail}), num_sanity_val_steps=0)
    if hook == "on_train_start":  # nothing was calibrated yet
        assert not quantizers(model) and record_of(model) is None
    else:
        assert {type(q) for q in quantizers(model).values()} == {UniformQuantizer}
        assert not any("quantizer" in name for name, _ in model.named_parameters())
        validate(model)
