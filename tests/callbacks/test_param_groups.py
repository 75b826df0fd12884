"""Scales in the groups of optimizers, and what schedulers make of them."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_quant.callbacks.param_groups import group_scales


def parameters():
    """Two weights, and a scale for each."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    scales = [nn.Parameter(torch.ones(())) for _ in range(2)]
    return weights, {
        f"{i}.scale": (scale, weight) for i, (scale, weight) in enumerate(zip(scales, weights, strict=True))
    }


def held(optimizer):
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


def ids(*tensors):
    return [id(tensor) for tensor in tensors]


def test_what_is_held_without_weight_decay_stays():
    (a, b), scales = parameters()
    everything = [a, b, *(scale for scale, _ in scales.values())]
    optimizer = SGD(everything, 0.1)
    group_scales([optimizer], [], scales)
    assert held(optimizer) == [ids(*everything)]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("lr", [None, 0.02])
def test_what_is_held_with_weight_decay_moves(named, lr):
    (a, b), scales = parameters()
    (first, _), (second, _) = scales.values()
    everything = {"a": a, "0.scale": first, "b": b, "1.scale": second}
    optimizer = AdamW(everything.items() if named else everything.values(), 0.1, betas=(0.8, 0.9))
    group_scales([optimizer], [], scales, lr)
    assert held(optimizer) == [ids(a, b), ids(first, second)]
    weights, moved = optimizer.param_groups
    assert weights["weight_decay"] == 0.01 and moved["weight_decay"] == 0 and moved["betas"] == (0.8, 0.9)
    assert weights["lr"] == 0.1 and moved["lr"] == (lr or 0.1)
    assert not named or (weights["param_names"], moved["param_names"]) == (["a", "b"], ["0.scale", "1.scale"])
    sum(p.square().sum() for p in everything.values()).backward()
    optimizer.step()
    assert first < 1 and a.max() < 1


def test_what_nobody_holds_joins_its_weight():
    (a, b), scales = parameters()
    optimizers = [SGD([a], 0.1), SGD([b], 0.2, momentum=0.9)]
    group_scales(optimizers, [], scales)
    (first, _), (second, _) = scales.values()
    assert held(optimizers[0]) == [ids(a), ids(first)] and held(optimizers[1]) == [ids(b), ids(second)]
    assert optimizers[1].param_groups[1]["lr"] == 0.2 and optimizers[1].param_groups[1]["momentum"] == 0.9


def test_every_group_of_weights_has_one_of_scales():
    (a, b), scales = parameters()
    optimizer = SGD([{"params": [a], "lr": 0.3}, {"params": [b], "lr": 0.1}])
    group_scales([optimizer], [], scales)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.3, 0.1]


def test_a_scale_of_a_frozen_layer_joins_the_first_optimizer():
    (a, _), scales = parameters()
    optimizer = SGD([a], 0.1)
    group_scales([optimizer], [], {**scales, "no.weight": (nn.Parameter(torch.ones(())), None)})
    assert [len(group) for group in held(optimizer)] == [1, 3]
    group_scales([], [], scales)


SCHEDULERS = {
    "step": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 8),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
    "one cycle": lambda o: OneCycleLR(o, 0.5, 10),
    "cyclic": lambda o: CyclicLR(o, 0.1, 0.5, 3),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, min_lr=0.02),
    "warm-up": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 5)], [3]),
    "chained": lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=3), StepLR(o, 2, 0.5)], o),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [None, 0.01])
def test_schedulers_drive_the_scales_as_they_drive_the_weights(name, lr):
    (a, b), scales = parameters()
    optimizer = SGD([a, b], 0.1, momentum=0.9, weight_decay=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    alone = SGD([nn.Parameter(torch.ones(1))], 0.1, momentum=0.9)
    reference = SCHEDULERS[name](alone)
    group_scales([optimizer], [scheduler], scales, lr)
    factor = 1.0 if lr is None else 0.02 if name == "one cycle" else 0.1  # of the peak where there is one
    for _ in range(9):
        weights, moved = optimizer.param_groups
        assert weights["lr"] == pytest.approx(alone.param_groups[0]["lr"])
        assert moved["lr"] == pytest.approx(factor * weights["lr"])
        assert moved.get("momentum") == weights.get("momentum")
        for each, its in ((optimizer, scheduler), (alone, reference)):
            each.step()
            its.step(1.0) if name == "plateau" else its.step()
    fresh = SCHEDULERS[name](optimizer)
    fresh.load_state_dict(scheduler.state_dict())
