"""A LightningModule that loads its quantized checkpoints by itself, and brings its callbacks along."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_quant import CalibrationMixin, PostTrainingQuantization, load_quantized, save_quantized
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer
from tests.cases import repq
from tests.models import Sequences, TinyTransformer, trainer, validate


class Net(CalibrationMixin, TinyTransformer):
    """A user's module with the mixin and nothing else."""


class WithArguments(CalibrationMixin, TinyTransformer):
    def __init__(self, bias: bool = True, dropout: float = 0.5):
        super().__init__(bias, dropout)
        self.save_hyperparameters()


class BringsItsOwn(CalibrationMixin, TinyTransformer):
    """A module that says itself how it is quantized."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def configure_quantization(self):
        self.asked += 1
        return PostTrainingQuantization("int8", "int8")


def quantized(model):
    return any(isinstance(m, QuantizedLayer) for m in model.modules())


def checkpoint_of(model, callback, path):
    """The metrics of the quantized model, and its checkpoint."""
    run = trainer(callback)
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(path)
    return metrics


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("bias", [True, False])
def test_load_from_checkpoint(method, bias, tmp_path):
    want = checkpoint_of(WithArguments(bias=bias), method(), tmp_path / "q.ckpt")
    model = WithArguments.load_from_checkpoint(tmp_path / "q.ckpt")
    assert quantized(model) and model.hparams.bias is bias
    assert validate(model) == want
    assert validate(model, method()) == want  # and the callback finds it calibrated


def test_a_checkpoint_of_the_module_without_the_mixin_loads_too(method, tmp_path):
    want = checkpoint_of(TinyTransformer(), method(), tmp_path / "q.ckpt")
    assert validate(Net.load_from_checkpoint(tmp_path / "q.ckpt")) == want


def test_the_loaded_model_can_be_saved_again_in_every_way(method, tmp_path):
    want = checkpoint_of(Net(), method(), tmp_path / "q.ckpt")
    model = Net.load_from_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    run = trainer()
    run.validate(model, datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "again.ckpt")
    fresh = TinyTransformer()
    load_quantized(fresh, tmp_path / "folder")
    assert validate(fresh) == want
    assert validate(Net.load_from_checkpoint(tmp_path / "again.ckpt")) == want


def test_ckpt_path_without_a_callback(method, tmp_path):
    want = checkpoint_of(Net(), method(), tmp_path / "q.ckpt")
    model = Net()
    assert validate(model, ckpt_path=tmp_path / "q.ckpt") == want
    (found,) = trainer().test(Net(), datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt", verbose=False)
    assert found["test_loss"] == pytest.approx(want["loss"], abs=1e-6)
    logits = trainer().predict(Net(), datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt")
    assert torch.equal(torch.cat(logits), torch.cat(trainer().predict(model, datamodule=Sequences())))


def test_float_checkpoints_load_as_ever(method, tmp_path):
    model, run = Net(), trainer()
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "float.ckpt")
    fresh = Net.load_from_checkpoint(tmp_path / "float.ckpt")
    assert not quantized(fresh) and record_of(fresh) is None and validate(fresh) == want
    validate(model, method())
    model.load_state_dict(fresh.state_dict())  # and into a quantized model: it becomes float again
    assert not quantized(model) and record_of(model) is None and validate(model) == want


def test_load_state_dict_answers_as_torch_does(method):
    source = Net()
    validate(source, method())
    model = Net()
    result = model.load_state_dict(source.state_dict())
    assert result.missing_keys == [] and result.unexpected_keys == []
    state = {key: value for key, value in source.state_dict().items() if key != "blocks.0.norm1.bias"}
    result = Net().load_state_dict(state | {"extra": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["blocks.0.norm1.bias"] and result.unexpected_keys == ["extra"]
    with pytest.raises(RuntimeError, match="Missing key"):
        Net().load_state_dict(state)
    taken = Net()
    state = {key: value.clone() for key, value in source.state_dict().items()}
    taken.load_state_dict(state, assign=True)
    assert taken.head.weight.data_ptr() == state["head.weight"].data_ptr()


def test_a_refused_state_dict_leaves_no_trace(method):
    source = Net()
    validate(source, method())
    state = {key: value for key, value in source.state_dict().items() if "head" not in key}
    model = Net()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="truncated"):
        model.load_state_dict(state)
    assert [type(m) for m in model.modules()] == types and record_of(model) is None
    assert not model._load_state_dict_pre_hooks and not model._state_dict_hooks


def test_training_goes_on_from_a_quantized_checkpoint(method, tmp_path):
    checkpoint_of(Net(), method(), tmp_path / "q.ckpt")
    model = Net.load_from_checkpoint(tmp_path / "q.ckpt")
    before = model.blocks[0].fc1.weight.detach().clone()
    trainer(max_epochs=1).fit(model, datamodule=Sequences())
    assert quantized(model) and not torch.equal(model.blocks[0].fc1.weight, before)


# ---------------------------------------------------------------- callbacks that the module brings


def test_no_callbacks_by_default():
    assert Net().configure_callbacks() == []
    validate(Net())


def test_the_same_callback_is_given_to_every_trainer():
    model = BringsItsOwn()
    want = validate(model)
    (callback,) = model.configure_callbacks()
    assert quantized(model) and callback.is_calibrated(model)
    assert validate(model) == want and validate(model) == want
    assert model.configure_callbacks() == [callback] and model.asked == 1
    logits = torch.cat(trainer().predict(model, datamodule=Sequences()))
    assert torch.allclose(logits, model.eval()(Sequences().val.tensors[0]), atol=1e-5)


def test_a_calibrated_model_is_needed_to_predict():
    with pytest.raises(RuntimeError, match=r"PostTrainingQuantization has not calibrated this BringsItsOwn"):
        trainer().predict(BringsItsOwn(), datamodule=Sequences())


def test_the_modules_own_callback_replaces_one_of_its_class_in_the_trainer():
    """Lightning's rule for configure_callbacks."""
    model = BringsItsOwn()
    run = trainer(PostTrainingQuantization("int4", "int4"))
    run.validate(model, datamodule=Sequences(), verbose=False)
    assert model.head.weight_quantizer.scheme.bits == 8
    assert [c for c in run.callbacks if isinstance(c, PostTrainingQuantization)] == model.configure_callbacks()


