"""Quantization-aware training that stops and goes on, begins late, or ends with BatchNorm at rest."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_quant import (
    save_quantized,
)
from tests.callbacks.fits import (
    Kill,
    Killed,
    Look,
    Net,
    NetWithMixin,
    WithBatchNorm,
    fit,
    killed_and_resumed,
    qat,
    quantizers,
    weights_of,
)
from tests.callbacks.unchanged import bits
from tests.models import Sequences, trainer, validate


@pytest.mark.parametrize(
    "arguments",
    [{"learn_offsets": True, "scale_lr": 0.01}, {"learn_scales": False}, {"delay_epochs": 1}, {"delay_epochs": 3}],
    ids=str,
)
def test_a_killed_run_ends_like_an_undisturbed_one(arguments, tmp_path):
    def build():
        return Net(momentum=0.9, weight_decay=0.01)

    undisturbed, resumed = killed_and_resumed(build, lambda: [qat(**arguments)], tmp_path)
    assert weights_of(resumed) == weights_of(undisturbed)
    assert validate(resumed) == validate(undisturbed) and quantizers(resumed)


def test_a_killed_run_with_a_scheduler_and_adam_ends_like_an_undisturbed_one(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    undisturbed, resumed = killed_and_resumed(Scheduled, lambda: [qat(scale_lr=1e-3)], tmp_path)
    assert weights_of(resumed) == weights_of(undisturbed)


def test_resuming_within_an_epoch_goes_on_as_it_was(tmp_path):
    last = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_last=True)
    arguments = {"freeze_batchnorm_epochs": 1}
    with pytest.raises(Killed):
        fit(WithBatchNorm(), qat(**arguments), last, Kill(1, 3), enable_checkpointing=True)
    look = Look(
        on_train_start=lambda m: m.head.weight_quantizer.scale.detach().clone(),
        on_train_batch_start=lambda m: m.norm.training,
    )
    fit(WithBatchNorm(), qat(**arguments), look, ckpt_path=last.last_model_path)
    stored = torch.load(last.last_model_path, weights_only=True)["state_dict"]["head.weight_quantizer.scale"]
    assert torch.equal(look.seen["on_train_start"][0], stored)
    assert look.seen["on_train_batch_start"] and not any(look.seen["on_train_batch_start"])


def test_a_float_run_cannot_be_resumed_as_a_quantized_one(tmp_path):
    running = fit(Net())
    running.save_checkpoint(tmp_path / "float.ckpt")
    model = Net()
    with pytest.raises(ValueError, match=r"checkpoint is of a float run.*without ckpt_path"):
        fit(model, qat(), ckpt_path=tmp_path / "float.ckpt")
    assert not quantizers(model)


def test_a_run_is_not_resumed_with_other_arguments(tmp_path):
    running = fit(Net(), qat())
    running.save_checkpoint(tmp_path / "q.ckpt")
    for other in (qat("int4"), qat(learn_offsets=True)):
        with pytest.raises(ValueError, match=r"another plan.*same arguments"):
            fit(Net(), other, ckpt_path=tmp_path / "q.ckpt")


def test_best_and_last_checkpoints(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="loss", save_last=True, save_top_k=-1)
    model = Net()
    running = fit(model, qat(), best, enable_checkpointing=True, epochs=3)
    assert len(list(tmp_path.glob("*.ckpt"))) == 4
    want = running.validate(datamodule=Sequences(), ckpt_path="best", verbose=False)[0]
    assert want["loss"] == pytest.approx(best.best_model_score.item())
    assert validate(NetWithMixin.load_from_checkpoint(best.best_model_path)) == want
    assert running.test(datamodule=Sequences(), ckpt_path="last", verbose=False)


# ---------------------------------------------------------------- delay and BatchNorm


def test_the_delay_trains_in_float():
    def look(model):
        return [p.detach().clone() for name, p in model.named_parameters() if "quantizer" not in name]

    plain, delayed = Look(on_train_epoch_end=look), Look(on_train_epoch_end=look)
    running = Look(on_train_epoch_start=lambda m: [q.calibrated for q in quantizers(m).values()])
    fit(Net(weight_decay=0.1), plain)
    fit(Net(weight_decay=0.1), qat("int2", delay_epochs=1), delayed, running)
    (first, second), (first_delayed, second_delayed) = (
        plain.seen["on_train_epoch_end"],
        delayed.seen["on_train_epoch_end"],
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, first_delayed, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(second, second_delayed, strict=True))
    assert [any(seen) for seen in running.seen["on_train_epoch_start"]] == [False, True]


def test_a_checkpoint_of_the_delay_is_not_calibrated(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(Net(), qat(delay_epochs=1), keep, enable_checkpointing=True)
    path = tmp_path / "epoch=0.ckpt"
    loaded = NetWithMixin.load_from_checkpoint(path)
    assert quantizers(loaded) and not any(q.calibrated for q in quantizers(loaded).values())
    with pytest.raises(ValueError, match="not calibrated"):
        save_quantized(loaded, tmp_path / "folder")
    with pytest.raises(RuntimeError, match="has not calibrated"):
        trainer(qat()).predict(Net(), datamodule=Sequences(), ckpt_path=path)
    float_model = Net()
    fit(float_model, epochs=1)
    want = validate(float_model, qat())
    assert validate(Net(), qat(), ckpt_path=path) == pytest.approx(want, rel=1e-3)  # which calibrates it


def test_batchnorm_statistics_stand_still_in_the_last_epochs():
    look = Look(on_train_epoch_end=lambda m: (bits(m.norm.running_mean), bits(m.norm.weight)))
    model = WithBatchNorm()
    fit(model, qat(freeze_batchnorm_epochs=2), look, epochs=4, val_check_interval=2)
    means, weights = zip(*look.seen["on_train_epoch_end"], strict=True)
    assert len({*means}) == 2 and means[1] == means[2] == means[3]
    assert len({*weights}) == 4
    assert model.norm.training
