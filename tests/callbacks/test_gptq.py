"""GPTQ solves the blocks of any model, one behind the other, and leaves its Parameters alone."""

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import GPTQ, OSAQ, MagnitudePruning, PostTrainingQuantization, SparseGPT, Wanda
from lightning_quant.calibration import Hessian, input_rows, record
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.solvers import output_error
from tests.cases import is_float, quantized
from tests.models import Sequences, TinyTransformer, trainer

W3 = {"weights": "int3_channel", "calibration_samples": 64}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False,
         "enable_checkpointing": False}  # fmt: skip


def validated(callback, model=None, data=None, **options):
    model = TinyTransformer().eval() if model is None else model
    trainer(callback, **options).validate(model, datamodule=data or Sequences(shuffle=False), verbose=False)
    return model


def codes(model):
    return {name: module.weight_quantizer.codes for name, module in model.named_modules()
            if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None}  # fmt: skip


def test_layers_inside_blocks_are_solved_and_others_stay_float(tmp_path):
    callback = GPTQ(**W3)
    model = validated(callback, default_root_dir=tmp_path)
    inside = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("qkv", "proj", "fc1", "fc2")]
    assert sorted(quantized(model)) == sorted(inside) == sorted(callback.solved)
    assert all(found is not None for found in codes(model).values())
    assert all(0 < notes["error"] < 0.2 and notes["tokens"] == 64 * 5 for notes in callback.solved.values())
    assert not list(tmp_path.iterdir())  # nothing is left to resume


def test_overrides_names_a_head_that_is_rounded_to_the_nearest_then():
    model = validated(GPTQ(**W3, overrides={"head": "int8"}))
    assert str(model.head.weight_quantizer.scheme) == "int8_asym_channel" and model.head.weight_quantizer.codes is None


def test_each_layer_errs_less_than_by_rounding_to_the_nearest_on_what_it_is_given():
    model = validated(GPTQ(**W3))
    nearest = validated(PostTrainingQuantization("int3_asym_channel", None, ranges="minmax"))
    x = next(iter(Sequences(shuffle=False, batch_size=64).train_dataloader()))[0]
    for name in quantized(model):
        layer, other = model.get_submodule(name), nearest.get_submodule(name)
        hessian = Hessian.of(layer)
        call = record(layer, lambda: model(x))[0]
        hessian.add(input_rows(layer, call.inputs[0]))
        error, plain = (
            output_error(layer.weight.double(), one.quantized().double(), hessian.matrix()).sum()
            for one in (layer, other)
        )
        assert error < plain, name


def test_the_first_blocks_error_is_noted_as_it_is():
    callback = GPTQ(**W3)
    model = validated(callback)
    x = next(iter(Sequences(shuffle=False, batch_size=64).train_dataloader()))[0]
    with torch.no_grad():
        layer = model.blocks[0].qkv
        rows = record(layer, lambda: model(x))[0].inputs[0]
        exact, found = rows @ layer.weight.T, rows @ layer.quantized().T
    relative = ((found - exact) ** 2).sum() / (exact**2).sum()
    assert callback.solved["blocks.0.qkv"]["error"] == pytest.approx(relative.item(), rel=1e-3)


def test_floats_stay_as_they_are_and_come_back():
    start = copy.deepcopy(TinyTransformer().eval())
    callback, x = GPTQ(**W3), torch.randn(4, 5, 16)
    model = validated(callback)
    with as_float(model), torch.no_grad():
        assert torch.equal(model(x), start(x))
    callback.remove(model)
    assert is_float(model) and all(map(torch.equal, model.parameters(), start.parameters()))


@pytest.mark.parametrize("activations", ["int4", "int4_token_dynamic"])
def test_activations_are_rounded_too(activations):
    model = validated(GPTQ(**W3, activations=activations, attention=False))
    solved, weight_only = codes(model), codes(validated(GPTQ(**W3)))
    assert not torch.equal(solved["blocks.0.qkv"], weight_only["blocks.0.qkv"])  # it saw the rounded inputs
    assert all(model.get_submodule(name).input_quantizer.calibrated for name in solved)


def test_groups_and_act_order_and_the_size_of_blocks():
    def found(**arguments):
        return codes(validated(GPTQ("int3_g8", calibration_samples=64, **arguments))).values()

    plain = found()
    for size in (1, 5):
        assert all(map(torch.equal, plain, found(block_size=size)))
    for arguments in ({"act_order": True}, {"static_groups": True}):
        assert not all(map(torch.equal, plain, found(**arguments)))


