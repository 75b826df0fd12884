"""A quantized model saved as packed codes computes the same after it is loaded, bit for bit."""

import json
import math
import sys

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, RepQViT, load_quantized, save_quantized
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer
from tests.models import TinyTransformer, trainer, validate


class Module(L.LightningModule):
    """Any network as a LightningModule that can be validated."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch).float().mean(), batch_size=len(batch))


class Attention(nn.Module):
    """Self and cross attention of torch, then a head."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=True, bias=False, add_bias_kv=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.own(x, x, x, need_weights=False)[0]
        return self.head(self.cross(x, x[..., :6], x[..., 6:])[0])


class Language(nn.Module):
    """An embedding, a hidden layer and a head that shares the table if ``tied``."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.hidden, self.lm_head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        return self.lm_head(torch.relu(self.hidden(self.embedding(ids))))


class Shared(nn.Module):
    """One linear layer under two names, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again, self.other.weight = self.first, self.first.weight

    def forward(self, x):
        return self.other(self.again(self.first(x)))


class Views(nn.Module):
    """Buffers that are views of one table, as rotary embeddings have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(3, 8))
        self.register_buffer("first", self.table[0])
        self.register_buffer("last_two", self.table[1:])
        self.register_buffer("turned", torch.randn(8, 3).t())
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x):
        return self.linear(x) * self.first + self.last_two.sum(0) + self.turned.sum(0)


def perceptron():
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))


def conv_net():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3)),
    )


def gpt2_layers():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(24, 16), nn.GELU(), Conv1D(24, 24), nn.GELU(), Conv1D(1, 24))


floats = torch.randn(32, 7, 16, generator=torch.Generator().manual_seed(0))
images = torch.randn(32, 3, 9, 11, generator=torch.Generator().manual_seed(0))
tokens = torch.randint(20, (32, 6), generator=torch.Generator().manual_seed(0))

MODELS = {
    "perceptron": (perceptron, floats),
    "conv net": (conv_net, images),
    "conv net, channels last": (lambda: conv_net().to(memory_format=torch.channels_last), images),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(7, 8, 3, dilation=2), nn.ReLU(), nn.Conv1d(8, 4, 1)), floats),
    "Conv1D of transformers": (gpt2_layers, floats),
    "MultiheadAttention": (Attention, floats),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        ),
        floats,
    ),
    "embedding": (lambda: Language(tied=False), tokens),
    "tied weights": (lambda: Language(tied=True), tokens),
    "one layer twice": (Shared, floats[..., :8]),
    "views": (Views, floats[..., :8]),
}
FORMATS = [*(f"int{bits}" for bits in (*range(2, 9), 11, 16)), "uint3", "int4_asym", "int4_tensor", "int4_g8"]
FORMATS += ["int5_asym_g4", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "fp6_e3m2_tensor", "fp4_e2m1_g8"]


def quantized(make, batches, callback, dtype=None, **kwargs):
    """A calibrated model, from a seed of its own."""
    torch.manual_seed(1)
    model = Module(make()).to(dtype)
    batches = batches if batches.dtype == torch.long else batches.to(dtype)
    loader = DataLoader(list(batches), batch_size=4)
    trainer(callback, **kwargs).validate(model, loader, verbose=False)
    return model.eval()


@torch.no_grad()
def same_after_reload(model, make, x, folder, dtype=None):
    """Save, load into a model with other weights, and compare outputs bit for bit."""
    want = model(x)
    save_quantized(model, folder)
    torch.manual_seed(2)
    fresh = Module(make()).to(dtype)
    assert not torch.equal(fresh.eval()(x), want)
    load_quantized(fresh, folder)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(fresh.eval()(x), want)
    assert list(fresh.state_dict()) == list(model.state_dict())
    return fresh


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("weights", FORMATS)
def test_every_weight_format(weights, activations, tmp_path):
    model = quantized(perceptron, floats, PostTrainingQuantization(weights, activations))
    assert all(
        not layer.weight_quantizer.scheme.dynamic for layer in model.modules() if isinstance(layer, QuantizedLayer)
    )
    same_after_reload(model, perceptron, floats, tmp_path)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: PostTrainingQuantization("int8", "int8", embeddings="int8"),
        lambda: PostTrainingQuantization("int4", None, embeddings="int8"),
        lambda: PostTrainingQuantization(None, "int8"),
        lambda: PostTrainingQuantization("fp8_e4m3", "fp8_e4m3", embeddings="fp8_e4m3"),
        lambda: PostTrainingQuantization("int4", "int8_token_dynamic"),
    ],
    ids=["w8a8", "w4", "a8", "fp8", "dynamic"],
)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer(name, callback, tmp_path):
    make, x = MODELS[name]
    model = quantized(make, x, callback())
    assert any(isinstance(layer, QuantizedLayer) for layer in model.modules())
    fresh = same_after_reload(model, make, x, tmp_path)
    same_after_reload(fresh, make, x, tmp_path)  # and over the old files, from a model that was loaded itself


@pytest.mark.parametrize("weights", ["int4", "int8", "int8_asym", "int16", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions(weights, dtype, tmp_path):
    precision = {torch.bfloat16: "bf16-true", torch.float16: "16-true", torch.float64: "64-true"}[dtype]
    batches = floats.double()
    model = quantized(perceptron, batches, PostTrainingQuantization(weights, "int8"), dtype, precision=precision)
    assert model.net[0].weight.dtype == dtype and model.net[0].weight_quantizer.scale.dtype == torch.float32
    same_after_reload(model, perceptron, batches.to(dtype), tmp_path, dtype)


def test_a_bf16_run_gives_the_same_metrics_from_a_float32_model(tmp_path):
    data = DataLoader(list(floats), batch_size=4)
    model = quantized(perceptron, floats, PostTrainingQuantization("int4", "int8"), precision="bf16-true")
    want = trainer(precision="bf16-true").validate(model, data, verbose=False)
    save_quantized(model, tmp_path)
    fresh = Module(perceptron())
    load_quantized(fresh, tmp_path)
    assert trainer(precision="bf16-true").validate(fresh, data, verbose=False) == want


def test_created_biases(tmp_path):
    model = TinyTransformer(bias=False)
    want = validate(model, RepQViT())
    assert model.blocks[0].qkv.bias is not None
    save_quantized(model, tmp_path)
    fresh = TinyTransformer(bias=False)
    load_quantized(fresh, tmp_path)
    assert torch.equal(fresh.blocks[0].qkv.bias, model.blocks[0].qkv.bias)
    assert validate(fresh) == want


def test_a_shared_table_is_stored_once_and_stays_shared(tmp_path):
    callback = PostTrainingQuantization("int8", "int8", embeddings="int8")
    model = quantized(lambda: Language(tied=True), tokens, callback)
    fresh = same_after_reload(model, lambda: Language(tied=True), tokens, tmp_path)
    assert fresh.net.lm_head.weight is fresh.net.embedding.weight
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(value.numel() == 20 * 8 for value in stored.values()) == 1


def test_a_table_that_only_a_quantized_layer_reads_as_codes_stays_float_for_the_float_one(tmp_path):
    """The embedding is float and the head is 4 bits: the table must not be rounded for the embedding."""
    make = lambda: Language(tied=True)  # noqa: E731
    model = quantized(make, tokens, PostTrainingQuantization("int4", "int8"))
    assert type(model.net.embedding) is nn.Embedding
    fresh = same_after_reload(model, make, tokens, tmp_path)
    assert torch.equal(fresh.net.embedding.weight, model.net.embedding.weight)


def test_no_pickle_and_only_these_two_files(tmp_path):
    model = quantized(perceptron, floats, PostTrainingQuantization("int4", "int8"))
    save_quantized(model, tmp_path / "made" / "on the way")
    assert sorted(p.name for p in (tmp_path / "made" / "on the way").iterdir()) == [
        "model.safetensors",
        "quantization.json",
    ]
    description = json.loads((tmp_path / "made" / "on the way" / "quantization.json").read_text())
    (plan,) = description["plans"].values()
    assert plan["method"] == "PostTrainingQuantization" and plan["layers"]["net.0"]["weights"] == "int4_sym_channel"
    stored = load_file(tmp_path / "made" / "on the way" / "model.safetensors")
    assert stored["net.0.weight.codes"].dtype == torch.uint8 and "net.0.weight" not in stored


def test_nothing_in_the_model_changes_by_saving_it(tmp_path):
    model = quantized(perceptron, floats, PostTrainingQuantization("int4", "int8"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_quantized(model, tmp_path)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def file_size(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("weights", "share"), [("int2", 1 / 16), ("int4", 1 / 8), ("int8", 1 / 4), ("int3", 3 / 32)])
def test_size_of_the_file(weights, share, tmp_path):
    """Bits / 32 of the weights; biases, scales and zero points stay float32 and are 1.4 % here."""
    make = lambda: nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))  # noqa: E731
    model = quantized(make, torch.randn(32, 512), PostTrainingQuantization(weights, "int8"))
    save_quantized(model, tmp_path)
    save_file(make().state_dict(), tmp_path / "float.safetensors")
    in_float = (tmp_path / "float.safetensors").stat().st_size
    ratio = file_size(tmp_path) / in_float
    assert share < ratio < share + 0.008
    per_layer = math.ceil(512 * 512 * 32 * share / 8) + 3 * 512 * 4  # codes; a bias, a scale and a zero point per row
    assert file_size(tmp_path) == pytest.approx(3 * per_layer, abs=3000)  # plus names and activation scales


def test_size_of_deit_tiny(assets, tmp_path):
    """5.7 million weights take 22.9 MB as float32 and 3.3 MB with 4 bits: biases, norms and scales are the 2 %."""
    from tests.real import deit_tiny, imagenet

    model = deit_tiny()
    save_file(model.net.state_dict(), tmp_path / "float.safetensors")
    x = imagenet("calibration")[0][:2]
    callback = RepQViT("int4", "int4", calibration_loader=[(x, torch.zeros(2))], calibration_samples=2)
    trainer(callback, limit_val_batches=1).validate(model, DataLoader([(x[0], 0)], batch_size=1), verbose=False)
    save_quantized(model, tmp_path)
    ratio = file_size(tmp_path) / (tmp_path / "float.safetensors").stat().st_size
    assert 0.140 < ratio < 0.146
    fresh = deit_tiny()
    load_quantized(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))


# ---------------------------------------------------------------- errors; the model is left as it was


class Snapshot:
    """What a refused call must leave alone: classes, values, hooks."""

    def __init__(self, model):
        self.model, self.types = model, [type(m) for m in model.modules()]
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.record = record_of(model)

    def assert_same(self):
        assert [type(m) for m in self.model.modules()] == self.types
        now = self.model.state_dict()
        assert list(now) == list(self.state) and all(torch.equal(now[key], self.state[key]) for key in now)
        assert (record_of(self.model) is None) == (self.record is None)
        assert self.record is not None or not self.model._load_state_dict_pre_hooks


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    save_quantized(quantized(perceptron, floats, PostTrainingQuantization("int4", "int8")), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(params=["float", "quantized"])
def target(request):
    """A model that something is loaded into: a float one, or one that is quantized in another way."""
    if request.param == "float":
        return Module(perceptron())
    return quantized(perceptron, floats, PostTrainingQuantization("int8", None))


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(
        ValueError, match=r"Module is not quantized: run trainer\.validate with a quantization callback"
    ):
        save_quantized(Module(perceptron()), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_uncalibrated_model_is_not_saved(tmp_path):
    model = quantized(perceptron, floats, PostTrainingQuantization("int4", "int8"))
    model.net[2].input_quantizer.reset()
    with pytest.raises(
        ValueError, match=r"`net\.2\.input_quantizer` is not calibrated: run .* PostTrainingQuantization"
    ):
        save_quantized(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_with_nan_are_not_saved(tmp_path):
    model = quantized(perceptron, floats, PostTrainingQuantization("int4", "int8"))
    with torch.no_grad():
        model.net[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"`net\.2\.weight`.*NaN"):
        save_quantized(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(16, 8), WithExtraState(8, 4))  # noqa: E731
    model = quantized(make, floats, PostTrainingQuantization("int4", None))
    with pytest.raises(ValueError, match=r"`net\.1\._extra_state` is a dict"):
        save_quantized(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def other_depth():
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5))


def other_class():
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LazyLinear(8), nn.ReLU(), nn.LayerNorm(8))


def other_width():
    return nn.Sequential(nn.Linear(16, 30), nn.GELU(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))


def one_more():
    return nn.Sequential(*perceptron(), nn.LayerNorm(5))


def weight_normed():
    net = perceptron()
    nn.utils.parametrizations.weight_norm(net[0])
    return net


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (other_depth, r"names a layer `net\.4`, which Module does not have"),
        (
            lambda: nn.Sequential(*(nn.LayerNorm(16) for _ in range(5))),
            r"quantizes `net\.0`, but here it is a LayerNorm",
        ),
        (weight_normed, r"quantizes `net\.0`, but here it is a ParametrizedLinear"),
        (other_width, r"net\.0\.weight"),
        (one_more, r"net\.5\.weight"),
    ],
    ids=["depth", "class", "parametrized", "width", "one more"],
)
def test_a_folder_of_another_model(make, match, folder):
    model = Module(make())
    before = Snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=match):
        load_quantized(model, folder)
    before.assert_same()


def test_a_folder_of_another_model_into_a_quantized_one(folder):
    model = quantized(other_depth, floats, PostTrainingQuantization("int8", None))
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"names a layer `net\.4`"):
        load_quantized(model, folder)
    before.assert_same()


@pytest.mark.parametrize(
    "lost",
    [
        "net.0.weight.codes",
        "net.0.weight_quantizer.scale",
        "net.0.weight_quantizer",
        "net.2.input_quantizer",
        "net.2.bias",
        "net.4.folded",
    ],
)
def test_tensors_missing_in_the_folder(lost, folder, target):
    description = json.loads((folder / "quantization.json").read_text())
    stored = {key: value for key, value in load_file(folder / "model.safetensors").items() if not key.startswith(lost)}
    rewrite(folder, description, stored)
    before = Snapshot(target)
    with pytest.raises(ValueError, match=rf"`{lost}.*`"):
        load_quantized(target, folder)
    before.assert_same()


def rewrite(folder, description, stored):
    """Other tensors in the place of the old ones."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(stored, folder / "model.safetensors", metadata)


