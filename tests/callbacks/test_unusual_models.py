"""Models that are built in unusual ways: a right answer or one clear error, and what is not ours is left alone."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant import CalibrationMixin, load_quantized, save_quantized
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import Quantizer
from tests.callbacks.cases import every_method, is_float, ptq, quantized, repq
from tests.callbacks.unchanged import facts, left_as_it_was, refused, scales
from tests.models import CLASSES, WIDTH, Block, Sequences, TinyTransformer, trainer, validate


def removed(callback, model):
    """The callback takes everything back; where it folded, it says so."""
    if callback.__class__.__name__ == "RepQViT":
        with pytest.warns(UserWarning, match="stay folded"):
            callback.remove(model)
    else:
        callback.remove(model)
    assert is_float(model)


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


@every_method
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


@every_method
def test_layers_built_by_the_modules_own_setup(method, tmp_path):
    model, run = BuiltInSetup(), trainer(method())
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    assert validate(BuiltInSetup(), method(), ckpt_path=tmp_path / "q.ckpt") == want


@every_method
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


@every_method
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


@every_method
def test_a_layer_taken_away_after_calibration_is_named(method):
    model, callback = TinyTransformer(), method()
    validate(model, callback)
    del model.blocks[1]
    with refused(model, r"`blocks\.1\.\w+`.*remove\(model\)", but=["record"]):
        validate(model, callback)
    removed(callback, model)
    validate(model, callback)
    assert len(quantized(model)) == 6


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Small(L.LightningModule):
    """One block, for the compiler takes its time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(Block(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x):
        return self.net(x).mean(1)

    def validation_step(self, batch, batch_idx):
        self.note(F.cross_entropy(self(batch[0]), batch[1]))

    @torch.compiler.disable  # or the compiler goes through all of Lightning's logging
    def note(self, loss):
        self.log("loss", loss)


@pytest.mark.parametrize(("method", "backend"), [(ptq, "eager"), (repq, "aot_eager")])
def test_a_compiled_module_is_calibrated_like_an_eager_one(method, backend, compiler):
    eager, model = Small(), Small()
    want = validate(eager, method())
    before = validate(torch.compile(model, backend=backend))  # graphs of the float model are in the cache now
    after = validate(torch.compile(model, backend=backend), method())
    assert len(quantized(model)) == 5 and scales(model) == scales(eager)
    assert after["loss"] == pytest.approx(want["loss"], abs=1e-5) and after != before
    assert validate(model)["loss"] == pytest.approx(want["loss"], abs=1e-5)
    removed(method(), model)
    again = validate(torch.compile(model, backend=backend))
    assert again["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_a_module_compiled_after_calibration(compiler):
    model = Small()
    want = validate(model, repq())
    compiled = torch.compile(model, backend="aot_eager")
    assert validate(compiled)["loss"] == pytest.approx(want["loss"], abs=1e-5)
    assert validate(compiled, repq())["loss"] == pytest.approx(want["loss"], abs=1e-5)


def test_a_compiled_submodule(compiler, tmp_path):
    method = repq

    def build():
        model = Small()
        model.net = torch.compile(model.net, backend="eager")
        return model

    model, eager, arguments = build(), Small(), {"overrides": {"net.1": "int4"}, "skip": ["net.0.fc1"]}
    want = validate(eager, method(**arguments))
    run = trainer(method(**arguments))
    assert run.validate(model, datamodule=Sequences(), verbose=False)[0]["loss"] == pytest.approx(
        want["loss"], abs=1e-5
    )
    assert quantized(model) == [name.replace("net", "net._orig_mod", 1) for name in quantized(eager)]
    assert list(scales(model).values()) == list(scales(eager).values())
    run.save_checkpoint(tmp_path / "q.ckpt")
    again = validate(build(), method(**arguments), ckpt_path=tmp_path / "q.ckpt")
    assert again["loss"] == pytest.approx(want["loss"], abs=1e-5)


@every_method
def test_target_names_a_compiled_submodule_as_its_author_wrote_it(method, compiler):
    model = Small()
    model.net = torch.compile(model.net, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # the names are what matters here
        validate(model, method(target="net.0"))
    assert quantized(model) == [f"net._orig_mod.0.{name}" for name in ("qkv", "proj", "fc1", "fc2")]


def test_a_submodule_compiled_in_place(compiler):
    model, eager = Small(), Small()
    model.net.compile(backend="eager")
    assert validate(model, ptq())["loss"] == pytest.approx(validate(eager, ptq())["loss"], abs=1e-5)
    assert scales(model) == scales(eager)


class AttendsItself(L.LightningModule):
    """Attention is called in the LightningModule's own forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)).mean(1))

    validation_step, note = Small.validation_step, Small.note


def test_attention_in_the_forward_of_the_module_itself(compiler):
    model, eager = AttendsItself(), AttendsItself()
    want = validate(eager, ptq())
    assert len(eager.attention_quantizers) == 1
    with refused(
        model,
        "attention in `AttendsItself` cannot be quantized: .*compile after calibrating .*attention=False",
        but=["attributes"],
    ):
        validate(torch.compile(model, backend="eager"), ptq())
    validate(torch.compile(model, backend="eager"), ptq(attention=False))
    assert quantized(model) == ["qkv", "head"]
    assert validate(torch.compile(eager, backend="eager"), ptq())["loss"] == pytest.approx(want["loss"], abs=1e-5)


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


@every_method
def test_a_module_without_forward_says_what_to_define(method):
    model = StepOnly()
    with refused(model, "StepOnly defines no forward, no predict_step and no calibration_step", TypeError):
        validate(model, method())


@every_method
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


@every_method
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


@every_method
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


@every_method
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


# ---------------------------------------------------------------- copies


@every_method
def test_copies_before_and_after_calibration_are_independent(method):
    model = TinyTransformer()
    earlier, callback = copy.deepcopy(model), method()
    with left_as_it_was(earlier):
        want = validate(model, callback)
    later = copy.deepcopy(model)
    with left_as_it_was(model, but=["record"]):
        assert scales(later) == scales(model) and method().is_calibrated(later) and validate(later, method()) == want
        removed(method(), later)
        validate(later, method(weights="int4"))
    with left_as_it_was(later, but=["record"]):
        removed(callback, model)
    assert not {id(p) for p in later.parameters()} & {id(p) for p in model.parameters()}


# ---------------------------------------------------------------- shared layers and weights


class Tied(TinyTransformer):
    """One block used twice, the same layer under a second name, and two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.blocks[1] = self.blocks[0]
        self.alias = self.head
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return super().forward(self.second(self.norm(self.first(x))))


@every_method
def test_shared_layers_and_shared_weights(method, tmp_path):
    model, callback = Tied(), method()
    before, x = model.eval()(Sequences().val.tensors[0]), Sequences().val.tensors[0]
    metrics, parameters = validate(model), facts(model)["parameters"]
    run = trainer(callback)
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    assert 0 < abs(want["loss"] - metrics["loss"]) < 0.1
    assert (
        model.alias is model.head and model.blocks[1] is model.blocks[0] and model.second.weight is model.first.weight
    )
    run.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    assert validate(Tied(), method(), ckpt_path=tmp_path / "q.ckpt") == want
    fresh = Tied()
    load_quantized(fresh, tmp_path / "folder")
    assert validate(fresh) == want and fresh.second.weight is fresh.first.weight
    removed(callback, model)
    assert torch.allclose(model.eval()(x), before, atol=1e-4) and facts(model)["parameters"] == parameters


def test_both_calls_of_a_shared_layer_are_observed():
    class Twice(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.head(self.layer(x) + self.layer(100 * x)).mean(1)

        validation_step, note = Small.validation_step, Small.note

    model = Twice()
    validate(model, ptq())
    largest = Sequences().train.tensors[0][:32].abs().max()
    assert 100 * largest < model.layer.input_quantizer.scale * 255 < 200 * largest


# ---------------------------------------------------------------- classes of the user's own


class Scaled(nn.Linear):
    def forward(self, input):
        return 0.5 * super().forward(input)


@every_method
def test_a_subclass_of_linear_stays_float_and_is_named(method):
    model = TinyTransformer()
    model.head = Scaled(WIDTH, CLASSES)
    with left_as_it_was(model.head):
        validate(model, method())
    assert len(quantized(model)) == 9
    assert plan_of(model).skipped == {"head": "its class Scaled has a forward that is not known here"}


PARAMETRIZED = {
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: nn.utils.parametrizations.orthogonal(layer),
}


@every_method
@pytest.mark.parametrize("parametrize", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_a_parametrized_layer_is_refused_by_name_and_can_be_skipped(method, parametrize):
    model = TinyTransformer()
    parametrize(model.blocks[1].proj)
    with refused(
        model, r"`blocks\.1\.proj` cannot be quantized: its weight is parametrized; .*skip=\['blocks\.1\.proj'\]"
    ):
        validate(model, method())
    with left_as_it_was(model.blocks[1].proj):
        validate(model, method(skip=["blocks.1.proj"]))
    assert len(quantized(model)) == 9


@every_method
def test_a_forward_on_the_instance_is_refused_by_name_and_can_be_skipped(method):
    model = TinyTransformer()
    model.head.forward = lambda x, forward=model.head.forward: 2 * forward(x)
    with refused(model, r"`head` cannot be quantized: it has a forward of its own on the instance; .*skip=\['head'\]"):
        validate(model, method())
    validate(model, method(skip=["head"]))
    assert len(quantized(model)) == 9


def test_hooks_of_the_user_stay_and_run():
    model, calls = TinyTransformer(), []
    model.head.register_forward_hook(lambda *_: calls.append("after"))
    model.head.register_forward_pre_hook(lambda *_: calls.append("before"))
    with left_as_it_was(model):
        callback = ptq()
        validate(model, callback)
        calls.clear()
        model(Sequences().val.tensors[0])
        assert calls == ["before", "after"]
        callback.remove(model)


# ---------------------------------------------------------------- flags


@every_method
@pytest.mark.parametrize("training", [True, False, None], ids=["train", "eval", "mixed"])
def test_training_flags_and_frozen_parameters_stay(method, training):
    model, callback = TinyTransformer(), method()
    model.train(training is not False)
    if training is None:
        model.blocks[0].eval()
        model.head.train(False)
    model.blocks.requires_grad_(False)
    flags, frozen = facts(model)["training"], facts(model)["requires_grad"]
    validate(model, callback)
    after = facts(model)
    assert {name: after["training"][name] for name in flags} == flags
    assert {name: after["requires_grad"][name] for name in frozen} == frozen
    for name, module in model.named_modules():  # what was added goes with what it was added to
        if isinstance(module, Quantizer):
            assert module.training == model.get_submodule(name.rpartition(".")[0]).training, name
    removed(callback, model)
    assert facts(model)["training"] == flags and facts(model)["requires_grad"] == frozen


def test_a_fit_after_calibration_does_not_warn_of_modules_in_eval_mode(recwarn):
    model = TinyTransformer()
    validate(model, ptq())
    trainer(ptq(), max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0).fit(model, datamodule=Sequences())
    assert not [warning for warning in recwarn if "in eval mode" in str(warning.message)]