def test_several_callbacks_and_those_of_other_bases():
    class Other(L.Callback):
        pass

    class Base(TinyTransformer):
        def configure_callbacks(self):
            return Other()

    class Both(CalibrationMixin, Base):
        def configure_quantization(self):
            return [
                PostTrainingQuantization("int8", "int8", target="blocks.0"),
                PostTrainingQuantization("int4", "int8", target="blocks.1"),
            ]

    model = Both()
    assert [type(c) for c in model.configure_callbacks()] == [Other, *[PostTrainingQuantization] * 2]
    validate(model)
    assert model.blocks[0].fc1.weight_quantizer.scheme.bits == 8
    assert model.blocks[1].fc1.weight_quantizer.scheme.bits == 4
    assert type(model.head) is nn.Linear


def test_a_module_with_its_callback_comes_back_from_its_checkpoint(tmp_path):
    model, run = BringsItsOwn(), trainer()
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    fresh = BringsItsOwn.load_from_checkpoint(tmp_path / "q.ckpt")
    assert validate(fresh) == want
    logits = torch.cat(trainer().predict(fresh, datamodule=Sequences()))  # calibrated, so nothing refuses
    assert torch.equal(logits, torch.cat(trainer().predict(model, datamodule=Sequences())))


def test_deepcopy_and_pickle():
    import copy
    import pickle

    model = Net()
    want = validate(model, repq())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert validate(twin) == want
        twin.load_state_dict(Net().state_dict())
        assert not quantized(twin) and quantized(model)
