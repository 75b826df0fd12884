"""What goes wrong while calibrating: a right answer or one clear error each time, and the model is left as it was."""

import signal

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_quant import PostTrainingQuantization, RepQViT
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import left_as_it_was, refused, scales
from tests.cases import is_float, ptq, quantized, repq
from tests.models import TOKENS, WIDTH, NoBias, Sequences, TinyTransformer, trainer, validate

# ---------------------------------------------------------------- data


def spoilt(value, sample=13):
    data = Sequences()
    data.train.tensors[0][sample, 2, 5] = value
    return data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_batch_with_nan_or_infinity_is_refused_by_the_layer_that_met_it(method, value):
    model = TinyTransformer()
    with refused(model, "embed.*(NaN|infinit)"):
        validate(model, method(), data=spoilt(value))
    assert validate(model, method()) == validate(TinyTransformer(), method())  # and good data calibrate it as ever


def test_a_batch_with_nan_does_not_matter_where_no_activation_is_calibrated():
    for activations in (None, "int8_token_dynamic"):
        model, good = TinyTransformer(), TinyTransformer()
        validate(model, ptq(activations=activations), data=spoilt(float("nan")))
        validate(good, ptq(activations=activations))
        assert quantized(model) and scales(model) == scales(good)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (repq(), r"`blocks\.1\.fc2\.weight`: .* NaN"),
        (ptq(activations=None), r"`blocks\.1\.fc2\.weight`: .* NaN"),
        (ptq(), r"head\.input.* NaN .* the float model"),  # the first layer that reads what comes of it
    ],
    ids=["repq", "weights only", "ptq"],
)
def test_a_weight_with_nan_is_refused(callback, words):
    model = TinyTransformer()
    with torch.no_grad():
        model.blocks[1].fc2.weight[3, 4] = float("nan")
    with refused(model, words):
        validate(model, callback)


def used_up():
    batches = iter(DataLoader(Sequences().train))
    list(batches)
    return batches


