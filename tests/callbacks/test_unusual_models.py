"""Models that are built in unusual ways: a right answer or one clear error, and what is not ours is left alone."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant import CalibrationMixin, load_quantized, save_quantized
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer
from tests.callbacks.unchanged import left_as_it_was, refused, scales
from tests.cases import ptq, quantized, removed, repq
from tests.models import CLASSES, WIDTH, Block, Sequences, Small, TinyTransformer, trainer, validate


def plan_of(model):
    (plan,) = record_of(model).plans.values()
    return plan


# ---------------------------------------------------------------- layers that come late, or go


class LateBuilt(TinyTransformer):
    """Builds its blocks and head when Lightning asks."""

    def __init__(self):
        super().__init__()
        del self.blocks, self.head
        self.blocks = None

    def configure_model(self):
        if self.blocks is None:
            whole = TinyTransformer()
            self.blocks, self.head = whole.blocks, whole.head


class LateBuiltWithMixin(CalibrationMixin, LateBuilt):
    pass


def test_layers_built_by_configure_model(method, tmp_path):
    model, run = LateBuilt(), trainer(method())
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    assert len(quantized(model)) == 10 and want == validate(TinyTransformer(), method())
    run.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    assert validate(LateBuilt(), method(), ckpt_path=tmp_path / "q.ckpt") == want
    assert validate(LateBuiltWithMixin.load_from_checkpoint(tmp_path / "q.ckpt")) == want
    for path in ("folder", "q.ckpt"):
        fresh = LateBuilt()
        with refused(fresh, "names a layer `blocks.0.\\w+`, which LateBuilt does not have"):
            load_quantized(fresh, tmp_path / path)
        fresh.configure_model()
        load_quantized(fresh, tmp_path / path)
        assert validate(fresh) == want


class BuiltInSetup(LateBuilt):
    def setup(self, stage):
        LateBuilt.configure_model(self)

    def configure_model(self):
        pass


def test_layers_built_by_the_modules_own_setup(method, tmp_path):
    model, run = BuiltInSetup(), trainer(method())
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    assert validate(BuiltInSetup(), method(), ckpt_path=tmp_path / "q.ckpt") == want


def test_a_layer_added_after_calibration_stays_float(method):
    model, callback = TinyTransformer(), method()
    want = validate(model, callback)
    found = scales(model)
    model.extra = nn.Linear(CLASSES, CLASSES)
    nn.init.eye_(model.extra.weight)
    nn.init.zeros_(model.extra.bias)
    forward = TinyTransformer.forward
    model.__class__ = type("Longer", (TinyTransformer,), {"forward": lambda self, x: self.extra(forward(self, x))})
    after = validate(model, callback)
    assert after == pytest.approx(want) and scales(model) == found and type(model.extra) is nn.Linear
    removed(callback, model)
    assert type(model.extra) is nn.Linear
    validate(model, callback)
    assert isinstance(model.extra, QuantizedLayer)


def test_a_layer_replaced_after_calibration_is_named(method, tmp_path):
    model, callback = TinyTransformer(), method()
    validate(model, callback)
    model.head = nn.Linear(WIDTH, CLASSES)
    for use in (
        lambda: validate(model, callback),
        lambda: trainer(callback).predict(model, datamodule=Sequences()),
        lambda: save_quantized(model, tmp_path / "folder"),
    ):
        with refused(model, r"`head`.*Linear.*remove\(model\)", but=["record"]):
            use()
    validate(model)  # without the callback it is a model like any other
    removed(callback, model)
    validate(model, callback)
    assert isinstance(model.head, QuantizedLayer)


def test_a_layer_taken_away_after_calibration_is_named(method):
    model, callback = TinyTransformer(), method()
    validate(model, callback)
    del model.blocks[1]
    with refused(model, r"`blocks\.1\.\w+`.*remove\(model\)", but=["record"]):
        validate(model, callback)
    removed(callback, model)
    validate(model, callback)
    assert len(quantized(model)) == 6


# ---------------------------------------------------------------- what calibration can call


class StepOnly(L.LightningModule):
    """No forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.block = Block()

    def logits(self, batch):
        return self.layer(self.norm(self.block(batch[0]))).mean(1)

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self.logits(batch), batch[1]))


def test_a_module_without_forward_says_what_to_define(method):
    model = StepOnly()
    with refused(model, "StepOnly defines no forward, no predict_step and no calibration_step", TypeError):
        validate(model, method())


@pytest.mark.parametrize("step", ["predict_step", "calibration_step", "forward"])
def test_a_module_without_forward_but_with_another_way(method, step):
    ways = {
        "predict_step": lambda self, batch, batch_idx: self.logits(batch),
        "calibration_step": lambda self, batch: self.logits(batch),
        "forward": lambda self, x: self.logits([x]),
    }
    model = type("Stepping", (StepOnly,), {step: ways[step]})()
    before = validate(model)
    after = validate(model, method())
    assert len(quantized(model)) == 5 and 0 < abs(before["loss"] - after["loss"]) < 0.05


# ---------------------------------------------------------------- networks inside the module that do not run


class WithTeacher(TinyTransformer):
    """A perceptual metric that runs in validation_step only, and a frozen teacher that runs in training_step only."""

    def __init__(self):
        super().__init__()
        self.perceptual = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block())
        self.teacher = TinyTransformer().requires_grad_(False).eval()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), self.teacher(batch[0]))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("perceptual", self.perceptual(batch[0]).square().mean())


def test_a_metric_network_and_a_teacher_are_left_alone_and_named(method):
    model, callback = WithTeacher(), method()
    before = validate(model)
    with left_as_it_was(model.teacher), left_as_it_was(model.perceptual):
        after = validate(model, callback)
    assert after["perceptual"] == before["perceptual"] and after["loss"] != before["loss"]
    assert len(quantized(model)) == 10 and not any(
        "teacher" in name or "perceptual" in name for name in quantized(model)
    )
    named = plan_of(model).skipped
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            assert "calibration never reached it" in named[name]
    assert all(name.startswith(("teacher.", "perceptual.")) for name in named)
    trainer(method(), max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0).fit(model, datamodule=Sequences())
    with left_as_it_was(model.teacher):
        removed(callback, model)


def test_a_target_that_does_not_run_is_refused(method):
    model = WithTeacher()
    with refused(model, r"target.*teacher|nothing to quantize.*never reached"):
        validate(model, method(target="teacher"))


# ---------------------------------------------------------------- nothing to do


class Bare(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(WIDTH)), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return (self.norm(x) * self.scale).mean(1)[:, :CLASSES]

    validation_step, note = Small.validation_step, Small.note


def test_a_model_with_no_layer_to_quantize_is_refused(method):
    model = Bare()
    with refused(model, "nothing to quantize in Bare"):
        validate(model, method())


class Convolutional(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(5, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, CLASSES, 3))

    def forward(self, x):
        return self.net(x).mean(-1)

    validation_step, note = Small.validation_step, Small.note


def test_a_cnn_given_to_repq_vit_is_refused_and_ptq_takes_it():
    model = Convolutional()
    with refused(model, "RepQViT folds LayerNorms .* Convolutional has none .* use PostTrainingQuantization"):
        validate(model, repq())
    before, after = validate(model), validate(model, ptq())
    assert quantized(model) == ["net.0", "net.3"] and 0 < abs(before["loss"] - after["loss"]) < 0.05
