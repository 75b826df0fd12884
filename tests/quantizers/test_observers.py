from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.quantizers import Observer, RangeRule, build_quantizer, refuse_nonfinite

RULES = ["minmax", "percentile", "mse", "lp", "percentile_mse", "running", "kl"]
SEARCHES = [rule for rule in RULES if rule != "running"]


def observer_for(text="int4_asym", rule="mse", axis=None):
    return Observer(build_quantizer(text, axis), rule, "blocks.0.fc1")


def frozen_state(observer):
    observer.freeze()
    return {key: value.clone() for key, value in observer.quantizer.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def observe(batches, **kwargs):
    observer = observer_for(**kwargs)
    for batch in batches:
        observer(batch)
    return observer


# ---------------------------------------------------------------- what it sees


def test_hands_on_the_very_tensor():
    observer, x = observer_for(), torch.randn(3, 4)
    assert observer(x) is x
    assert observer.seen == 12
    observer(torch.empty(0, 4))
    assert observer.seen == 12


@pytest.mark.parametrize("text", ["int4_asym", "int8_sym", "fp8_e4m3"])
def test_minmax_equals_a_fit_on_everything(text):
    batches = torch.randn(6, 5, 7).unbind()
    observer = observe(batches, text=text, rule="minmax")
    fitted = build_quantizer(text)
    fitted.fit(torch.stack(batches), "minmax")
    assert_same(frozen_state(observer), fitted.state_dict())


@pytest.mark.parametrize("rule", ["percentile", "mse", "lp", "percentile_mse"])
@pytest.mark.parametrize(("text", "axis"), [("int4_asym", None), ("fp4_e2m1", None), ("int4_sym_channel", -1)])
def test_histogram_search_is_nearly_the_exact_one(rule, text, axis):
    batches = (torch.randn(8, 50, 40, 3) * torch.tensor([1.0, 5.0, 0.1])).unbind()
    observer = observe(batches, text=text, rule=rule, axis=axis)
    observer.freeze()
    exact = build_quantizer(text, axis)
    x = torch.stack(batches)
    exact.fit(x, rule)
    ours, theirs = (float((quantizer(x) - x).square().mean()) for quantizer in (observer.quantizer, exact))
    assert ours <= theirs * 1.02


@pytest.mark.parametrize("rule", ["minmax", "percentile", "percentile_mse", "mse"])
def test_probabilities_for_a_log_quantizer(rule):
    batches = torch.softmax(torch.randn(4, 20, 30, 30) * 3, -1).unbind()
    observer = observe(batches, text="logsqrt2_4", rule=rule)
    observer.freeze()
    exact = build_quantizer("logsqrt2_4")
    exact.fit(torch.stack(batches), rule)
    assert float(observer.quantizer.scale) == pytest.approx(float(exact.scale), rel=0.02)


def test_running_is_the_moving_average_of_batch_extremes():
    batches = [torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 2.0]), torch.tensor([0.0, 11.0])]
    observer = observe(batches, text="int8_asym", rule="running")
    observer.freeze()
    lo = -1.0 * 0.9 * 0.9 - 3.0 * 0.1 * 0.9
    hi = (1.0 * 0.9 + 2.0 * 0.1) * 0.9 + 11.0 * 0.1
    assert float(observer.quantizer.scale) == pytest.approx((hi - lo) / 255)
    fast = observe(batches, text="int8_asym", rule=RangeRule("running", momentum=1.0))
    fast.freeze()
    assert float(fast.quantizer.scale) == pytest.approx(11 / 255)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_observed_in_float32(dtype):
    x = torch.randn(200).to(dtype)
    assert_same(frozen_state(observe([x])), frozen_state(observe([x.float()])))


# ---------------------------------------------------------------- order and ranks