def test_what_is_pruned_already_stays_zero():
    """And the kept weights make good what the pruned ones did, as well as the rounding."""
    pruned, solved = MagnitudePruning("2:4"), GPTQ(**W3)
    model = TinyTransformer().eval()
    trainer(pruned, solved).validate(model, datamodule=Sequences(shuffle=False), verbose=False)
    for name in codes(model):
        layer = model.get_submodule(name)
        zeros = ~layer.weight_pruning.keep
        assert zeros.float().mean() == 0.5 and not layer.quantized()[zeros].any()
        assert (layer.quantized() != 0).float().mean() > 0.3


# ---------------------------------------------------------------- killed runs


class Killed(Exception):
    pass


class Dies(GPTQ):
    """Is killed at a layer, and counts those that it solved."""

    at = "blocks.1.fc1"

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.did = []

    def solve(self, name, layer, statistics):
        if name == self.at:
            raise Killed
        self.did.append(name)
        return super().solve(name, layer, statistics)


def test_a_killed_run_goes_on_at_its_block(tmp_path):
    exact = validated(GPTQ(**W3))
    with pytest.raises(Killed):
        validated(Dies(**W3, state_dir=str(tmp_path / "states")), default_root_dir=tmp_path)
    assert [file.name for file in (tmp_path / "states").glob("*/*")] == ["0.pt"]
    second = Dies(**W3, state_dir=str(tmp_path / "states"))
    second.at = None
    model = validated(second, default_root_dir=tmp_path)
    assert second.did == [f"blocks.1.{layer}" for layer in ("qkv", "proj", "fc1", "fc2")]
    assert sorted(second.solved) == sorted(quantized(model))
    assert all(map(torch.equal, codes(exact).values(), codes(model).values()))
    tensors = [{k: v for k, v in net.state_dict().items() if "quantized" not in k} for net in (exact, model)]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_the_float_model_and_another_one_finds_nothing_of_it(tmp_path):
    model = TinyTransformer().eval()
    with pytest.raises(Killed):
        validated(Dies(**W3, state_dir=str(tmp_path)), model)
    assert is_float(model)
    other = Dies(**{**W3, "weights": "int4_channel"}, state_dir=str(tmp_path))
    other.at = None
    validated(other)
    assert len(other.did) == 8


# ---------------------------------------------------------------- other models


class Experts(TinyTransformer):
    """Its second block has a layer that no sample reaches."""

    def __init__(self):
        super().__init__()
        self.blocks[1].idle = nn.Linear(16, 16)


def test_a_layer_that_no_sample_reaches_stays_float():
    callback = GPTQ(**W3)
    model = validated(callback, Experts().eval())
    assert type(model.blocks[1].idle) is nn.Linear and "blocks.1.idle" not in callback.solved


