"""What pruning does to a model, by any method: exact patterns, float weights untouched, zeros that stay."""

import copy

import pytest
import torch
from torch import nn

from lightning_quant import (
    MagnitudePruning,
    PostTrainingQuantization,
    SparseGPT,
    SparsityInduction,
    Wanda,
    load_quantized,
    save_quantized,
)
from lightning_quant.calibration import Hessian, input_rows
from lightning_quant.layers import Plan, QuantizedLayer, as_float, quantize_layer
from lightning_quant.quantizers import Pattern
from lightning_quant.solvers import output_error
from tests.callbacks.test_ranks import assert_equal, states_after
from tests.models import NoDropout, Sequences, trainer, validate

QUICK = {"calibration_samples": 32}
METHODS = {
    "magnitude": lambda *args, **more: MagnitudePruning(*args, **more),
    "wanda": lambda *args, **more: Wanda(*args, **QUICK, **more),
    "sparsegpt": lambda *args, **more: SparseGPT(*args, **QUICK, **more),
    "induction": lambda *args, **more: SparsityInduction(*args, **{"host": "magnitude", "epochs": 1, **QUICK, **more}),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def pruned(*callbacks, model=None):
    model = NoDropout() if model is None else model
    validate(model, *callbacks)
    return model


def weights(model):
    """The weights as pruned layers compute with them."""
    return {name: layer.quantized().detach() for name, layer in layers(model).items()}


def layers(model):
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    return {name: layer for name, layer in found.items() if layer.masks()}


def outputs(model):
    with torch.no_grad():
        return model.eval()(Sequences().val.tensors[0])


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize(("text", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_of_every_group_of_inputs_so_many_are_kept(method, text, kept, group):
    found = weights(pruned(method(text)))
    assert len(found) == 8
    for weight in found.values():
        assert ((weight.unflatten(1, (-1, group)) != 0).sum(-1) <= kept).all()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_density_is_what_was_asked_for(method, sparsity):
    for weight in weights(pruned(method(sparsity))).values():
        assert (weight == 0).float().mean().item() == pytest.approx(sparsity, abs=1e-3)


def test_layers_outside_the_blocks_stay_dense_unless_they_are_named():
    assert not {"embed", "head"} & weights(pruned(MagnitudePruning())).keys()
    found = weights(pruned(MagnitudePruning("2:4", overrides={"head": 0.25, "fc2": "4:8"}, skip=["blocks.0.*"])))
    assert found.keys() == {"head"} | {f"blocks.1.{name}" for name in ("qkv", "proj", "fc1", "fc2")}
    assert (found["head"] == 0).float().mean() == 0.25


def test_a_model_without_blocks_is_pruned_throughout():
    model = NoDropout()
    model.blocks = nn.ModuleList()
    assert weights(pruned(MagnitudePruning(), model=model)).keys() == {"embed", "head"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [MagnitudePruning, Wanda, SparseGPT])
def test_convolutions_are_pruned_as_rows_of_channels_and_taps(kind, groups):
    layer = quantize_layer(nn.Conv2d(8, 6, 3, groups=groups), None, None, Pattern.parse("2:4"))
    hessian, solver = Hessian.of(layer), kind("2:4")
    hessian.add(input_rows(layer, torch.randn(5, 8, 7, 7)))
    solver.patterns = {"conv": Pattern.parse("2:4")}
    solver.solve("conv", layer, hessian)
    assert ((layer.quantized().flatten(1).unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()


# ---------------------------------------------------------------- refusals


def test_rows_that_have_no_room_for_a_pattern_are_refused_before_anything_changes(method):
    model = NoDropout()
    with pytest.raises(ValueError, match=r"`blocks.0.qkv` cannot be pruned 5:10: its rows of 16 .*skip="):
        validate(model, method("5:10"))
    assert not layers(model)


def test_weights_that_are_not_finite_are_named(method, tmp_path):
    model = NoDropout()
    with torch.no_grad():
        model.blocks[1].fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"`blocks.1.fc1.weight` holds NaN"):
        validate(model, method(), default_root_dir=tmp_path)  # where a later run would go on
    assert not layers(model)


@pytest.mark.parametrize("callback", [Wanda, SparseGPT, SparsityInduction])
def test_what_is_solved_block_after_block_says_where_the_rest_is_pruned(callback):
    with pytest.raises(ValueError, match=r"`head` lies outside the blocks.*MagnitudePruning\(target='head'\)"):
        validate(NoDropout(), callback(overrides={"head": 0.5}, **QUICK))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"host": "gptq"}, "host"), ({"init": "zeros"}, "init"), ({"lr": 0}, "lr"), ({"pattern": 2}, "pattern")],
)
def test_arguments_are_checked_at_once(arguments, says):
    with pytest.raises(ValueError, match=says):
        SparsityInduction(**arguments)


# ---------------------------------------------------------------- which weights


def test_pruned_are_the_smallest_of_each_layer_and_the_rest_is_as_it_was():
    model = NoDropout()
    before = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    for name, weight in weights(pruned(MagnitudePruning(), model=model)).items():
        gone = weight == 0
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
        assert torch.equal(weight[~gone], before[name][~gone])


