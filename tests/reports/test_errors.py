"""The errors of layers against slow and obvious formulas."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_quant import PostTrainingQuantization, RepQViT
from lightning_quant.layers import QuantizedLayer, as_float, quantize_layer
from lightning_quant.metrics import sqnr
from lightning_quant.quantizers import Scheme, build_quantizer
from lightning_quant.reports import ModelErrors, TensorError
from tests.callbacks.unchanged import left_as_it_was
from tests.models import Sequences, TinyTransformer, validate


def ptq(bits=4, **arguments):
    return PostTrainingQuantization(weights=f"int{bits}", activations=f"int{bits}", ranges="minmax", **arguments)


def calls(model, batches):
    """What goes into each layer and comes out of it, by name, over all batches."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep = found.setdefault(name, [])
            handles.append(module.register_forward_hook(lambda _, x, y, keep=keep: keep.append((x[0], y))))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(side) for side in zip(*pairs, strict=True)] for name, pairs in found.items() if pairs}


@pytest.mark.parametrize("method", [ptq, lambda: RepQViT(weights="int4", activations="int4")], ids=["ptq", "repq"])
def test_own_and_accumulated_errors(method):
    model = TinyTransformer(dropout=0.0)
    validate(model, method())
    model.eval()
    batches = Sequences().val.tensors[0][:15].split([3, 5, 7])
    errors = ModelErrors(model)
    with torch.no_grad():
        for batch in batches:
            errors.add(lambda batch=batch: model(batch))
    found = {layer.name: layer for layer in errors.layers()}

    gathered = calls(model, batches)
    with as_float(model):
        exact = calls(model, batches)
    assert len(exact) == 10
    for name, (x, y) in exact.items():
        with torch.no_grad():
            alone = model.get_submodule(name)(x)
            rounded = model.get_submodule(name).input_quantizer(x)
        layer = found[name]
        assert layer.own == pytest.approx(sqnr(alone, y).item(), abs=1e-3), name
        assert layer.accumulated == pytest.approx(sqnr(gathered[name][1], y).item(), abs=1e-3), name
        assert layer.inputs[0].sqnr == pytest.approx(sqnr(rounded, x).item(), abs=1e-3), name
        weight = model.get_submodule(name).weight.detach()
        assert layer.weights[0].sqnr == pytest.approx(
            sqnr(model.get_submodule(name).quantized().detach(), weight).item(), abs=1e-6
        )
    everything = torch.cat(batches)
    with torch.no_grad():
        quantized = model(everything)
        with as_float(model):
            reference = model(everything)
    assert errors.output_sqnr == pytest.approx(sqnr(quantized, reference).item(), abs=1e-3)


def test_layers_come_in_the_order_in_which_they_ran():
    model = TinyTransformer()
    validate(model, ptq())
    errors = ModelErrors(model.eval())
    with torch.no_grad():
        errors.add(lambda: model(Sequences().val.tensors[0][:4]))
    names = [layer.name for layer in errors.layers()]
    assert names == ["embed"] + [
        f"blocks.{i}.{part}" for i in range(2) for part in ("qkv", "attention_quantizers.0", "proj", "fc1", "fc2")
    ] + ["head"]
    assert [layer.depth for layer in errors.layers()] == list(range(1, 13))


def test_attention_is_measured_with_its_operands_alone():
    model = TinyTransformer()
    validate(model, ptq(3))
    x = Sequences().val.tensors[0][:4]
    errors = ModelErrors(model.eval())
    with torch.no_grad():
        errors.add(lambda: model(x))
    layer = next(layer for layer in errors.layers() if layer.name == "blocks.0.attention_quantizers.0")
    assert [tensor.name for tensor in layer.tensors] == ["query", "key", "value", "probabilities"]

    attention, seen = model.get_submodule(layer.name), []
    kept = {}
    with torch.no_grad(), as_float(model):  # the model's own call of attention shows what goes in
        block = model.blocks[0]
        qkv = block.qkv(block.norm1(model.embed(x))).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        kept["exact"] = nn.functional.scaled_dot_product_attention(*qkv)
        seen = list(qkv)
    with torch.no_grad():
        assert layer.own == pytest.approx(sqnr(attention(*seen), kept["exact"]).item(), abs=1e-3)


