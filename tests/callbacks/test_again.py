"""The callback again: on another model, on a model that is half float, after it was removed."""

import pytest
import torch

from lightning_quant import load_quantized, save_quantized
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import left_as_it_was, scales
from tests.cases import ptq, quantized, repq
from tests.models import NoBias, Sequences, TinyTransformer, trainer, validate


def outputs(model):
    with torch.no_grad():
        return model.eval()(Sequences().val.tensors[0])


def fail(*args, **kwargs):
    raise ArithmeticError("a fault in the middle of a calibration")


def test_the_same_callback_twice_is_refused_by_the_trainer(method):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(method(), method())


@pytest.mark.filterwarnings("ignore:RepQViT.remove")
def test_two_models_with_one_callback(method):
    callback, first, second = method(), TinyTransformer(), NoBias()
    want = validate(first, callback), validate(second, callback)
    assert (validate(first, callback), validate(second, callback)) == want
    with left_as_it_was(second, but=["record"]):
        callback.remove(first)
    assert callback.is_calibrated(second) and not callback.is_calibrated(first)


def test_two_callbacks_of_which_one_finds_its_part_float_again(tmp_path):
    """Float weights that went into one part take nothing from the part of the other callback."""
    ours, others = ptq(target="blocks.0"), ptq(target="blocks.1", weights="int4")
    model = NoBias()
    validate(model, ours, others)
    found = {name: value for name, value in scales(model).items() if name.startswith("blocks.1")}
    model.blocks[0].load_state_dict(NoBias().blocks[0].state_dict())
    validate(model, ours)
    assert {name: value for name, value in scales(model).items() if name.startswith("blocks.1")} == found
    assert ours.is_calibrated(model) and others.is_calibrated(model)


def test_float_weights_into_one_block_of_a_folded_model(tmp_path):
    """The biases that folding created in the other block still carry a part of its function."""
    model, callback = NoBias(), repq()
    want = outputs(model)
    validate(model, callback)
    model.blocks[0].load_state_dict(NoBias().blocks[0].state_dict())
    run = trainer(callback)
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    assert validate(NoBias(), repq(), ckpt_path=tmp_path / "q.ckpt") == metrics
    with pytest.warns(UserWarning, match="stay folded"):
        callback.remove(model)
    assert torch.allclose(outputs(model), want, atol=1e-4)


@pytest.mark.parametrize("again", [ptq, repq])
def test_another_method_after_a_fold_was_removed(again, tmp_path):
    model = NoBias()
    want = outputs(model)
    validate(model, repq())
    with pytest.warns(UserWarning, match="stay folded"):
        repq().remove(model)
    run = trainer(again())
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    assert validate(NoBias(), again(), ckpt_path=tmp_path / "q.ckpt") == metrics
    fresh = NoBias()
    load_quantized(fresh, tmp_path / "folder")
    assert validate(fresh) == pytest.approx(metrics, abs=1e-6)
    model.load_state_dict(NoBias().state_dict())
    assert not quantized(model) and torch.equal(outputs(model), want) and model.blocks[0].fc1.bias is None


def test_a_failed_second_calibration_leaves_the_half_calibrated_model_as_it_was(method, monkeypatch):
    model = NoBias()
    validate(model, method())
    model.blocks[0].load_state_dict(NoBias().blocks[0].state_dict())
    with left_as_it_was(model, but=["record"]), monkeypatch.context() as patch:
        patch.setattr(Quantizer, "fit", fail)
        with pytest.raises(ArithmeticError):
            validate(model, method())
    assert not method().is_calibrated(model) and isinstance(model.head, QuantizedLayer)
    validate(model, method())
    assert method().is_calibrated(model)
