"""Quantization-aware training: formats and models of all kinds, and what is refused."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant import (
    PostTrainingQuantization,
)
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer
from tests.callbacks.fits import (
    Look,
    Net,
    fit,
    killed_and_resumed,
    qat,
    quantizers,
    weights_of,
)
from tests.callbacks.unchanged import refused
from tests.models import Sequences, TinyTransformer, trainer, validate

# ---------------------------------------------------------------- formats and models


@pytest.mark.parametrize(
    ("weights", "activations", "learned"),
    [
        ("int4_g8", None, 10),
        ("int4", "int8_token_dynamic", 10),
        ("int4", "int8_channel", 20),
        ("fp8_e4m3", "fp8_e4m3", 0),
        (None, "uint4", 28 - 10),
    ],
)
def test_formats(weights, activations, learned, tmp_path):
    model = Net()
    count = Look(on_train_start=lambda m: sum(isinstance(q, LearnedQuantizer) for q in quantizers(m).values()))
    attention = activations is not None and "channel" not in activations
    arguments = {"first_last": None, "attention": attention}
    running = fit(model, qat(weights, activations, **arguments), count, epochs=2)
    assert count.seen["on_train_start"] == [learned]
    running.save_checkpoint(tmp_path / "q.ckpt")
    assert validate(Net(), qat(weights, activations, **arguments), ckpt_path=tmp_path / "q.ckpt") == validate(model)


def test_offsets_of_activations_are_learned_and_those_of_weights_are_not():
    before, after = (
        Look(**{hook: lambda m: copy.deepcopy(m.state_dict())}) for hook in ("on_train_start", "on_train_end")
    )
    model = Net(lr=0.1)
    fit(model, qat("int4_asym", learn_offsets=True), before, after)
    (start,), (end,) = before.seen["on_train_start"], after.seen["on_train_end"]
    moved = {name for name, value in end.items() if name.endswith("zero_point") and not torch.equal(value, start[name])}
    assert moved and not any("weight_quantizer" in name for name in moved)
    model.head.weight_quantizer.encode(model.head.weight.detach())


class Encoder(L.LightningModule):
    """torch's own encoder, whose fast path must stay off, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 1)
        self.idle = nn.Linear(3, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))

    training_step = TinyTransformer.training_step
    validation_step = lambda self, batch, i: self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))  # noqa: E731
    configure_optimizers = lambda self: torch.optim.SGD(self.parameters(), 0.05)  # noqa: E731


def test_a_layer_that_does_not_run_stays_float():
    model = Encoder()
    fit(model, qat(), epochs=1)
    assert type(model.idle) is nn.Linear and isinstance(model.encoder.layers[0].linear1, QuantizedLayer)
    assert model.encoder.layers[0].self_attn.attention_quantizers.query_quantizer.calibrated


def test_a_model_that_is_built_late():
    class Late(Net):
        def __init__(self):
            super().__init__()
            del self.head

        def configure_model(self):
            if not hasattr(self, "head"):
                self.head = nn.Linear(16, 3)

    model = Late()
    fit(model, qat(), epochs=1)
    assert isinstance(model.head, QuantizedLayer)


def test_two_callbacks_for_two_parts(tmp_path):
    def callbacks():
        return [qat("int8", "int8", target="blocks.0"), qat("int4", "int8", target="blocks.1")]

    undisturbed, resumed = killed_and_resumed(Net, callbacks, tmp_path)
    assert weights_of(resumed) == weights_of(undisturbed)
    assert type(resumed.head) is nn.Linear and resumed.blocks[0].fc1.weight_quantizer.scheme.bits == 8
    callbacks()[0].remove(resumed)
    assert type(resumed.blocks[0].fc1) is nn.Linear and isinstance(resumed.blocks[1].fc1, QuantizedLayer)


# ---------------------------------------------------------------- refusals


def test_a_model_that_another_method_has_quantized_is_refused(tmp_path):
    model, other = Net(), PostTrainingQuantization("int8", "int8")
    running = trainer(other)
    running.validate(model, datamodule=Sequences(), verbose=False)
    with refused(model, "quantized already: call remove"):
        fit(model, qat())
    running.save_checkpoint(tmp_path / "ptq.ckpt")
    with pytest.raises(ValueError, match=r"quantized by PostTrainingQuantization.*float checkpoint"):
        fit(Net(), qat(), ckpt_path=tmp_path / "ptq.ckpt")
    other.remove(model)
    fit(model, qat(), epochs=1)
    assert quantizers(model)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ({"delay_epochs": 2}, {}, "none of max_epochs=2"),
        ({"freeze_batchnorm_epochs": 1}, {"epochs": -1, "max_steps": 2}, "set max_epochs"),
        ({"skip": ["nothing"]}, {}, "matches no layer"),
        ({"calibration_loader": "test"}, {}, "none of"),
    ],
    ids=str,
)
def test_refused_before_anything_is_changed(arguments, options, words):
    model = Net()
    with refused(model, words):
        fit(model, qat(**arguments), **options)


def test_arguments_that_contradict_each_other_are_refused():
    for arguments, words in [
        ({"learn_scales": False, "learn_offsets": True}, "needs learn_scales"),
        ({"delay_epochs": -1}, "numbers of epochs"),
        ({"delay_epochs": 1, "activations": "int8_token"}, "would not wait"),
    ]:
        with pytest.raises(ValueError, match=words):
            qat(**arguments)


def test_layers_that_setup_builds_come_too_late():
    class TooLate(Net):
        def __init__(self):
            super().__init__()
            del self.head

        def setup(self, stage):
            self.head = nn.Linear(16, 3)

    with pytest.raises(AttributeError, match="head") as caught:
        fit(TooLate(), qat())
    assert "build layers in" in caught.value.__notes__[0]


class AttendsTwice(nn.Module):
    """A second time only when there are few samples, as there are when the structure is built."""

    def forward(self, x):
        x = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(x, x, x) if len(x) <= 2 else x


class Hesitant(Net):
    def __init__(self):
        super().__init__()
        self.again = AttendsTwice()

    def forward(self, x):
        return super().forward(self.again(x))


def test_a_quantizer_that_calibration_does_not_reach_is_refused_before_training():
    model, look = Hesitant(), Look(on_train_batch_start=lambda m: None)
    with refused(model, r"`again\.attention_quantizers\.1\.query_quantizer` saw no calibration data.*skip="):
        fit(model, qat(), look)
    assert not look.seen["on_train_batch_start"]
    fit(model, qat(skip=["again"]), epochs=1)
    assert quantizers(model)