@pytest.mark.parametrize("rule", SEARCHES)
@pytest.mark.parametrize(("text", "axis"), [("int4_asym", None), ("int4_sym_channel", -1), ("logsqrt2_4", None)])
def test_two_ranks_in_either_order_freeze_what_one_process_does(rule, text, axis):
    scales = torch.logspace(-3, 2, 8).view(8, 1, 1)  # the range grows, so bins merge on the way
    batches = (torch.randn(8, 11, 5).abs() * scales).unbind()
    kwargs = {"text": text, "rule": rule, "axis": axis}
    single = frozen_state(observe(batches, **kwargs))
    assert_same(frozen_state(observe(batches[::-1], **kwargs)), single)
    assert_same(frozen_state(observe([torch.cat(batches)], **kwargs)), single)
    ranks = [observe(batches[0::2], **kwargs), observe(batches[1::2], **kwargs), observe([], **kwargs)]
    states = [rank.state() for rank in ranks]
    for order in ([0, 1, 2], [2, 1, 0]):
        merged = observer_for(**kwargs)
        for rank in order:
            merged.merge(states[rank])
        assert merged.seen == sum(batch.numel() for batch in batches)
        assert_same(frozen_state(merged), single)


def test_running_takes_the_ranks_of_a_step_as_one_batch():
    batches = torch.randn(7, 6).unbind()
    ranks = [observe(batches[0::2], rule="running").state(), observe(batches[1::2], rule="running").state()]
    steps = [torch.cat(batches[i : i + 2]) for i in range(0, 7, 2)]
    single = frozen_state(observe(steps, rule="running"))
    for order in (ranks, ranks[::-1]):
        merged = observer_for(rule="running")
        for state in order:
            merged.merge(state)
        assert_same(frozen_state(merged), single)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 39))
def test_any_cut_of_the_stream(seed, cut):
    x = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    merged = observe([x[:cut]])
    merged.merge(observe([x[cut:]]).state())
    assert_same(frozen_state(merged), frozen_state(observe([x])))


def test_state_travels_through_a_file():
    observer = observe(torch.randn(3, 40).unbind())
    buffer = io.BytesIO()
    torch.save(observer.state(), buffer)
    buffer.seek(0)
    resumed = observer_for()
    resumed.merge(torch.load(buffer, weights_only=True))
    rest = torch.randn(40) * 3
    observer(rest)
    resumed(rest)
    assert_same(frozen_state(resumed), frozen_state(observer))


@pytest.mark.parametrize("rule", SEARCHES)
def test_memory_is_flat_in_the_number_of_batches(rule):
    def size(observer):
        return sum(value.numel() for value in observer.state().values() if isinstance(value, torch.Tensor))

    batches = torch.randn(60, 9, 4).unbind()
    kwargs = {"text": "int8_channel", "rule": rule, "axis": -1}
    assert size(observe(batches[:2], **kwargs)) == size(observe(batches, **kwargs)) < 4 * 1100


def test_copies_are_independent():
    quantizer = build_quantizer("int8")
    quantizer.observer = Observer(quantizer, "minmax")
    twin = copy.deepcopy(quantizer)
    twin(torch.tensor([1.0, 2.0]))
    assert twin.observer.seen == 2
    assert twin.observer.quantizer is twin
    assert quantizer.observer.seen == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("text", "axis"), [("int8", None), ("int8_channel", -1)])
def test_nonfinite_batches_are_refused_by_name_and_leave_no_trace(bad, text, axis):
    observer = observe([torch.ones(2, 3)], text=text, axis=axis)
    x = torch.randn(4, 3)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1 met NaN or infinity"):
        observer(x)
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1 met NaN or infinity"):
        refuse_nonfinite(x, "blocks.0.fc1")
    assert observer.seen == 6
    assert_same(frozen_state(observer), frozen_state(observe([torch.ones(2, 3)], text=text, axis=axis)))


def test_nothing_seen():
    observer = observer_for()
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1 saw no calibration data"):
        observer.freeze()
    assert not observer.quantizer.calibrated


@pytest.mark.parametrize("text", ["int8_dynamic", "int8_token", "int8_g4"])
def test_formats_without_a_range_to_observe(text):
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1 has format"):
        observer_for(text, axis=0)
