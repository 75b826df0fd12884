"""The entry that makes a state dict self-contained, and what happens when it meets another model or another plan."""

import copy
import io
import json

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant import CalibrationMixin
from lightning_quant.checkpoint import attach_record, detach_record, read_plans, record_of
from lightning_quant.layers import AttentionSite, QuantizedLayer
from tests.cases import ptq, repq
from tests.models import Sequences, TinyTransformer, trainer, validate


class WithMixin(CalibrationMixin, TinyTransformer):
    pass


class Student(L.LightningModule):
    """A LightningModule inside another one."""

    def __init__(self, **kwargs):
        super().__init__()
        self.classifier = TinyTransformer(**kwargs)

    def forward(self, x):
        return self.classifier(x)

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))


def quantized(method, model=None, **kwargs):
    model = model or TinyTransformer()
    validate(model, method(**kwargs))
    return model.eval()


def entry_of(state):
    (key,) = [key for key in state if "lightning_quant: " in key]
    return key


def structure(model):
    return [(name, type(m)) for name, m in model.named_modules()]


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(state, other):
    return list(state) == list(other) and all(torch.equal(state[key], other[key]) for key in state)


x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------- the entry


def test_entry_is_a_byte_tensor_whose_name_tells_a_stranger_what_to_do(method):
    model = quantized(method)
    state = model.state_dict()
    key = entry_of(state)
    for word in ("callback", type(method()).__name__, "CalibrationMixin", "load_quantized"):
        assert word in key
    assert "." not in key  # torch would take the part before it for a submodule
    assert state[key].dtype == torch.uint8
    (plan,) = json.loads(bytes(state[key].tolist()))["plans"].values()
    assert plan["method"] == type(method()).__name__ and plan["arguments"] == method().arguments
    assert set(plan["layers"]) == {name for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    assert read_plans(state) == record_of(model).plans


def test_a_float_model_has_no_entry():
    model = TinyTransformer()
    assert not any("lightning_quant" in key for key in model.state_dict()) and read_plans(model.state_dict()) == {}
    attach_record(model)  # while a Trainer with our callback runs, before it calibrates
    assert not any("lightning_quant" in key for key in model.state_dict())
    detach_record(model)
    assert record_of(model) is None and not model._state_dict_hooks and not model._load_state_dict_pre_hooks


def test_every_quantizer_is_in_the_state_dict(method):
    model = quantized(method)
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            assert state[f"{name}.folded"].dtype == torch.bool
            assert state[f"{name}.weight_quantizer.scale"].numel() == len(layer.weight)
    assert bool(state["blocks.0.qkv.folded"]) == (method is not ptq) and not state["head.folded"]


def test_the_state_dict_given_is_not_changed_by_loading_it(method):
    state = quantized(method).state_dict()
    before = dict(state)
    WithMixin().load_state_dict(state)
    assert list(state) == list(before) and all(state[key] is before[key] for key in before)


# ---------------------------------------------------------------- saving and loading without Lightning


def test_torch_save_and_load_of_the_state_dict(method):
    model, file = quantized(method), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = WithMixin().eval()
    fresh.load_state_dict(state)
    assert (
        torch.equal(fresh(x), model(x)) and [t for _, t in structure(fresh)][1:] == [t for _, t in structure(model)][1:]
    )


def test_a_quantized_model_takes_its_own_state_dict_back(method):
    model = quantized(method)
    want, state, parameters = model(x), values(model), dict(model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert not torch.equal(model(x), want)
    model.load_state_dict(state)
    assert torch.equal(model(x), want) and same(model.state_dict(), state)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_loading_twice_is_loading_once(method):
    state = quantized(method).state_dict()
    model = WithMixin().eval()
    model.load_state_dict(state)
    once, want = values(model), model(x)
    model.load_state_dict(state)
    assert same(model.state_dict(), once) and torch.equal(model(x), want)


def test_assign_takes_the_stored_tensors_over(method):
    model = quantized(method)
    fresh = WithMixin().eval()
    state = copy.deepcopy(model.state_dict())
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh(x), model(x))
    assert fresh.head.weight.data_ptr() == state["head.weight"].data_ptr()


def test_a_float_state_dict_makes_a_quantized_model_float(method):
    plain = TinyTransformer(bias=False).eval()
    want, layout = plain(x), structure(plain)
    model = TinyTransformer(bias=False)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    quantized(method, model)
    if method is repq:
        assert model.blocks[1].fc1.bias is not None and bool(model.blocks[1].fc1.folded)
    model.load_state_dict(plain.state_dict())
    assert structure(model) == layout and torch.equal(model(x), want)
    assert model.blocks[1].fc1.bias is None
    assert not any("lightning_quant" in key for key in model.state_dict())
    validate(model, method())  # and it can be quantized again, from these weights
    assert torch.equal(model.eval()(x), quantized(method, TinyTransformer(bias=False))(x))


def test_another_quantization_replaces_the_one_that_is_there(method):
    other = {"ptq": repq, "repq": ptq}["ptq" if method is ptq else "repq"]
    source, model = quantized(other, TinyTransformer(bias=False)), quantized(method, TinyTransformer(bias=False))
    model.load_state_dict(source.state_dict())
    assert structure(model) == structure(source) and torch.equal(model(x), source(x))
    assert record_of(model).plans == record_of(source).plans
    assert (model.blocks[0].qkv.bias is None) == (source.blocks[0].qkv.bias is None)


# ---------------------------------------------------------------- as a child of another module


def test_child_of_another_module_is_saved_with_its_prefix(method):
    child = quantized(method)
    outer = nn.ModuleDict({"student": child, "teacher": TinyTransformer()})
    state = outer.state_dict()
    assert entry_of(state).startswith("student.lightning_quant: ")

    fresh = nn.ModuleDict({"student": WithMixin(), "teacher": TinyTransformer()})
    attach_record(fresh["student"])
    fresh.load_state_dict(state)
    assert torch.equal(fresh["student"].eval()(x), child(x))
    assert not any(isinstance(m, QuantizedLayer) for m in fresh["teacher"].modules())


def test_two_children_with_plans_of_their_own():
    first, second = quantized(ptq), quantized(repq)
    state = nn.ModuleDict({"a": first, "b": second}).state_dict()
    fresh = nn.ModuleDict({"a": TinyTransformer(), "b": TinyTransformer()})
    for child in fresh.values():
        attach_record(child)
    fresh.load_state_dict(state)
    assert torch.equal(fresh["a"].eval()(x), first(x)) and torch.equal(fresh["b"].eval()(x), second(x))


def test_float_state_of_the_parent_makes_the_child_float(method):
    child = quantized(method)
    outer, plain = nn.ModuleDict({"student": child}), TinyTransformer()
    outer.load_state_dict({f"student.{key}": value for key, value in plain.state_dict().items()})
    assert structure(child) == structure(plain) and torch.equal(child(x), plain.eval()(x))


def test_child_of_a_lightning_module(method, tmp_path):
    """The plan belongs to the module that the Trainer runs; names in it are relative to that."""
    model, run = Student(bias=False), trainer(method())
    want = run.validate(model, datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "q.ckpt")
    assert entry_of(model.state_dict()).startswith("lightning_quant: ")
    assert (
        trainer(method()).validate(
            Student(bias=False), datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt", verbose=False
        )
        == want
    )


# ---------------------------------------------------------------- refusals; the model is left as it was


@pytest.fixture(params=["float", "quantized"])
def target(request, method):
    """A model that refuses: a float one, or one that the same method has quantized."""
    return TinyTransformer(bias=False) if request.param == "float" else quantized(method, TinyTransformer(bias=False))


def refused(model, state, match, error=ValueError):
    before, layout, record = values(model), structure(model), record_of(model)
    attach_record(model)
    with pytest.raises(error, match=match):
        model.load_state_dict(state)
    detach_record(model)
    assert structure(model) == layout and same(values(model), before)
    assert (record_of(model) is None) == (record is None)


@pytest.mark.parametrize(
    "lost",
    [
        "blocks.0.qkv.weight",
        "blocks.0.qkv.folded",
        "blocks.1.fc1.bias",
        "blocks.1.fc1.weight_quantizer.scale",
        "blocks.1.fc1.weight_quantizer",
        "blocks.1.fc1.input_quantizer.zero_point",
        "blocks.1.fc1.input_quantizer",
        "blocks.0.attention_quantizers.0.value_quantizer",
        "blocks.0.attention_quantizers",
    ],
)
def test_truncated(lost, target, method):
    whole = quantized(method, TinyTransformer(bias=method is ptq)).state_dict()
    state = {key: value for key, value in whole.items() if not f"{key}.".startswith(f"{lost}.")}
    assert len(state) < len(whole)
    if method is ptq:
        target = TinyTransformer() if record_of(target) is None else quantized(method)
    refused(target, state, rf"checkpoint is truncated: its plan \(\w+\) needs `{lost}")


def test_truncated_in_a_norm_is_torchs_own_error(method):
    state = quantized(method).state_dict()
    del state["blocks.0.norm1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.norm1\.weight"):
        WithMixin().load_state_dict(state)


def test_weights_of_another_width(method, target):
    class Wide(TinyTransformer):
        def __init__(self):
            super().__init__(bias=False)
            for block in self.blocks:
                block.fc1, block.fc2 = nn.Linear(16, 48, bias=False), nn.Linear(48, 16)

    refused(
        target,
        quantized(method, Wide()).state_dict(),
        r"another model: `blocks\.0\.fc1\.weight` is \(48, 16\) there and \(64, 16\) here",
    )


def test_a_model_with_fewer_layers(method):
    state = quantized(method).state_dict()
    for quantize in (False, True):
        short = TinyTransformer()
        del short.blocks[1]
        if quantize:
            quantized(method, short)
        refused(short, state, r"names a layer `blocks\.1\.(qkv|\w+)`, which TinyTransformer does not have")


def test_another_plan_is_refused_by_the_running_callback(method, tmp_path):
    run = trainer(method())
    run.validate(TinyTransformer(), datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "q.ckpt")
    for other, match in (
        (method(weights="int6"), r"another plan: \w+ there has weights='int[48]', here weights='int6'"),
        (method(skip=["head"]), r"there has skip=\[\], here skip=\['head'\]"),
        (method(target="blocks.0"), r"quantized by \w+\(.*\), but the Trainer has \w+\(.*target='blocks\.0'"),
    ):
        model = TinyTransformer()
        layout, before = structure(model), values(model)
        with pytest.raises(ValueError, match=match):
            validate(model, other, ckpt_path=tmp_path / "q.ckpt")
        assert structure(model) == layout and same(values(model), before) and record_of(model) is None


def test_another_plan_leaves_a_quantized_model_quantized(method, tmp_path):
    run = trainer(method(skip=["head"]))
    run.validate(TinyTransformer(), datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "q.ckpt")
    model = quantized(method)
    layout, before = structure(model), values(model)
    with pytest.raises(ValueError, match="another plan"):
        validate(model, method(), ckpt_path=tmp_path / "q.ckpt")
    assert structure(model) == layout and same(values(model), before)
    assert method().is_calibrated(model)


def test_the_plan_of_a_module_that_attends_itself():
    """Attention in the forward of the LightningModule, whose own name is empty."""

    class Net(CalibrationMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))

        def validation_step(self, batch, batch_idx):
            self.log("mean", self(batch).mean(), batch_size=len(batch))

    data = torch.randn(32, 5, 8)
    model = Net()
    trainer(ptq()).validate(model, torch.utils.data.DataLoader(list(data)), verbose=False)
    assert isinstance(model, AttentionSite)
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(data), model.eval()(data))
    state = {
        key: value for key, value in model.state_dict().items() if not key.startswith("attention_quantizers.0.key")
    }
    with pytest.raises(ValueError, match=r"truncated.*`attention_quantizers\.0\.key_quantizer"):
        Net().load_state_dict(state)
