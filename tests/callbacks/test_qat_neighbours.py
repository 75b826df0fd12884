"""Quantization-aware training beside averages of weights, other precisions, the compiler and a second process."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from tests.callbacks.fits import (
    InOrder,
    Net,
    NetWithMixin,
    WithBatchNorm,
    fit,
    killed_and_resumed,
    qat,
    quantizers,
    training_loss,
    weights_of,
)
from tests.callbacks.unchanged import bits, refused
from tests.models import Sequences, trainer, validate


@pytest.mark.parametrize("delay_epochs", [0, 1])
def test_beside_an_average_of_the_weights(delay_epochs, tmp_path):
    average, shown = EMAWeightAveraging(decay=0.5, use_buffers=False), []

    class Showing(Net):
        def validation_step(self, batch, batch_idx):
            shown.append(F.cross_entropy(self(batch[0]), batch[1]).item())

    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model = Showing()
    fit(model, qat(delay_epochs=delay_epochs), average, keep, enable_checkpointing=True, num_sanity_val_steps=1)
    if not delay_epochs:  # before the first step the average is the start
        start = Net()
        validate(start, qat())
        with torch.no_grad():
            x, y = (tensor[:16] for tensor in Sequences().val.tensors)
            assert shown[0] == pytest.approx(F.cross_entropy(start.eval()(x), y).item())
    assert all(loss < 2 for loss in shown)
    averaged = NetWithMixin.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert weights_of(averaged) == weights_of(model)  # what the fit ends with is the average
    stored = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert not torch.equal(
        stored["current_model_state"]["head.weight_quantizer.scale"],
        stored["state_dict"]["head.weight_quantizer.scale"],
    )


def test_a_killed_run_with_an_average_ends_like_an_undisturbed_one(tmp_path):
    undisturbed, resumed = killed_and_resumed(
        Net, lambda: [qat(), EMAWeightAveraging(decay=0.9, use_buffers=False)], tmp_path
    )
    assert weights_of(resumed) == weights_of(undisturbed)


def test_beside_stochastic_weight_averaging():
    for build in (Net, WithBatchNorm):
        model = build()
        fit(model, qat(freeze_batchnorm_epochs=1), StochasticWeightAveraging(0.01, swa_epoch_start=2), epochs=4)
        assert build is Net or (model.norm.training and model.norm.running_mean.abs().min() > 0)
        assert training_loss(model) < 1.2 and quantizers(model)


@pytest.mark.parametrize("average", [WeightAveraging, lambda: StochasticWeightAveraging(0.01)])
def test_an_average_must_come_later(average):
    model = Net()
    with refused(model, "put QuantizationAwareTraining before it"):
        fit(model, average(), qat())


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("calibrated", [False, True])
def test_an_average_must_leave_zero_points_alone(average, calibrated):
    model = Net()
    if calibrated:
        validate(model, qat())
    with refused(model, "pass use_buffers=False", but=["record"]):
        fit(model, qat(), average())


def test_an_average_that_comes_too_late_to_be_seen_in_setup_must_leave_zero_points_alone_too():
    class Late(Net):
        def setup(self, stage):
            if stage == "fit":
                self.trainer.callbacks.append(EMAWeightAveraging())

    model = Late()
    validate(model, qat())
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"would average the scales and integer zero points .* use_buffers=False"):
        fit(model, qat())
    assert weights_of(model) == before


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"detect_anomaly": True, "limit_train_batches": 1, "limit_val_batches": 0},
    ],
    ids=str,
)
def test_trainer_options(options, tmp_path):
    model = Net()
    running = fit(model, qat(learn_offsets=True), epochs=2, **options)
    assert all(
        q.scale.dtype == torch.float32 and q.zero_point.dtype == torch.float32 for q in quantizers(model).values()
    )
    assert all(p.isfinite().all() for p in model.parameters())
    running.save_checkpoint(tmp_path / "q.ckpt")
    want = trainer(precision=options.get("precision")).validate(model, datamodule=Sequences(), verbose=False)[0]
    again = trainer(qat(learn_offsets=True), precision=options.get("precision"))
    assert again.validate(Net(), datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt", verbose=False)[0] == want


class Small(Net):
    def forward(self, x):
        return self.head(F.gelu(self.embed(x)).mean(1))


def test_compiled_equals_eager():
    compiled, eager = Small(), Small()
    trainer(qat(), max_epochs=1, limit_val_batches=0).fit(
        torch.compile(compiled, backend="eager"), datamodule=InOrder()
    )
    fit(eager, qat(), epochs=1, limit_val_batches=0)
    assert len(quantizers(compiled)) == 4
    for name, value in eager.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(compiled.state_dict()[name], value, atol=1e-5), name


class OnRanks(L.Callback):
    """What each rank ends with, in files."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"start{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"end{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("delay_epochs", [0, 1])
def test_two_ranks_train_equal_scales(delay_epochs, tmp_path):
    model, callback = NetWithMixin(), qat(delay_epochs=delay_epochs, learn_offsets=True)
    fit(model, callback, OnRanks(tmp_path), strategy="ddp_fork", devices=2)
    for moment in ("start", "end"):
        first, second = (torch.load(tmp_path / f"{moment}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert {name: bits(value) for name, value in first.items()} == {name: bits(v) for name, v in second.items()}
    assert weights_of(model) == {name: bits(value) for name, value in first.items()}  # taken over by this process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_that_hand_back_a_state_dict_need_the_mixin():
    with pytest.raises(Exception, match="CalibrationMixin before LightningModule"):
        fit(Net(), qat(), strategy="ddp_fork", devices=2)
