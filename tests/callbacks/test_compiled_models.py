"""torch.compile before and after calibration, of the whole model and of a part."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.callbacks.unchanged import refused, scales
from tests.cases import ptq, quantized, removed, repq
from tests.models import CLASSES, WIDTH, Sequences, Small, trainer, validate


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("method", "backend"), [(ptq, "eager"), (repq, "aot_eager")], ids=["ptq", "repq"])
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