@pytest.mark.parametrize("lost", ["model.safetensors", "quantization.json"])
def test_a_folder_written_half(lost, folder, target):
    (folder / lost).unlink()
    before = Snapshot(target)
    with pytest.raises(FileNotFoundError, match=rf"`{lost}`.*save_quantized"):
        load_quantized(target, folder)
    before.assert_same()


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
@pytest.mark.parametrize("file", ["model.safetensors", "quantization.json"])
def test_a_file_cut_off(file, keep, folder, target):
    (folder / file).write_bytes((folder / file).read_bytes()[:keep])
    before = Snapshot(target)
    with pytest.raises(ValueError, match=rf"`{file}`.*damaged"):
        load_quantized(target, folder)
    before.assert_same()


@pytest.mark.parametrize("kept", ["model.safetensors", "quantization.json"])
def test_two_halves_of_two_models(kept, folder, tmp_path, target):
    """A process that is killed while it writes over an old folder leaves one new file and one old one."""
    save_quantized(quantized(perceptron, floats, PostTrainingQuantization("int4_asym", "int8")), tmp_path / "other")
    (folder / kept).write_bytes((tmp_path / "other" / kept).read_bytes())
    before = Snapshot(target)
    with pytest.raises(ValueError, match="belong to different models"):
        load_quantized(target, folder)
    before.assert_same()


