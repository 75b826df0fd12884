"""Tables with a row for each step: against a plain quantizer for each, in mixed batches, and what they refuse."""

import pytest
import torch

from lightning_quant.quantizers import Observer, StepObserver, StepQuantizer, Steps, UniformQuantizer

TIMESTEPS = [999, 666, 333, 0]


def table(scheme="int4_asym", axis=-1, groups=None):
    steps = Steps(TIMESTEPS, groups)
    quantizer = StepQuantizer(scheme, axis, steps)
    width = steps.groups if quantizer.scheme.granularity == "tensor" else (steps.groups, 3)
    lo = -torch.rand(width)
    quantizer.freeze_rows(lo, lo + 1 + torch.rand(width))
    return quantizer


@pytest.mark.parametrize("scheme", ["int4_asym", "int5_sym", "uint4_asym_channel"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (8, 5, 3)], ids=["rows", "tokens", "two windows each"])
def test_a_mixed_batch_is_each_sample_at_its_own_step(scheme, shape):
    quantizer = table(scheme)
    x, mixed = torch.randn(shape), [333.0, 999.0, 0.0, 999.0]
    quantizer.steps.enter(mixed)
    together, codes = quantizer(x), quantizer.encode(x)
    each = shape[0] // 4
    for sample, timestep in enumerate(mixed):
        quantizer.steps.enter([timestep])
        own = slice(sample * each, (sample + 1) * each)
        row = TIMESTEPS.index(timestep)
        plain = UniformQuantizer(scheme, -1)
        plain.scale, plain.zero_point = quantizer.scale[row], quantizer.zero_point[row]
        assert torch.equal(together[own], quantizer(x[own])) and torch.equal(quantizer(x[own]), plain(x[own]))
        assert torch.equal(codes[own], plain.encode(x[own]))


def test_channels_of_a_convolution_are_axis_one():
    quantizer = table("int4_asym_channel", 1)
    x = torch.randn(2, 3, 5, 5)
    quantizer.steps.enter([0.0, 666.0])
    together = quantizer(x)
    for sample, timestep in enumerate((0.0, 666.0)):
        quantizer.steps.enter([timestep])
        assert torch.equal(together[sample : sample + 1], quantizer(x[sample : sample + 1]))


def test_a_batch_that_is_not_along_the_first_axis_is_refused():
    quantizer = table()
    quantizer.steps.enter([0.0, 666.0])
    with pytest.raises(ValueError, match=r"2 samples at different steps has a tensor of shape \(3, 2\)"):
        quantizer(torch.randn(3, 2))


def test_gradients_pass_straight_through_inside_the_range():
    quantizer = table()
    quantizer.steps.enter([0.0, 666.0])
    x = torch.tensor([[0.1, 50.0], [0.1, 0.2]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_what_is_observed_at_a_step_sets_its_row(rule):
    steps = Steps(TIMESTEPS)
    quantizer = StepQuantizer("int8_asym", -1, steps)
    observer = StepObserver(quantizer, rule)
    x = torch.randn(2, 50) * torch.tensor([[1.0], [10.0]])
    steps.enter([999.0, 0.0])
    observer(x)
    steps.enter([999.0])
    observer(x[:1] / 2)
    observer.freeze()
    for row, seen in ((0, [x[:1], x[:1] / 2]), (3, [x[1:]])):
        plain = UniformQuantizer("int8_asym", -1)
        alone = Observer(plain, rule)
        for batch in seen:
            alone(batch)
        alone.freeze()
        assert quantizer.scale[row] == plain.scale and quantizer.zero_point[row] == plain.zero_point
    assert quantizer.scale[1] == quantizer.scale[0] and quantizer.scale[2] == quantizer.scale[3]  # the nearest step met


def test_two_ranks_observe_what_one_does():
    steps = Steps(TIMESTEPS)
    x = torch.randn(4, 9)
    tables = []
    for dealt in ([[0, 1, 2, 3]], [[0, 2], [3, 1]]):
        quantizer = StepQuantizer("int8_asym", -1, steps)
        observers = []
        for rows in dealt:
            observers.append(StepObserver(quantizer, "mse"))
            steps.enter([float(TIMESTEPS[row]) for row in rows])
            observers[-1](x[rows])
        for other in observers[1:]:
            observers[0].merge(other.state())
        observers[0].freeze()
        tables.append(quantizer.scale)
    assert torch.equal(*tables)


def test_groups_are_steps_that_follow_each_other():
    steps = Steps(range(9, -1, -1), groups=3)
    rows = []
    for timestep in steps.timesteps:
        steps.enter([timestep])
        rows += steps.rows
    assert rows == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_timestep_that_comes_twice_is_one_step():
    assert Steps([900, 800, 800, 700]).groups == 3  # as PLMS has it


def test_another_timestep_is_refused():
    with pytest.raises(ValueError, match=r"scales for 4 steps \(999, 666, 333, 0\), and is asked for the timestep 500"):
        table().steps.enter([999.0, 500.0])


def test_another_schedule_is_refused_though_its_timesteps_are_known():
    with pytest.raises(ValueError, match=r"asked for 2 steps \(999, 333\).*call remove\(model\).*trainer.validate"):
        table().steps.require([999, 333])


def test_a_table_comes_back_from_its_state_and_refuses_that_of_another_schedule():
    quantizer, other = table(), StepQuantizer("int4_asym", -1, Steps(TIMESTEPS))
    other.load_state_dict(quantizer.state_dict())
    x = torch.randn(1, 3)
    assert torch.equal(quantizer(x), other(x))
    with pytest.raises(ValueError, match="asked for 4 steps"):
        StepQuantizer("int4_asym", -1, Steps([900, 600, 300, 0])).load_state_dict(quantizer.state_dict())


def test_formats_without_a_stored_scale_are_refused():
    with pytest.raises(ValueError, match="no scale that could depend on the step"):
        StepQuantizer("int8_token", -1, Steps(TIMESTEPS))
    with pytest.raises(ValueError, match="4 steps has no 5 groups"):
        Steps(TIMESTEPS, 5)