class Stage(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.conv, self.wide = nn.Conv2d(6, 6, 3, padding=1, groups=groups), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return x + self.wide(self.conv(x).relu())


class Convolutional(L.LightningModule):
    def __init__(self, groups=3):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.Sequential(Stage(groups), Stage(1))

    def forward(self, x):
        return self.stages(x)

    def validation_step(self, batch, batch_idx):
        self(batch)


@pytest.mark.parametrize("weights", ["int3_channel", "int3_g3"])
def test_convolutions_are_solved_group_by_group(weights):
    images = torch.randn(32, 6, 8, 8, generator=torch.Generator().manual_seed(2))
    images = images + images.roll(1, 3) + images.mean(1, keepdim=True)
    loader, callback = DataLoader(images, batch_size=8), GPTQ(weights, ranges="minmax", calibration_samples=32)
    model, start = Convolutional(), Convolutional()
    L.Trainer(callbacks=[callback], **QUIET).validate(model, loader, verbose=False)
    plain = PostTrainingQuantization(weights.replace("int3", "int3_asym"), None, ranges="minmax")
    nearest = Convolutional()
    L.Trainer(callbacks=[plain], **QUIET).validate(nearest, loader, verbose=False)
    with torch.no_grad():
        errors = [float((net(images) - start(images)).square().mean()) for net in (model, nearest)]
    assert sorted(callback.solved) == [f"stages.{i}.{name}" for i in range(2) for name in ("conv", "wide")]
    assert errors[0] < 0.8 * errors[1]


def test_one_scale_for_channels_that_are_solved_apart_is_refused():
    loader = DataLoader(torch.randn(4, 6, 8, 8), batch_size=4)
    with pytest.raises(ValueError, match=r"groups of channels of `stages\.0\.conv` are solved apart"):
        L.Trainer(callbacks=[GPTQ("int3_tensor")], **QUIET).validate(Convolutional(), loader, verbose=False)


class LanguageModel(L.LightningModule):
    def __init__(self, kind="llama", tied=True):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        shared = {"vocab_size": 17, "tie_word_embeddings": tied}
        if kind == "llama":
            config = transformers.LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                **shared,
            )  # fmt: skip
        else:
            config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **shared)
        self.net = transformers.AutoModelForCausalLM.from_config(config)

    def forward(self, ids):
        return self.net(input_ids=ids).logits

    def validation_step(self, batch, batch_idx):
        self(batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models_keep_what_is_tied(kind):
    tokens = DataLoader(torch.randint(17, (32, 12), generator=torch.Generator().manual_seed(0)), batch_size=8)
    model, callback = LanguageModel(kind), GPTQ("int3_channel", calibration_loader=tokens)
    L.Trainer(callbacks=[callback], **QUIET).validate(model, tokens, verbose=False)
    embedding, head = model.net.get_input_embeddings(), model.net.get_output_embeddings()
    assert embedding.weight is head.weight and type(head) is nn.Linear and type(embedding) is nn.Embedding
    assert len(callback.solved) == (14 if kind == "llama" else 8)
    assert model.net.config.use_cache
    callback.remove(model)
    assert is_float(model)


@pytest.mark.parametrize(
    "callback",
    [GPTQ("int8_channel"), OSAQ("int8_channel"), Wanda(0.1), SparseGPT(0.1)],
    ids=lambda callback: type(callback).__name__,
)
def test_an_input_that_is_always_zero_gets_no_weight_and_tokens_that_calibration_never_met_are_understood(callback):
    model, met = LanguageModel(), torch.randint(9, (32, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.net.model.layers[0].input_layernorm.weight[3] = 0
    callback.calibration_loader = DataLoader(met, batch_size=8)
    L.Trainer(callbacks=[callback], **QUIET).validate(model, callback.calibration_loader, verbose=False)
    attention = model.net.model.layers[0].self_attn
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert not layer.quantized()[:, 3].any() and layer.quantized()[:, 2].any()
        found = model(torch.arange(9, 17)[None])
        with as_float(model):
            exact = model(torch.arange(9, 17)[None])
    assert (found - exact).norm() < (0.02 if isinstance(callback, GPTQ) else 0.3) * exact.norm()


# ---------------------------------------------------------------- refusals


class Plain(TinyTransformer):
    """No blocks at all."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, x):
        return self.head(self.fc(self.embed(x)).mean(1))


def test_models_without_blocks_are_refused_unless_some_are_named():
    with pytest.raises(ValueError, match=r"Plain has no repeated blocks .* blocks=\["):
        validated(GPTQ(**W3), Plain().eval())
    callback = GPTQ(**W3, blocks=["fc"])
    validated(callback, Plain().eval())
    assert list(callback.solved) == ["fc.0"]


@pytest.mark.parametrize("weights", ["int4_asym_g12", "int4_asym_g128"])
def test_the_last_group_of_a_row_may_be_shorter(weights):
    model = TinyTransformer().eval()
    validated(GPTQ(weights), model)
    qkv = model.get_submodule("blocks.0.qkv")
    assert qkv.weight_quantizer.scale.shape == (48, math.ceil(16 / int(weights.rsplit("g")[1])))
    assert torch.equal(qkv.rounded_rows(), qkv.weight_quantizer.decode(qkv.weight_quantizer.codes))


def test_few_tokens_are_warned_of_and_an_argument_accepts_them():
    with pytest.warns(UserWarning, match=r"`blocks\.0\.qkv` has 16 inputs and saw 40 tokens.*min_tokens") as warned:
        validated(GPTQ("int4_channel", calibration_samples=8))
    assert len([warning for warning in warned if "min_tokens" in str(warning.message)]) == 1  # not one for each layer
    validated(GPTQ("int4_channel", calibration_samples=8, min_tokens=0))


class NaNInside(Sequences):
    def setup(self, stage):
        self.train.tensors[0][3, 0, 0] = float("nan")


def test_inputs_that_are_not_finite_are_refused():
    model = TinyTransformer().eval()
    with pytest.raises(ValueError, match=r"inputs of `blocks\.0\.qkv` are not finite"):
        validated(GPTQ(**W3), model, NaNInside(shuffle=False))
    assert is_float(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "log2_4"}, "weights have a static uniform or float format"),
        ({"damp": -0.1}, "damp=-0.1"),
        ({"act_order": True, "static_groups": False}, "act_order=True"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**arguments)


def test_one_block_at_a_time_can_be_elsewhere(tmp_path):
    """There is no second device here: that a block goes there and back is seen by the calls."""
    model, moved = TinyTransformer().eval(), []
    for number, block in enumerate(model.blocks):
        block.to = lambda device, number=number, block=block: moved.append((number, str(device))) or block
    validated(GPTQ(**W3, device="cpu"), model, default_root_dir=tmp_path)
    assert moved == [(0, "cpu"), (0, "cpu"), (1, "cpu"), (1, "cpu")]
