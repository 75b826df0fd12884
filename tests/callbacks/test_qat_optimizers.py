"""Quantization-aware training: which optimizer trains which scale, and how."""

import json

import lightning as L
import torch
import torch.nn.functional as F

from tests.callbacks.fits import (
    InOrder,
    Look,
    Net,
    fit,
    qat,
)
from tests.models import TinyTransformer


def groups(model, callback, **options):
    """The parameter groups that train, as (learning rate, weight decay, names)."""
    names = {}
    look = Look(
        on_train_start=lambda m: (
            names.update({id(p): n for n, p in m.named_parameters()})
            or [
                [(g["lr"], g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in o.param_groups]
                for o in m.trainer.optimizers
            ]
        )
    )
    fit(model, callback, look, epochs=1, **options)
    return look.seen["on_train_start"][0]


def test_scales_stay_in_a_group_without_weight_decay():
    ((rate, decay, names),) = groups(Net(), qat())[0]
    assert (rate, decay) == (0.05, 0) and len(names) == 56


def test_scales_have_no_weight_decay_and_a_learning_rate_of_their_own():
    ((weights, scales),) = groups(Net(weight_decay=0.1), qat(scale_lr=0.002))
    assert weights[:2] == (0.05, 0.1) and len(weights[2]) == 28
    assert scales[:2] == (0.002, 0.0) and len(scales[2]) == 28 and all("scale" in name for name in scales[2])


def test_an_optimizer_built_before_setup_trains_the_scales_too():
    class Prebuilt(Net):  # as LightningCLI does
        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.AdamW(self.parameters(), 0.01)

        def configure_optimizers(self):
            return self.optimizer

    ((weights, scales),) = groups(Prebuilt(), qat())
    assert len(weights[2]) == 28 and len(scales[2]) == 28 and scales[:2] == (0.01, 0.0)


def test_from_the_command_line(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    look = Look(
        on_train_end=lambda m: [(g["lr"], g["weight_decay"], len(g["params"])) for g in m.optimizers().param_groups]
    )
    arguments = {"activations": "int8", "scale_lr": 0.001, "overrides": {"head": "int8"}, "skip": ["embed"]}
    callback = {"class_path": "lightning_quant.QuantizationAwareTraining", "init_args": arguments}
    quiet = {"accelerator": "cpu", "enable_checkpointing": False, "logger": False, "enable_model_summary": False}
    config = {
        "trainer": {"max_epochs": 1, "callbacks": [callback], **quiet},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    args = ["fit", f"--config={tmp_path / 'config.yaml'}"]
    LightningCLI(TinyTransformer, InOrder, args=args, trainer_defaults={"callbacks": [look]}, save_config_callback=None)
    assert look.seen["on_train_end"] == [[(0.01, 0.1, 28), (0.001, 0.0, 26)]]


class TwoNetworks(L.LightningModule):
    """Two networks with an optimizer each."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = TinyTransformer(dropout=0.0), TinyTransformer(dropout=0.0)

    def forward(self, x):
        return self.first(x) + self.second(x)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(net.parameters(), 0.01) for net in (self.first, self.second)]


def test_every_scale_trains_with_its_own_network():
    for optimizer, network in zip(groups(TwoNetworks(), qat()), ("first", "second"), strict=True):
        assert [len(names) for _, _, names in optimizer] == [28, 28]
        assert all(name.startswith(network) for _, _, names in optimizer for name in names)
