"""Layers that are shared, subclassed, parametrized, hooked or frozen: ours come and go, theirs stay as they were."""

import copy

import lightning as L
import pytest
import torch
from torch import nn

from lightning_quant import load_quantized, save_quantized
from lightning_quant.checkpoint import record_of
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import facts, left_as_it_was, refused, scales
from tests.cases import ptq, quantized, removed
from tests.models import CLASSES, WIDTH, Sequences, Small, TinyTransformer, trainer, validate


def plan_of(model):
    (plan,) = record_of(model).plans.values()
    return plan


# ---------------------------------------------------------------- copies


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