class Spelled(nn.Module):
    """Attention written as matmul, softmax, matmul."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)


def test_attention_that_is_spelled_out_is_judged_by_its_worst_operand():
    import lightning as L
    from torch.utils.data import DataLoader

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Spelled()

        def forward(self, x):
            return self.net(x)

        def validation_step(self, batch, batch_idx):
            self(batch)

    model, data = Model(), torch.randn(6, 5, 8)
    L.Trainer(callbacks=[ptq()], logger=False, enable_checkpointing=False, accelerator="cpu").validate(
        model, DataLoader(data, batch_size=3), verbose=False
    )
    errors = ModelErrors(model.eval())
    with torch.no_grad():
        errors.add(lambda: model(data))
    (site,) = [layer for layer in errors.layers() if layer.kind == "attention"]
    assert site.own is None and site.accumulated is None and site.depth == 3  # behind q and k, before v
    assert site.sqnr == min(tensor.sqnr for tensor in site.tensors)


def test_multihead_attention_is_one_layer():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(4, 5, 8)
    scheme = Scheme.parse("int4_sym")
    quantize_layer(layer, Scheme.parse("int4_sym_channel"), scheme)
    quantize_layer(layer.out_proj, Scheme.parse("int4_sym_channel"), scheme)
    for module in (layer, layer.out_proj):
        for name, quantizer in module.weight_quantizers().items():
            quantizer.fit(module.weight_rows(name))
        for quantizer in module.activation_quantizers().values():
            quantizer.fit(x)
    errors = ModelErrors(layer)
    with torch.no_grad():
        errors.add(lambda: layer(x, x, x))
    found = {error.name: error for error in errors.layers()}
    assert set(found) == {"", "out_proj"}
    assert [tensor.name for tensor in found[""].tensors] == ["in_proj_weight", "input", "key_input", "value_input"]
    assert 0 < found[""].own < 60 and 0 < found["out_proj"].own < 60
    assert found[""].accumulated < found[""].own  # the projection is part of it


def test_clipped_and_zeroed_shares():
    quantizer = build_quantizer("uint2_asym")
    quantizer.freeze(torch.tensor(-1.0), torch.tensor(2.0))  # levels -1, 0, 1, 2
    error = TensorError("input", quantizer)
    error.add(torch.tensor([-1.6, -1.4, -0.4, 0.0, 0.3, 0.6, 2.4, 2.6, 9.0, 1.0]))
    assert error.clipped == pytest.approx(3 / 10)  # -1.6, 2.6 and 9.0 are more than half a step beyond
    assert error.zeroed == pytest.approx(2 / 10)  # -0.4 and 0.3; 0 itself was 0 before


@pytest.mark.parametrize(
    "scheme", ["int4_sym_channel", "int8_asym_channel", "int4_g4", "fp8_e4m3_channel", "fp4_e2m1", "logsqrt2_4"]
)
def test_every_format_has_its_histogram(scheme):
    weight = torch.randn(6, 8).abs()
    quantizer = build_quantizer(scheme, axis=0)
    quantizer.fit(weight)
    error = TensorError("weight", quantizer)
    error.add(weight)
    assert error.histogram.counts.sum() == weight.numel()
    assert error.sqnr == pytest.approx(sqnr(quantizer(weight), weight).item())


def test_nan_is_the_worst_of_all():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for layer in net:
        quantize_layer(layer, Scheme.parse("int2_sym_channel"), None)
        layer.weight_quantizer.fit(layer.weight)
    with torch.no_grad():
        net[1].bias[0] = float("nan")
    errors = ModelErrors(net)
    with torch.no_grad():
        errors.add(lambda: net(torch.randn(2, 4)))
    broken = errors.layers()
    assert np.isnan(broken[1].own) and max(broken, key=lambda layer: layer.badness).name in ("1", "2")


def test_a_layer_that_did_not_run_is_known_by_its_weight():
    net = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    for layer in net.values():
        quantize_layer(layer, Scheme.parse("int4_sym_channel"), None)
        layer.weight_quantizer.fit(layer.weight)
    errors = ModelErrors(net)
    with torch.no_grad():
        errors.add(lambda: net["used"](torch.randn(2, 4)))
    used, idle = errors.layers()
    assert used.depth == 1 and idle.depth is None and idle.own is None
    assert idle.sqnr == idle.weights[0].sqnr > 10


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = TinyTransformer()
    validate(model, ptq())
    model.eval()
    errors = ModelErrors(model)

    def run():
        model(Sequences().val.tensors[0])
        if fails:
            raise ArithmeticError

    with left_as_it_was(model), torch.no_grad():
        if fails:
            with pytest.raises(ArithmeticError):
                errors.add(run)
        else:
            errors.add(run)
    assert all(
        quantizer.observer is None
        for module in model.modules()
        if isinstance(module, QuantizedLayer)
        for quantizer in module.activation_quantizers().values()
    )
    assert not any(watched.kept for watched in errors._watched)


def test_memory_does_not_grow_with_batches_nor_with_their_size():
    """What is held between batches: sums and histograms. Within one: a bounded part of each output."""

    def held(errors):
        return sum(
            tensor.histogram.counts.nbytes
            for watched in errors._watched
            for tensor in watched.error.tensors
            if tensor.histogram is not None
        )

    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in net:
        quantize_layer(layer, Scheme.parse("int4_sym_channel"), Scheme.parse("int4_sym"))
        layer.weight_quantizer.fit(layer.weight)
        layer.input_quantizer.fit(torch.randn(9, 64))
    errors, once, most = ModelErrors(net), [], [0]

    def run(x):
        out = net(x)
        most[0] = max(most[0], sum(t.untyped_storage().nbytes() for w in errors._watched for t in w.kept))
        return out

    with torch.no_grad():
        for samples in (1, 10, 5000):
            errors.add(lambda samples=samples: run(torch.ones(samples, 64).cumsum(0)))
            once.append(held(errors))
    assert once[0] == once[2]
    assert most[0] <= 2 * 4 * 2**14


def test_works_on_a_copy_of_the_model():
    model = TinyTransformer()
    validate(model, ptq())
    twin = copy.deepcopy(model).eval()
    for one in (model.eval(), twin):
        errors = ModelErrors(one)
        with torch.no_grad():
            errors.add(lambda one=one: one(Sequences().val.tensors[0]))
    assert len(errors) == 12
