"""What every metric promises, over one table."""

import copy
import pickle
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from lightning_quant import metrics
from lightning_quant.metrics import (
    SQNR,
    CosineFidelity,
    NegativeFlipRate,
    PositiveFlipRate,
    PredictionDivergence,
    TopOneAgreement,
)


class Case(NamedTuple):
    metric: type
    function: callable
    labels: bool = False
    equal: float = 1.0  # of a model with itself


CASES = {
    "sqnr": Case(SQNR, metrics.sqnr, equal=float("inf")),
    "cosine": Case(CosineFidelity, metrics.cosine_fidelity),
    "divergence": Case(PredictionDivergence, metrics.prediction_divergence, equal=0.0),
    "agreement": Case(TopOneAgreement, metrics.top_one_agreement),
    "negative flips": Case(NegativeFlipRate, metrics.negative_flip_rate, labels=True, equal=0.0),
    "relative negative flips": Case(
        partial(NegativeFlipRate, relative=True), partial(metrics.negative_flip_rate, relative=True), True, 0.0
    ),
    "positive flips": Case(PositiveFlipRate, metrics.positive_flip_rate, labels=True, equal=0.0),
}


@pytest.fixture(params=CASES.values(), ids=[name.replace(" ", "_") for name in CASES])
def case(request):
    return request.param


def outputs(samples, noise=1.0, seed=0):
    """Class scores of a quantized model and its twin (N, 5, 3), and labels (N, 5)."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(samples, 5, 3, generator=generator)
    quantized = reference + noise * torch.randn(reference.shape, generator=generator)
    return quantized, reference, torch.randint(3, (samples, 5), generator=generator)


def arguments(case, *args, **kwargs):
    return outputs(*args, **kwargs)[: 3 if case.labels else 2]


def test_batches_of_any_size_add_up_to_all_at_once(case):
    batches, metric = [arguments(case, n, seed=n) for n in (7, 1, 4)], case.metric()
    for batch in batches:
        metric.update(*batch)
    at_once = case.function(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(at_once.item(), rel=1e-12)


def test_forward_gives_the_batch_and_compute_all(case):
    first, second, metric = arguments(case, 7), arguments(case, 4, seed=1), case.metric()
    assert metric(*first) == case.function(*first)
    assert metric(*second) == case.function(*second)
    both = case.function(*map(torch.cat, zip(first, second, strict=True)))
    assert metric.compute().item() == pytest.approx(both.item(), rel=1e-12)
    metric.reset()
    assert metric(*second) == case.function(*second)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=2), st.integers(0, 9))
def test_ranks_add_up_whatever_each_has_seen(sizes, seed):
    for case in CASES.values():
        if sum(sizes) == 0:
            continue
        parts = [arguments(case, n, seed=seed + n) for n in sizes]
        ranks = [case.metric() for _ in parts]
        for rank, part in zip(ranks, parts, strict=True):
            if len(part[0]):
                rank.update(*part)
        assert all(
            reduction is torch.sum or reduction.__name__ == "dim_zero_sum"
            for reduction in ranks[0]._reductions.values()
        )
        merged = case.metric()
        for name in merged._defaults:
            setattr(merged, name, getattr(ranks[0], name) + getattr(ranks[1], name))
        merged._update_count = 1
        whole = case.function(*(torch.cat(both) for both in zip(*parts, strict=True)))
        assert merged.compute().item() == pytest.approx(whole.item(), rel=1e-12, nan_ok=True)


def test_a_model_equals_itself(case):
    quantized, *rest = arguments(case, 6)
    assert case.function(quantized, quantized, *rest[1:]) == case.equal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(case, dtype):
    quantized, reference, *labels = arguments(case, 5)
    quantized, reference = (300 * each for each in (quantized, reference))  # squares that float16 does not hold
    half = quantized.to(dtype), reference.to(dtype)
    want = case.function(half[0].double(), half[1].double(), *labels)
    metric = case.metric()
    metric.update(*half, *labels)
    assert metric.compute().isfinite() and metric.compute().item() == pytest.approx(want.item(), rel=1e-6)


def test_nothing_seen_is_nan_and_torchmetrics_warns(case):
    if case.metric is not CASES["relative negative flips"].metric:
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            assert case.metric().compute().isnan()
    quantized, reference, *labels = arguments(case, 3)
    assert case.function(quantized[:0], reference[:0], *(each[:0] for each in labels)).isnan()


def test_other_shapes_do_not_broadcast(case):
    quantized, reference, *labels = arguments(case, 4)
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\), its reference \(1, 5, 3\)"):
        case.metric().update(quantized, reference[:1], *labels)


def test_gradients_are_as_declared(case):
    quantized, *rest = arguments(case, 4)
    metric = case.metric()
    value = metric(quantized.requires_grad_(), *rest)
    assert value.requires_grad == metric.is_differentiable
    if metric.is_differentiable:
        value.backward()
        assert quantized.grad.isfinite().all() and quantized.grad.abs().sum() > 0
        inputs = quantized[:2].detach().double().requires_grad_(), rest[0][:2].double()
        assert torch.autograd.gradcheck(lambda x: case.function(x, inputs[1]), inputs[0])


def test_higher_is_better_as_declared(case):
    near, far = (case.function(*arguments(case, 200, noise=noise)) for noise in (0.1, 3.0))
    if "positive" not in str(case.function):  # noise mends little where there is little wrong
        assert (near > far) == case.metric().higher_is_better


def test_is_within_its_plot_bounds_and_plots(case):
    metric = case.metric()
    metric.update(*arguments(case, 20))
    lower, upper = metric.plot_lower_bound, metric.plot_upper_bound
    assert (lower is None or metric.compute() >= lower) and (upper is None or metric.compute() <= upper)
    figure, axis = metric.plot()
    assert axis.get_figure() is figure
    metric.plot([metric.compute(), metric.compute()], ax=axis)


def test_pickle_copy_and_inference_mode(case):
    metric, data = case.metric(), arguments(case, 5)
    with torch.inference_mode():
        metric.update(*data)
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        twin.update(*data)  # outside inference mode now
        assert twin.compute() == case.function(*(torch.cat([each, each]) for each in data))


def test_a_collection_keeps_them_apart_and_the_flips_once():
    quantized, reference, target = outputs(9)
    reference = quantized.clone()  # the states of several metrics happen to be equal in the first batch
    collection = MetricCollection({name.replace(" ", "_"): case.metric() for name, case in CASES.items()})
    collection.update(quantized=quantized, reference=reference, target=target)
    second = outputs(8, seed=1)
    collection.update(quantized=second[0], reference=second[1], target=second[2])
    both = [torch.cat(parts) for parts in zip((quantized, reference, target), second, strict=True)]
    for name, case in CASES.items():
        want = case.function(*both[: 3 if case.labels else 2])
        assert collection.compute()[name.replace(" ", "_")].item() == pytest.approx(want.item(), rel=1e-12)
    assert sorted(map(len, collection.compute_groups.values())) == [1, 1, 1, 1, 3]