def test_a_failure_while_writing_leaves_the_old_folder(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = sys.modules["lightning_quant.checkpoint.files"]

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_quantized(quantized(perceptron, floats, PostTrainingQuantization("int8", "int8")), folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_such_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        load_quantized(Module(perceptron()), tmp_path / "nowhere")


def test_a_float_checkpoint_is_refused(tmp_path):
    model, run = Module(perceptron()), trainer()
    run.validate(model, DataLoader(list(floats)), verbose=False)
    run.save_checkpoint(tmp_path / "float.ckpt")
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"float\.ckpt holds a float model: load it with load_state_dict"):
        load_quantized(model, tmp_path / "float.ckpt")
    before.assert_same()


def test_a_bare_state_dict_file_loads_too(tmp_path):
    model = quantized(perceptron, floats, PostTrainingQuantization("int4", "int8"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = Module(perceptron())
    load_quantized(fresh, tmp_path / "state.pt")
    assert torch.equal(fresh.eval()(floats), model(floats))


def test_gradients_still_reach_the_loaded_weights(folder):
    model = Module(perceptron())
    parameters = list(model.parameters())
    load_quantized(model, folder)
    F.mse_loss(model(floats), torch.zeros(32, 7, 5)).backward()
    assert all(p is q and p.grad is not None for p, q in zip(parameters, model.parameters(), strict=True))
