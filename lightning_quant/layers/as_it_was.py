"""The float weights of a model, to begin again with."""

from __future__ import annotations

import torch
from torch import nn

from lightning_quant.layers.plan import Plan
from lightning_quant.layers.swap import created_biases, drop_bias

__all__ = ["WeightsAsTheyWere"]


class WeightsAsTheyWere:
    """A copy of the Parameters' values, so that a method may be tried, taken back, and tried again.

    Args:
        model: with the values to come back to.

    >>> net = nn.Sequential(nn.Linear(2, 1))
    >>> start = WeightsAsTheyWere(net)
    >>> nn.init.zeros_(net[0].weight).any().item()
    False
    >>> start.put_back(net)
    >>> net[0].weight.any().item()
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.created = set(created_biases(model))

    def put_back(self, model: nn.Module) -> None:
        """Give every Parameter its value, and take biases away that were created since."""
        modules = dict(model.named_modules())
        for name in created_biases(model):
            if name not in self.created:
                drop_bias(modules[name])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.values[name])

    def take_back(self, model: nn.Module, plan: Plan) -> None:
        """Take back all that a plan has come to, structure included."""
        plan.undo(model)
        self.put_back(model)
        plan.created = []
