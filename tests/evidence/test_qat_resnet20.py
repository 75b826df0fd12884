"""Quantization-aware training of a real ResNet-20, every layer with 4-bit weights and 4-bit activations."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from tests.real import CifarData, Classifier, resnet20

pytestmark = pytest.mark.evidence
EPOCHS, LAST = 4, 2
FORMATS = {"weights": "int4", "activations": "int4", "first_last": None, "calibration_samples": 128}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Tuned(Classifier):
    """Trained gently: it starts from trained weights."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Kill(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 5:
            raise InterruptedError


def model():
    net = Tuned(resnet20().net.train(), classes=10)
    return net.train()


def fit(net, *callbacks, ckpt_path=None):
    qat = QuantizationAwareTraining(**FORMATS, freeze_batchnorm_epochs=LAST)
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[qat, *callbacks], reload_dataloaders_every_n_epochs=1, **QUIET)
    trainer.fit(net, datamodule=CifarData(), ckpt_path=ckpt_path)
    return net


def top1(net, *callbacks):
    trainer = L.Trainer(callbacks=list(callbacks), enable_checkpointing=False, **QUIET)
    return 100 * trainer.validate(net, datamodule=CifarData(), verbose=False)[0]["top1"]


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    torch.set_num_threads(1)
    return fit(model(), ModelCheckpoint(tmp_path_factory.mktemp("undisturbed")))


def test_training_is_two_points_above_post_training_quantization(trained, capsys):
    exact = top1(model())
    start = top1(model(), PostTrainingQuantization(**FORMATS))
    end = top1(trained)
    with capsys.disabled():
        print(f"\n  ResNet-20 W4A4: float {exact:.2f}, post-training {start:.2f}, trained {EPOCHS} epochs {end:.2f}")
    assert exact == pytest.approx(91.73, abs=0.01)
    assert end >= start + 2


def test_a_run_killed_in_epoch_2_and_resumed_equals_an_undisturbed_one(trained, tmp_path):
    last = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.raises(InterruptedError):
        fit(model(), last, Kill())
    resumed = fit(model(), ModelCheckpoint(tmp_path / "resumed"), ckpt_path=last.last_model_path)
    for name, value in trained.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert top1(resumed) == top1(trained)
