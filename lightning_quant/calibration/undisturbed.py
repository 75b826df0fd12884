"""The one door through which calibration, reconstruction and synthesis leave the loops and come back traceless."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_quant.calibration.random_numbers import OwnRandomNumbers


@contextmanager
def undisturbed(pl_module: nn.Module, grad: bool = False) -> Iterator[None]:
    """Run a block outside the loops' inference mode, in eval mode, and leave the module and the run as they were.

    Inside: inference mode is off (tensors born here can be trained later), gradients are off, or on with ``grad``, and
    every submodule is in eval mode, so that dropout rests and BatchNorm's running statistics stand still.
    Afterwards, also after an exception or Ctrl-C: the random numbers of Python, NumPy, torch and CUDA go on as if the
    block had not run, each submodule has its own ``training`` flag back (one that was added meanwhile takes its
    parent's), and torchmetrics inside the module have their states, update counts and cached results back.

    Args:
        pl_module: the module that is calibrated.
        grad: turn gradients on. All parameters are frozen on the way in, so that gradients reach only what the block
            itself unfreezes or creates; their ``requires_grad`` and ``grad`` come back on the way out.

    Example:
        >>> import torch
        >>> module = torch.nn.Dropout()
        >>> with torch.inference_mode(), undisturbed(module, grad=True):
        ...     torch.is_inference_mode_enabled(), torch.is_grad_enabled(), module.training
        (False, True, False)
        >>> module.training
        True
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(OwnRandomNumbers())
        stack.enter_context(_metrics_kept(pl_module))
        stack.enter_context(_eval_mode(pl_module))
        if grad:
            stack.enter_context(_frozen(pl_module))
        yield


@contextmanager
def _eval_mode(root: nn.Module) -> Iterator[None]:
    # by object, not by name: a layer may be swapped for another one under its name, and the old one put back later
    flags = {module: module.training for module in root.modules()}
    try:
        root.eval()
        yield
    finally:
        for module, training in flags.items():
            module.training = training
        for module in root.modules():  # parents come before their children
            for child in module.children():
                if child not in flags:
                    child.training = module.training


@contextmanager
def _frozen(root: nn.Module) -> Iterator[None]:
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in root.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None  # what the block accumulates must not end up in the tensor that is given back
        yield
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def _metrics_kept(root: nn.Module) -> Iterator[None]:
    kept = [
        (module, _attributes(module)) for module in root.modules() if isinstance(module, (Metric, MetricCollection))
    ]
    try:
        yield
    finally:
        for module, attributes in kept:
            for name, (value, content) in attributes.items():
                vars(module)[name] = _with_content(value, content)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    # A metric's states, counter and cache are plain attributes. Both the object and a copy of its content are kept:
    # the metrics of a collection share state by reference, and would no longer do so if each got a copy back.
    states = {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}
    return {name: (value, _content(value)) for name, value in states.items()}


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, hooks, training: none of them a metric's state


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return list(value)  # a list state grows by appending; what it holds is not changed
    if isinstance(value, dict):
        return {key: list(item) if isinstance(item, list) else item for key, item in value.items()}
    return None


def _with_content(value: Any, content: Any) -> Any:
    if isinstance(value, Tensor):
        if not torch.equal(value, content):
            with torch.inference_mode(value.is_inference()):  # an inference tensor can be written to only there
                value.detach().copy_(content)
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, dict):
        value.clear()
        value.update(content)
    return value
