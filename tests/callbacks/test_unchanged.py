"""The helper that says what was changed sees every kind of change."""

import pytest
import torch
from torch import nn

from tests.callbacks.unchanged import facts, left_as_it_was
from tests.models import TinyTransformer


def test_facts_sees_what_it_should():
    """The helper itself: each of these changes is found."""
    changes = {
        "value": lambda m: m.head.weight.data.__setitem__((0, 0), float("nan")),
        "sign of zero": lambda m: m.head.weight.data.mul_(-0.0),
        "parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach().clone())),
        "class": lambda m: setattr(m.head, "__class__", type("Other", (nn.Linear,), {})),
        "hook": lambda m: m.head.register_forward_hook(lambda *_: None),
        "load hook": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
        "flag": lambda m: m.head.eval(),
        "grad flag": lambda m: m.head.weight.requires_grad_(False),
        "buffer": lambda m: m.head.register_buffer("folded", torch.tensor(False)),
        "attribute": lambda m: setattr(m.head, "observer", None),
        "dtype": lambda m: m.head.double(),
        "child": lambda m: setattr(m, "dropout", nn.Dropout()),
    }
    for name, change in changes.items():
        model = TinyTransformer()
        with pytest.raises(AssertionError), left_as_it_was(model):
            change(model)
        assert facts(model), name
