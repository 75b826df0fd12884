"""What 'the model is left as it was' means, in one place."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

HOOKS = [name for name in vars(nn.Module()) if name.endswith("hooks")]
OF_THE_RUN = {"_hparams", "_lightning_quant"}  # what a Trainer sets by itself; and our own record, a fact of its own


def bits(tensor):
    """The content of a tensor as bytes, so that NaN equals NaN and -0.0 does not equal 0.0."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def facts(model):
    """Everything about a model that a quantization which failed, or was undone, must not have changed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "types": {name: type(module) for name, module in modules.items()},
        "attributes": {name: set(vars(module)) - OF_THE_RUN for name, module in modules.items()},
        "parameters": {name: id(parameter) for name, parameter in parameters.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "inference tensors": [
            name for name, tensor in [*parameters.items(), *model.named_buffers()] if tensor.is_inference()
        ],
        "values": {name: bits(tensor) for name, tensor in [*parameters.items(), *model.named_buffers()]},
        "gradients": {name: None if p.grad is None else bits(p.grad) for name, p in parameters.items()},
        "state dict": list(model.state_dict()),
        "hooks": {
            name: {kind: list(vars(module)[kind].values()) for kind in HOOKS} for name, module in modules.items()
        },
        "record": vars(model).get("_lightning_quant"),
        "training": {name: module.training for name, module in modules.items()},
        "held": [modules, parameters],  # or an id could be given to something new
    }


@contextmanager
def left_as_it_was(model, but=()):
    """Fails if anything about the model, but the facts named, differs on the way out from what it was on the way in.

    A Trainer that is stopped by an exception within an evaluation leaves the whole model in eval mode, by itself.
    """
    before = facts(model)
    yield
    after = facts(model)
    for fact in before.keys() - {"training", "held", *but}:
        if isinstance(before[fact], dict):
            differing = [
                name
                for name in before[fact].keys() | after[fact].keys()
                if before[fact].get(name) != after[fact].get(name)
            ]
            assert not differing, (fact, differing)
        assert before[fact] == after[fact], fact
    assert after["training"] == before["training"] or not any(after["training"].values())


@contextmanager
def refused(model, words, error=ValueError, but=()):
    """Fails unless the block raises one clear error, of one line, and leaves the model as it was."""
    with left_as_it_was(model, but), pytest.raises(error, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)


def scales(model):
    """The state of every quantizer, bit for bit, by name."""
    from lightning_quant.quantizers import Quantizer

    return {
        f"{name}.{key}": bits(tensor)
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for key, tensor in module.named_buffers()
    }