def test_sparsegpt_errs_less_than_wanda_and_that_less_than_magnitude():
    torch.manual_seed(0)
    x = torch.randn(500, 32) @ torch.randn(32, 32) * torch.logspace(-0.7, 0.7, 32)
    linear = nn.Linear(32, 24)
    for text in ("2:4", "0.5"):
        errors = []
        for method in (SparseGPT(text), Wanda(text), MagnitudePruning(text)):
            layer = quantize_layer(copy.deepcopy(linear), None, None, Pattern.parse(text))
            hessian = Hessian.of(layer)
            hessian.add(x)
            method.patterns = {"linear": Pattern.parse(text)}
            method.solve("linear", layer, hessian)
            errors.append(float(output_error(linear.weight, layer.quantized(), hessian.matrix()).sum()))
        assert errors[0] < errors[1] < errors[2]


def test_the_correction_makes_the_mean_output_of_a_layer_what_it_was():
    """With no step learned the shift is the mean of the inputs."""
    model = NoDropout()
    validate(model, SparsityInduction(0.5, host="magnitude", epochs=0, calibration_samples=64))
    first, seen = model.blocks[0].qkv, []
    handle = first.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model.eval()(Sequences().train.tensors[0])
        handle.remove()
        x, found = seen[0]
        exact = nn.functional.linear(x, first.weight, first.bias)
    torch.testing.assert_close(found.mean((0, 1)), exact.mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert (found - exact).abs().max() > 1e-2


def test_learning_lowers_the_error_of_each_block():
    callback = SparsityInduction(0.5, host="magnitude", epochs=8, lr=0.05, calibration_samples=64)
    validate(NoDropout(), callback)
    assert callback.curves.keys() == {"blocks.0", "blocks.1"}
    for curve in callback.curves.values():
        assert curve[-1] < 0.95 * curve[0]


# ---------------------------------------------------------------- the way back, and files


def test_remove_gives_the_dense_model_back_bit_for_bit(method):
    model, callback = NoDropout(), method("2:4")
    state, want = copy.deepcopy(model.state_dict()), outputs(model)
    validate(model, callback)
    assert not torch.equal(outputs(model), want)
    with as_float(model):
        assert torch.equal(outputs(model), want)
    callback.remove(model)
    assert torch.equal(outputs(model), want) and type(model.blocks[0].fc1) is nn.Linear
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_and_a_folder_bring_the_same_model(method, tmp_path):
    model, callback = NoDropout(), method()
    run = trainer(callback)
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(tmp_path / "pruned.ckpt")
    assert validate(NoDropout(), method(), ckpt_path=tmp_path / "pruned.ckpt") == metrics
    save_quantized(model, tmp_path / "folder")
    fresh = NoDropout()
    load_quantized(fresh, tmp_path / "folder")
    assert torch.equal(outputs(fresh), outputs(model))
    dense, stored = (NoDropout().state_dict(), (tmp_path / "folder" / "model.safetensors").stat().st_size)
    assert stored < 0.8 * sum(value.nbytes for value in dense.values())  # half of most weights, and a bit for each


def test_a_fit_trains_what_is_kept_and_zeros_stay(method):
    model = pruned(method("2:4"))
    before = weights(model)
    trainer(method("2:4"), max_epochs=1).fit(model, datamodule=Sequences())
    for name, weight in weights(model).items():
        assert torch.equal(weight == 0, before[name] == 0), name
        assert not torch.equal(weight, before[name])


def test_a_killed_run_goes_on_at_its_block(tmp_path):
    class Killed(SparseGPT):
        def solve(self, name, *rest):
            if name == "blocks.1.proj" and self.state_dir and not (tmp_path / "again").exists():
                raise KeyboardInterrupt
            return super().solve(name, *rest)

    how = {"state_dir": str(tmp_path / "state"), **QUICK}
    with pytest.raises(BaseException):  # noqa: B017, PT011  Lightning may exit
        validate(NoDropout(), Killed("2:4", **how))
    assert list((tmp_path / "state").rglob("0.pt"))
    (tmp_path / "again").touch()
    found = weights(pruned(Killed("2:4", **how)))
    want = weights(pruned(SparseGPT("2:4", **QUICK)))
    assert all(torch.equal(found[name], weight) for name, weight in want.items())


def test_plan_tells_patterns_and_sizes():
    plan = MagnitudePruning("2:4").plan(NoDropout(), next(iter(Sequences().train_dataloader())))
    row = next(row for row in plan.layers if row.name == "blocks.0.fc1")
    assert row.weights == "pruned 2:4" and row.bytes == row.float_bytes // 2 + 16 * 64 // 8
    assert Plan.from_dict(plan.plan.to_dict()) == plan.plan


def test_it_is_told_apart_from_quantization_when_a_layer_is_pruned_twice():
    model = pruned(MagnitudePruning())
    with pytest.raises(ValueError, match=r"`blocks.0.qkv` is pruned already"):
        validate(model, Wanda(**QUICK))
    validate(model, PostTrainingQuantization("int8", None))


@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
def test_two_ranks_prune_as_one_does(kind, tmp_path):
    one, *two = states_after(lambda: [kind(0.5, calibration_samples=64)], tmp_path, model=NoDropout)
    for states, dense in two:
        assert all(torch.equal(value, one[1][name]) for name, value in dense.items())
        for name, state in one[0].items():
            assert torch.equal(state["keep"], states[name]["keep"]), name
            if "offset" in state:
                torch.testing.assert_close(states[name]["offset"], state["offset"])


def test_two_ranks_learn_the_same_factors(tmp_path):
    _, first, second = states_after(
        lambda: [SparsityInduction(0.5, host="magnitude", epochs=1, calibration_samples=64)], tmp_path, model=NoDropout
    )
    assert_equal(first[0], second[0])
