"""OSAQ rounds with what the null space absorbs, row by row where that helps."""

import pytest
import torch

from lightning_quant import GPTQ, OSAQ, MagnitudePruning
from lightning_quant.calibration import Hessian
from lightning_quant.layers import quantize_layer
from lightning_quant.quantizers import Scheme
from lightning_quant.solvers import output_error
from tests.callbacks.test_gptq import codes, validated
from tests.models import Sequences, TinyTransformer, trainer
from tests.solvers.test_null_space import layer

W2 = {"weights": "int2_channel", "calibration_samples": 64}


def solved(callback, weights="int2_asym_channel", planted=None):
    """One linear layer solved by a callback, and its squared error on the inputs."""
    weight, x, _ = planted or layer()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight.float()
    twin = quantize_layer(linear, Scheme.parse(weights), None)
    statistics = Hessian.of(twin)
    statistics.add(x.unsqueeze(0))
    notes = callback.solve("linear", twin, statistics)
    twin.eval()
    return output_error(weight, twin.quantized().detach().double(), statistics.matrix()), notes


@pytest.mark.parametrize("solver", ["gptq", "nearest"])
def test_no_row_errs_more_than_without_and_many_err_less(solver):
    errors, notes = solved(OSAQ(weights="int2_channel", solver=solver))
    plain = OSAQ(weights="int2_channel", solver=solver, gamma=0.0)  # no direction is allowed
    before, nothing = solved(plain)
    assert (errors <= before * (1 + 1e-6)).all() and errors.sum() < 0.8 * before.sum()
    assert notes["accepted"] > 0.5 and notes["null_space"] > 0.3 and notes["reach"] < 0.8
    assert 0 < notes["perturbation"] < 2e-3
    assert nothing["perturbation"] == 0


def test_most_directions_serve_where_none_is_free():
    weight, x, other = layer(decay=2)
    free, weighed = (
        solved(OSAQ(weights="int2_channel", **how), planted=(weight, x, other))
        for how in ({"gamma": 1e-3, "mu3": 0.0}, {})
    )
    assert weighed[1]["null_space"] == free[1]["null_space"] < 0.1
    assert weighed[0].sum() < 0.95 * free[0].sum()


def test_one_scale_for_all_rows_is_one_decision():
    _, notes = solved(OSAQ(weights="int2_tensor"), "int2_asym_tensor")
    assert notes["accepted"] in (0.0, 1.0)


def test_by_the_largest_weight_or_always():
    for accept, least in (("max", 0.8), ("always", 1.0)):
        errors, notes = solved(OSAQ(weights="int2_channel", accept=accept))
        assert notes["accepted"] >= least
        assert errors.sum() < solved(GPTQ("int2_channel"))[0].sum()


def test_without_a_null_space_it_is_gptq():
    planted = layer(decay=0)
    ours, plain = (solved(callback, planted=planted)[0] for callback in (OSAQ(**W2, gamma=1e-3), GPTQ(**W2)))
    assert torch.equal(ours, plain)


def test_in_a_model():
    callback = OSAQ(**W2)
    model = validated(callback)
    assert sorted(codes(model)) == sorted(callback.solved)
    assert all(0 <= notes["null_space"] < 1 for notes in callback.solved.values())


def test_a_null_space_of_too_few_tokens_is_refused():
    with pytest.raises(ValueError, match=r"`blocks\.0\.qkv`: 40 calibration tokens for 16 inputs.*min_tokens=4"):
        validated(OSAQ("int2_channel", calibration_samples=8))
    validated(OSAQ("int2_channel", calibration_samples=8, min_tokens=0))


def test_it_comes_before_pruning():
    model = TinyTransformer().eval()
    with pytest.raises(ValueError, match="put OSAQ before MagnitudePruning"):
        trainer(MagnitudePruning("2:4"), OSAQ(**W2)).validate(model, datamodule=Sequences(), verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"solver": "best"}, "solver='best'"), ({"accept": "never"}, "accept='never'"), ({"tau": 0}, "tau=0"),
     ({"gamma": 1.0}, "gamma=1.0")],
)  # fmt: skip
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        OSAQ(**arguments)
