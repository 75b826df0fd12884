"""What every quantization callback promises, whatever its method."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn

from lightning_quant import CalibrationMixin, PostTrainingQuantization, RepQViT, load_quantized, save_quantized
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import AttentionSite, QuantizedLayer
from tests.models import Sequences, TinyTransformer, trainer, validate

METHODS = {
    "ptq": lambda **kw: PostTrainingQuantization(weights="int8", activations="int8", **kw),
    "ptq w4": lambda **kw: PostTrainingQuantization(weights="int4_g8", activations=None, **kw),
    "ptq fp8": lambda **kw: PostTrainingQuantization(weights="fp8_e4m3", activations="fp8_e4m3", **kw),
    "ptq dynamic": lambda **kw: PostTrainingQuantization(weights="int8", activations="int8_token_dynamic", **kw),
    "repq": lambda **kw: RepQViT(weights="int4", activations="int4", **kw),
}


@pytest.fixture(params=METHODS, ids=lambda name: name.replace(" ", "_"))
def method(request):
    return METHODS[request.param]


def quantized_modules(model):
    return [name for name, m in model.named_modules() if isinstance(m, (QuantizedLayer, AttentionSite))]


def outputs(model, data=None):
    return torch.cat(trainer().predict(model, datamodule=data or Sequences()))


class NoBias(TinyTransformer):
    def __init__(self):
        super().__init__(bias=False)


def test_validate_reports_the_quantized_model(method):
    model = TinyTransformer()
    before, after = validate(model), validate(model, method())
    assert quantized_modules(model) and before["loss"] != after["loss"]
    assert abs(before["loss"] - after["loss"]) < 0.25


def test_calibrates_once(method):
    model, callback = TinyTransformer(), method()
    first = validate(model, callback)
    assert validate(model, callback) == first  # same callback, new Trainer
    assert validate(model, method()) == first  # a new callback with the same arguments finds the model calibrated
    assert validate(model) == first  # and no callback is needed any more


def test_one_trainer_validates_and_predicts(method):
    model, run = TinyTransformer(), trainer(method())
    run.validate(model, datamodule=Sequences(), verbose=False)
    want = model.eval()(Sequences().val.tensors[0])
    assert torch.allclose(torch.cat(run.predict(model, datamodule=Sequences())), want, atol=1e-5)


def test_remove_gives_the_float_model_back(method):
    model, callback = TinyTransformer(), method()
    want, before = outputs(model), {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    metrics, keys = validate(model), list(model.state_dict())
    types = [type(m) for m in model.modules()]
    validate(model, callback)
    folds = isinstance(callback, RepQViT)
    if folds:
        with pytest.warns(UserWarning, match="stay folded into 4 layers"):
            callback.remove(model)
        assert torch.allclose(outputs(model), want, atol=1e-4)
    else:
        callback.remove(model)
        assert torch.equal(outputs(model), want) and validate(model) == metrics
        assert all(torch.equal(p, value) for p, value in before.values())
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == keys
    assert all(p is before[name][0] for name, p in model.named_parameters())
    assert record_of(model) is None and not model._load_state_dict_pre_hooks and not model._state_dict_hooks
    with pytest.raises(ValueError, match="nothing to remove"):
        callback.remove(model)


def test_optimizer_built_before_trains_the_swapped_layers(method):
    model = TinyTransformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validate(model, method())
    x, y = Sequences().train.tensors
    loss = [torch.nn.functional.cross_entropy(model(x), y)]
    for _ in range(5):
        optimizer.zero_grad()
        loss[-1].backward()
        optimizer.step()
        loss.append(torch.nn.functional.cross_entropy(model(x), y))
    assert loss[-1] < loss[0]
    assert isinstance(model.blocks[0].qkv, QuantizedLayer) and model.blocks[0].qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("build", [TinyTransformer, NoBias])
def test_checkpoint_loads_in_three_ways_and_fails_with_one_error_otherwise(method, build, tmp_path):
    model, run = build(), trainer(method())
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    run.save_checkpoint(tmp_path / "weights_only.ckpt", weights_only=True)
    save_quantized(model, tmp_path / "folder")

    for file in ("q.ckpt", "weights_only.ckpt"):
        torch.load(tmp_path / file, weights_only=True)
        assert validate(build(), method(), ckpt_path=tmp_path / file) == want
        WithMixin = type("WithMixin", (CalibrationMixin, build), {})
        assert validate(WithMixin.load_from_checkpoint(tmp_path / file)) == want
    for path in ("folder", "q.ckpt"):
        fresh = build()
        load_quantized(fresh, tmp_path / path)
        assert validate(fresh) == want
        assert validate(fresh, method()) == want

    plain = build()
    for load in (
        lambda: build.load_from_checkpoint(tmp_path / "q.ckpt"),
        lambda: validate(plain, ckpt_path=tmp_path / "q.ckpt"),
        lambda: plain.load_state_dict(model.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=r"(?s)the callback that made it .*CalibrationMixin.*load_quantized"):
            load()


def test_float_checkpoint_loads_into_a_quantized_model(method, tmp_path):
    source = NoBias()
    run = trainer()
    float_metrics = run.validate(source, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "float.ckpt")
    model = NoBias()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    validate(model, method())
    model.load_state_dict(source.state_dict())
    assert not quantized_modules(model) and model.blocks[0].qkv.bias is None
    assert validate(model) == float_metrics
    quantized = validate(model, method())
    assert quantized == validate(
        NoBias(), method(), ckpt_path=tmp_path / "float.ckpt"
    )  # calibrated after the float weights came in


def test_float_weights_into_a_submodule_uncalibrate_and_unfold_it(method):
    class Outer(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = NoBias()

        forward = lambda self, x: self.net(x)  # noqa: E731
        validation_step = lambda self, batch, i: self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))  # noqa: E731

    model, plain = Outer(), NoBias()
    first = validate(model, method())
    model.net.load_state_dict(plain.state_dict())
    assert model.net.blocks[0].qkv.bias is None
    assert validate(model, method()) == first


def test_state_in_the_callback_is_its_arguments_only(method, tmp_path):
    model, run = TinyTransformer(), trainer(method())
    run.validate(model, datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "q.ckpt")
    (state,) = torch.load(tmp_path / "q.ckpt", weights_only=True)["callbacks"].values()
    assert state == method().arguments


def test_pickle_and_deepcopy_of_the_quantized_model(method):
    model = NoBias()
    want = validate(model, method())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert validate(twin) == want
        twin.load_state_dict(model.state_dict())
        twin.load_state_dict(NoBias().state_dict())
        assert not quantized_modules(twin) and quantized_modules(model)


def test_nothing_is_left_of_the_run(method):
    model = TinyTransformer()
    model.train()
    model.blocks[0].eval()
    flags = {name: m.training for name, m in model.named_modules()}
    torch.manual_seed(3)
    validate(model)
    want = torch.rand(1)
    torch.manual_seed(3)
    validate(model, method())
    assert torch.equal(torch.rand(1), want)
    assert {name: m.training for name, m in model.named_modules() if name in flags} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(not t.is_inference() for t in [*model.parameters(), *model.buffers()])


def test_fit_is_left_alone_and_sanity_checking_too(method):
    model = TinyTransformer()
    trainer(method(), max_epochs=1, num_sanity_val_steps=1).fit(model, datamodule=Sequences())
    assert not quantized_modules(model) and record_of(model) is None
    trainer(method(during_fit=True), max_epochs=1, num_sanity_val_steps=1).fit(model, datamodule=Sequences())
    assert quantized_modules(model)


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


def test_mixin_brings_its_callback_along(method):
    class Net(CalibrationMixin, TinyTransformer):
        def configure_quantization(self):
            return method()

    model, run = Net(), trainer()
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    assert quantized_modules(model)
    assert run.validate(model, datamodule=Sequences(), verbose=False)[0] == want
    run.predict(model, datamodule=Sequences())
