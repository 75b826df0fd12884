from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision, BinaryRecall

from lightning_quant.calibration import undisturbed
from tests.calibration.runs import Net, in_validate


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
        self.frozen = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
        self.frozen.requires_grad_(False)
        self.mean, self.all = MeanMetric(), CatMetric()
        self.pair = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryAccuracy()])

    def forward(self, x):
        y = self.frozen(self.body(x))
        self.mean.update(y)
        self.all.update(y)
        self.pair.update(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 0]))
        return y


def everything(model):
    recall = model.pair["BinaryRecall"]
    return {
        "flags": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "state": {name: value.tolist() for name, value in model.state_dict().items()},
        "counts": [model.mean.update_count, model.all.update_count],
        "metrics": [model.mean.mean_value.item(), [part.tolist() for part in model.all.value]],
        "pair": [model.pair.compute_groups, recall.update_count, recall.tp.item()],
        "random": [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],
        "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
    }


def disturb(model):
    model(torch.rand(4, 3))
    model.mean.compute()
    random.random()
    np.random.rand()
    model.body.train()


@pytest.mark.parametrize("updates", [0, 1, 2])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("exception", [None, KeyboardInterrupt, ValueError])
def test_everything_is_as_it_was(updates, grad, exception):
    model = Model()
    for _ in range(updates):
        model(torch.rand(4, 3))
    before = everything(model)
    try:
        with undisturbed(model, grad=grad):
            disturb(model)
            if exception:
                raise exception
    except (KeyboardInterrupt, ValueError):
        assert exception
    assert everything(model) == before


def test_the_metrics_of_a_collection_still_share_their_state_afterwards():
    disturbed, model = Model(), Model()
    for each in (disturbed, model):
        each(torch.rand(4, 3))
        each(torch.rand(4, 3))
    with undisturbed(disturbed):
        disturbed(torch.rand(4, 3))
    for each in (disturbed, model):
        each(torch.rand(4, 3))
    assert disturbed.pair.compute() == model.pair.compute()


def test_a_cached_result_stays():
    model = Model()
    model.mean.update(3.0)
    assert model.mean.compute() == 3
    with undisturbed(model):
        model.mean.update(5.0)
        assert model.mean.compute() == 4
    assert model.mean.compute() == 3


class InPlace(Metric):
    """Writes into its state tensor, where most metrics put a new one in its place."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(2))

    def update(self, value):
        self.total += value

    def compute(self):
        return self.total.tolist()


def test_a_state_that_is_written_to_in_place_has_its_content_back():
    model = nn.ModuleDict({"metric": InPlace()})
    model["metric"].update(3.0)
    state = model["metric"].total
    with undisturbed(model):
        model["metric"].update(5.0)
    assert model["metric"].total is state
    assert model["metric"].compute() == [3, 3]


def test_inside_all_is_in_eval_mode_and_gradients_are_as_asked():
    model = Model()
    for grad in (False, True):
        with undisturbed(model, grad=grad):
            assert not any(module.training for module in model.modules())
            assert torch.is_grad_enabled() is grad


def test_a_new_module_takes_its_parents_flag_and_a_swapped_one_that_comes_back_its_own():
    model = Model()
    original = model.body[2]
    with undisturbed(model):
        model.body[2] = nn.Sequential(nn.Dropout())
        model.frozen.append(nn.Dropout())
    assert model.body[2].training
    assert model.body[2][0].training
    assert not model.frozen[-1].training
    assert original.training


class TestGradients:
    def test_only_what_is_new_learns_and_the_old_gradients_are_kept(self):
        model = Model()
        model(torch.rand(4, 3)).sum().backward()
        weight = model.body[0].weight
        kept, content = weight.grad, weight.grad.clone()
        with undisturbed(model, grad=True):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            scale = torch.ones(3, requires_grad=True)
            weight.requires_grad_(True)
            (model(torch.rand(4, 3)) * scale).sum().backward()
            assert scale.grad is not None
            assert weight.grad is not None
        assert weight.grad is kept
        assert torch.equal(kept, content)

    def test_inside_validate(self):
        """A single process validates in inference mode, where nothing could be trained."""

        def train(trainer, module):
            outside = torch.is_inference_mode_enabled()
            with undisturbed(module, grad=True):
                scale = torch.ones(3, requires_grad=True)
                module(torch.ones(2, 3) * scale).sum().backward()
            return outside, torch.is_inference_mode_enabled(), scale.grad.is_inference()

        assert in_validate(train, Net()) == (True, True, False)

    def test_a_metric_that_was_updated_in_inference_mode(self):
        model = Model()
        with torch.inference_mode():
            model.mean = MeanMetric()
            model.mean.update(3.0)
            with undisturbed(model, grad=True):
                model.mean.reset()
                model.mean.update(9.0)
            assert model.mean.compute() == 3
