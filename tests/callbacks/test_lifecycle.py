"""What every method promises of a run: what it reports, what it refuses, what it leaves behind."""

import pytest
import torch
from torch import nn

from lightning_quant import CalibrationMixin, PostTrainingQuantization
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import left_as_it_was, refused
from tests.cases import (
    TRAINING,
    VALIDATING,
    is_float,
    metrics,
    predictions,
    quantized,
    removed,
)
from tests.models import Sequences, TinyTransformer, trainer, validate


def outputs(model):
    with torch.no_grad():
        return model.eval()(Sequences().val.tensors[0])


def test_the_trainer_reports_the_quantized_model(case):
    model = case.model()
    after = metrics(case.run(model))
    with as_float(model):
        exact = validate(model)
    assert quantized(model) and 0 < abs(exact["loss"] - after["loss"]) < 0.25


def test_set_up_twice_is_set_up_once(case):
    model, callback = case.model(), case()
    first = metrics(case.run(model, callback))
    assert validate(model, callback) == first  # same callback, new Trainer
    assert validate(model, case()) == first  # a new callback with the same arguments finds the model calibrated
    assert validate(model) == first  # and no callback is needed any more


def test_prediction_is_of_the_model_that_was_validated(case):
    model, callback = case.model(), case()
    running = case.run(model, callback)
    x = Sequences().val.tensors[0]
    with torch.no_grad():
        want = torch.cat([model.eval()(batch) for batch in x.split(8)])
    assert torch.allclose(torch.cat(running.predict(model, datamodule=Sequences())), want, atol=1e-5)
    assert torch.allclose(predictions(case, model), want, atol=1e-5)


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_a_model_that_is_not_calibrated_is_refused(case, verb):
    model = case.model()
    words = rf"has not calibrated .* trainer\.validate\(model, \.\.\.\) before trainer\.{verb}"
    with refused(model, words, RuntimeError):
        getattr(trainer(case()), verb)(model, datamodule=Sequences())
    assert is_float(model)


def test_remove_gives_the_float_model_back(case):
    model, callback = case.model(), case()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    types = [type(module) for module in model.modules()]
    case.quantized(model, callback)
    with as_float(model):
        want = outputs(model)
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    folded = removed(callback, model)
    assert [type(module) for module in model.modules()] == types
    assert folded or list(model.state_dict()) == keys
    now = dict(model.named_parameters())
    assert all(
        now[name] is parameter and torch.equal(parameter, weights[name]) for name, parameter in parameters.items()
    )
    assert torch.equal(outputs(model), want)
    assert record_of(model) is None and not model._load_state_dict_pre_hooks and not model._state_dict_hooks
    with pytest.raises(ValueError, match="nothing to remove"):
        callback.remove(model)


@pytest.mark.parametrize("case", VALIDATING.values(), ids=VALIDATING)
def test_what_validating_quantized_computes_as_before_once_it_is_removed(case):
    model, callback = case.model(), case()
    want, before = outputs(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    case.quantized(model, callback)
    folded = removed(callback, model)
    assert torch.allclose(outputs(model), want, atol=1e-4 if folded else 0.0)
    assert folded or all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_optimizer_built_before_trains_the_swapped_layers(case):
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    case.quantized(model).eval()
    model.zero_grad()
    if (
        case.learns or case.solves
    ) and case.stage == "validate":  # the codes are solved, and float weights no longer have a say
        with pytest.raises(RuntimeError, match="training the float weight would change nothing"):
            model.train().training_step(Sequences().train.tensors, 0)
        return
    loss = [model.training_step(Sequences().train.tensors, 0)]
    for _ in range(5):
        optimizer.zero_grad()
        loss[-1].backward()
        optimizer.step()
        loss.append(model.training_step(Sequences().train.tensors, 0))
    assert loss[-1] < loss[0]
    assert all(model.get_submodule(name).weight.grad.abs().sum() > 0 for name in quantized(model))


def test_nothing_is_left_of_the_run(case):
    model = case.model()
    model.train()
    model.blocks[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    case.quantized(model)
    assert {name: module.training for name, module in model.named_modules() if name in flags} == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(not tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    assert not any(quantizer.observer for quantizer in model.modules() if isinstance(quantizer, Quantizer))


@pytest.mark.parametrize("case", VALIDATING.values(), ids=VALIDATING)
def test_random_numbers_go_on_as_if_nothing_had_been_calibrated(case):
    def after(*callbacks):
        torch.manual_seed(3)
        validate(case.model(), *callbacks)
        return torch.rand(1)

    assert torch.equal(after(case()), after())


@pytest.mark.parametrize("case", VALIDATING.values(), ids=VALIDATING)
def test_fit_is_left_alone_and_sanity_checking_too(case):
    model, plain, options = case.model(), case.model(), {"max_epochs": 1, "num_sanity_val_steps": 1}
    for module, callbacks in ((model, [case()]), (plain, [])):
        torch.manual_seed(0)
        trainer(*callbacks, **options).fit(module, datamodule=Sequences())
    assert is_float(model) and record_of(model) is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    trainer(case(during_fit=True), **options).fit(model, datamodule=Sequences())
    assert quantized(model)


def test_finite_in_bfloat16(case):
    model = case.model()
    running = case.run(model, precision="bf16-true")
    found = metrics(running)
    assert all(torch.tensor(value).isfinite() for value in found.values())
    assert abs(found["loss"] - metrics(case.run(case.model()))["loss"]) < 0.1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    state = [getattr(quantizer, name) for quantizer in quantizers for name in quantizer.state_names]
    assert {tensor.dtype for tensor in state} <= {torch.float32} and all(tensor.isfinite().all() for tensor in state)


def test_the_mixin_brings_its_callback_along(case):
    class Net(CalibrationMixin, case.model):
        def configure_quantization(self):
            return case()

    model, running = Net(), trainer(max_epochs=1, num_sanity_val_steps=0)
    case.quantize(running, model)
    want = metrics(running)
    assert quantized(model) and want == metrics(case.run(case.model()))
    assert running.validate(model, datamodule=Sequences(), verbose=False)[0] == want
    running.predict(model, datamodule=Sequences())


@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING)
def test_a_fit_without_a_step_changes_no_weight(case):
    model, callback = case.model(), case()
    with left_as_it_was(model):
        case.run(model, callback, limit_train_batches=0)
        assert quantized(model)
        removed(callback, model)


def test_two_callbacks_for_two_parts(tmp_path):
    callbacks = lambda: [  # noqa: E731
        PostTrainingQuantization("int8", "int8", target="blocks.0"),
        PostTrainingQuantization("int4", "int8", target="blocks.1"),
    ]
    model, run = TinyTransformer(), trainer(*callbacks())
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    assert type(model.head) is nn.Linear and model.blocks[1].fc1.weight_quantizer.scheme.bits == 4
    run.save_checkpoint(tmp_path / "q.ckpt")
    assert validate(TinyTransformer(), *callbacks(), ckpt_path=tmp_path / "q.ckpt") == want
    callbacks()[0].remove(model)
    assert type(model.blocks[0].fc1) is nn.Linear and isinstance(model.blocks[1].fc1, QuantizedLayer)