EMPTY = {
    "dataset": lambda: DataLoader(TensorDataset(torch.empty(0, TOKENS, WIDTH), torch.empty(0))),
    "list": list,
    "used up": used_up,
    "function": lambda: lambda: [],
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_an_empty_loader_is_refused(method, empty):
    model = TinyTransformer()
    with refused(model, "no sample from .* empty.*calibration_loader"):
        validate(model, method(calibration_loader=empty()))


class NoTrainSet(Sequences):
    def train_dataloader(self):
        raise FileNotFoundError("the train set is on another machine")


def test_a_train_loader_that_fails_is_named_or_passed_over(method):
    model = TinyTransformer()
    with refused(model, "FileNotFoundError: the train set is on another machine"):
        validate(model, method(calibration_loader="train"), data=NoTrainSet())
    validate(model, method(), data=NoTrainSet())
    assert quantized(model)


class RaisesLate(IterableDataset):
    def __iter__(self):
        yield from zip(*Sequences().train.tensors, strict=True)
        raise OSError("the disk is gone")


def test_a_loader_that_fails_in_the_middle(method):
    model = TinyTransformer()
    with refused(model, "the disk is gone", OSError):
        validate(model, method(calibration_loader=DataLoader(RaisesLate(), batch_size=8), calibration_samples=999))


def test_a_loader_shorter_than_asked_warns_and_works(method):
    model, whole = TinyTransformer(), TinyTransformer()
    with pytest.warns(UserWarning, match="calibration_samples=999, but the train loader has only 64 samples"):
        metrics = validate(model, method(calibration_samples=999))
    assert validate(whole, method(calibration_samples=64)) == metrics and scales(whole) == scales(model)


@pytest.mark.parametrize("samples", [1, 7, 13])
def test_odd_numbers_of_samples(method, samples):
    model = TinyTransformer()
    validate(model, method(calibration_samples=samples))
    assert len(quantized(model)) == 10


@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples_are_refused_at_once(samples):
    with pytest.raises(ValueError, match=f"calibration_samples must be at least 1, found {samples}"):
        ptq(calibration_samples=samples)


# ---------------------------------------------------------------- Ctrl-C


@pytest.fixture(autouse=True)
def interrupt_handler_kept():
    """Lightning ignores further Ctrl-C after the first one, for good."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupt_at(monkeypatch, owner, name, call):
    """Let the ``call``-th call of a function, counted from 1, be one in which the user presses Ctrl-C."""
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    return calls


def interrupted_then_right(monkeypatch, build, method, owner, name, call, **data):
    """Ctrl-C at this call leaves the model as it was; the next run calibrates as if nothing had happened."""
    model, undisturbed = build(), build()
    with left_as_it_was(model), monkeypatch.context() as patch:
        calls = interrupt_at(patch, owner, name, call)
        with pytest.raises(SystemExit):  # Lightning's own answer to Ctrl-C
            validate(model, method(), data=Sequences(**data))
        assert len(calls) == call
    assert is_float(model)
    assert validate(model, method()) == validate(undisturbed, method())
    assert scales(model) == scales(undisturbed)


@pytest.mark.parametrize("call", [1, 2], ids=["tracing", "first batch"])
def test_interrupted_in_a_forward(method, call, monkeypatch):
    interrupted_then_right(monkeypatch, NoBias, method, TinyTransformer, "forward", call)


def test_interrupted_in_the_middle_of_the_batches(monkeypatch):
    interrupted_then_right(monkeypatch, TinyTransformer, ptq, TinyTransformer, "forward", 4)


@pytest.mark.parametrize("call", [1, 6, 15])
def test_interrupted_while_the_structure_is_built(method, call, monkeypatch):
    from lightning_quant.layers import base

    interrupted_then_right(monkeypatch, NoBias, method, base, "build_quantizer", call)


@pytest.mark.parametrize("call", [1, 3])
def test_interrupted_in_the_weight_search(method, call, monkeypatch):
    interrupted_then_right(monkeypatch, NoBias, method, Quantizer, "fit", call)


@pytest.mark.parametrize("build", [TinyTransformer, NoBias])
@pytest.mark.parametrize("function", ["fold_linear", "fold_norm"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_interrupted_in_the_middle_of_folding(build, function, call, monkeypatch):
    from lightning_quant.transforms import norm_fold

    interrupted_then_right(monkeypatch, build, repq, norm_fold, function, call)


def test_interrupted_after_folding_in_the_second_weight_search(monkeypatch):
    model = NoBias()
    with monkeypatch.context() as patch:
        fits = interrupt_at(patch, Quantizer, "fit", 0)
        validate(model, repq())
    for call in (len(fits) - 3, len(fits)):  # the four folded layers come last
        interrupted_then_right(monkeypatch, NoBias, repq, Quantizer, "fit", call)


def test_interrupted_while_scales_are_frozen(monkeypatch):
    interrupted_then_right(monkeypatch, TinyTransformer, ptq, Quantizer, "freeze", 5)


class Still(TinyTransformer):
    """Trained by an optimizer that moves nothing."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_interrupted_in_a_fit(monkeypatch):
    model, run = Still(), trainer(ptq(during_fit=True), max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0)
    with left_as_it_was(model, but=["gradients"]), monkeypatch.context() as patch:
        interrupt_at(patch, Quantizer, "fit", 3)
        with pytest.raises(SystemExit):
            run.fit(model, datamodule=Sequences())


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("text", ["int1", "int17", "fp8_e9", "uint0", "int", "", "four bits", "int8_gX", "log2_0"])
@pytest.mark.parametrize("argument", ["weights", "activations", "first_last", "embeddings"])
@pytest.mark.parametrize("callback", [PostTrainingQuantization, RepQViT])
def test_a_format_that_does_not_exist_is_refused_at_once(callback, argument, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text itself is looked at below
        callback(**{argument: text})
    assert f'"{text}"' in str(caught.value) or repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["int1", "log2_4", "fp8_e9"])
def test_a_format_in_overrides_is_refused_at_once_too(text):
    with pytest.raises(ValueError, match=text):
        ptq(overrides={"head": text})


@pytest.mark.parametrize("text", ["log2_4", "logsqrt2_8"])
def test_logarithmic_weights_and_inputs_are_refused_at_once(text):
    for callback in (PostTrainingQuantization, RepQViT):
        with pytest.raises(ValueError, match=f"weights='{text}': weights have a static uniform or float format"):
            callback(weights=text)
        with pytest.raises(ValueError, match=f"activations='{text}': .*(no negative numbers|RepQViT folds scales)"):
            callback(activations=text)


def test_nothing_to_quantize_is_refused_at_once():
    with pytest.raises(ValueError, match="weights and activations are both None"):
        PostTrainingQuantization(weights=None, activations=None)


def test_repq_vit_needs_activations_but_can_leave_weights_float():
    with pytest.raises(ValueError, match='"None" is not a number format'):
        RepQViT(activations=None)
    model = TinyTransformer()
    before, after = validate(model), validate(model, repq(weights=None))
    assert len(quantized(model)) == 10 and 0 < abs(before["loss"] - after["loss"]) < 0.05


def test_an_unknown_range_rule_is_refused_at_once():
    with pytest.raises(ValueError, match='"best" is not a range rule'):
        ptq(ranges="best")


def test_an_unknown_loader_word_is_refused():
    model = TinyTransformer()
    with refused(model, "calibration_loader='test' is none of"):
        validate(model, ptq(calibration_loader="test"))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"skip": ["heed"]}, r"skip: the pattern 'heed' matches no layer.*'head'"),
        ({"skip": ["head", "blocks.2.*"]}, r"skip: the pattern 'blocks\.2\.\*' matches no layer"),
        ({"overrides": {"heed": "int8"}}, r"overrides: the pattern 'heed' matches no layer.*'head'"),
        ({"skip": ["head"], "overrides": {"head": "int8"}}, "overrides: the pattern 'head' matches no layer"),
        ({"target": "blocks.2"}, r"target.*blocks\.2"),
        ({"target": "fc1"}, "target: there is no submodule named 'fc1'"),
        ({"target": "dropout"}, "nothing to quantize"),
        ({"target": "head", "skip": ["head"]}, "nothing to quantize"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_is_refused(method, argument, words):
    model = TinyTransformer()
    with refused(model, words):
        validate(model, method(**argument))


# ---------------------------------------------------------------- no calibration yet


def test_validate_without_a_batch_calibrates_nothing_and_predict_still_says_so(method):
    model, run = TinyTransformer(), trainer(method(), limit_val_batches=0)
    with left_as_it_was(model):
        run.validate(model, datamodule=Sequences(), verbose=False)
    with refused(model, "has not calibrated", RuntimeError):
        run.predict(model, datamodule=Sequences())
