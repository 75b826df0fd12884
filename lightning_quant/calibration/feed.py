"""What a calibration batch runs through: the module's own calibration step, its prediction step, or its forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn


def feed(trainer: pl.Trainer | None, pl_module: nn.Module, batch: Any) -> Any:
    """Run one calibration batch through the module, in the precision in which validation will run it.

    The first of these that the module defines is called, and its result returned:

    1. ``calibration_step(batch)``
    2. ``predict_step(batch, 0)``, with ``dataloader_idx=0`` only if its signature insists
    3. ``forward``: a tensor batch is passed as it is, of a tuple or list the first element. A dict is passed as
       keywords; keys that ``forward`` does not take, such as labels, are left out, unless it has ``**kwargs``.

    Args:
        trainer: gives the precision (autocast of ``bf16-mixed`` and the like); None runs without.
        pl_module: the module to feed; any ``nn.Module`` will do.
        batch: a batch as :class:`~lightning_quant.calibration.CalibrationBatches` yields it.

    Raises:
        TypeError: if there is nothing to call, or ``forward`` cannot take such a batch.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> images, labels = torch.ones(4, 3), torch.zeros(4)
        >>> feed(None, layer, (images, labels)).shape
        torch.Size([4, 2])
    """
    feeder = feeder_name(pl_module)
    with _precision(trainer):
        if feeder == "calibration_step":
            return getattr(pl_module, feeder)(batch)
        if feeder == "predict_step":
            predict_step = getattr(pl_module, feeder)
            index = inspect.signature(predict_step).parameters.get("dataloader_idx")
            required = index is not None and index.default is inspect.Parameter.empty
            return predict_step(batch, 0, **({"dataloader_idx": 0} if required else {}))
        args, kwargs = _forward_arguments(pl_module, batch)
        return pl_module(*args, **kwargs)


def feeder_name(pl_module: nn.Module) -> str:
    """Which of ``"calibration_step"``, ``"predict_step"`` and ``"forward"`` calibration calls on this module.

    Raises:
        TypeError: if the module defines none of the three.

    Example:
        >>> import torch
        >>> feeder_name(torch.nn.ReLU())
        'forward'
    """
    if callable(getattr(pl_module, "calibration_step", None)):
        return "calibration_step"
    if isinstance(pl_module, pl.LightningModule) and is_overridden("predict_step", pl_module):
        return "predict_step"
    inherited = (nn.Module.forward, pl.LightningModule.forward)
    if "forward" in vars(pl_module) or type(pl_module).forward not in inherited:
        return "forward"
    raise TypeError(
        f"{type(pl_module).__name__} defines no forward, no predict_step and no calibration_step, so calibration "
        f"cannot run it: define calibration_step(self, batch) that runs the layers to be quantized."
    )


def check_feedable(pl_module: nn.Module) -> None:
    """Raise :func:`feeder_name`'s error now, before anything is changed, if no batch could be fed to this module.

    Example:
        >>> import torch
        >>> check_feedable(torch.nn.Module())
        Traceback (most recent call last):
            ...
        TypeError: Module defines no forward, no predict_step and no calibration_step, so calibration cannot run it: ...
    """
    feeder_name(pl_module)


def _precision(trainer: pl.Trainer | None) -> AbstractContextManager[Any]:
    return nullcontext() if trainer is None else trainer.precision_plugin.val_step_context()


def _forward_arguments(module: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        _check_binds(module, (batch[0],), f"the first element of the calibration {type(batch).__name__}")
        return (batch[0],), {}
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return (), _forward_keywords(module, batch)
    raise TypeError(
        f"calibration passes a tensor, the first element of a tuple or list, or a dict as keywords to "
        f"{type(module).__name__}.forward, but the batch is {_described(batch)}: define calibration_step(self, batch) "
        f"or predict_step."
    )


def _forward_keywords(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    taken = dict(batch)
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        taken = {key: value for key, value in batch.items() if key in signature.parameters}
    _check_binds(module, (), f"the keys of the calibration batch ({', '.join(batch)})", taken)
    if not taken and batch:
        raise TypeError(
            f"{type(module).__name__}.forward{signature} takes none of the keys of the calibration batch "
            f"({', '.join(batch)}): define calibration_step(self, batch) or predict_step."
        )
    return taken


def _check_binds(module: nn.Module, args: tuple[Any, ...], what: str, kwargs: Mapping[str, Any] | None = None) -> None:
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise TypeError(
            f"{type(module).__name__}.forward{signature} cannot be called with {what}: {error}. "
            f"Define calibration_step(self, batch) or predict_step."
        ) from None


def _described(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"an empty {type(batch).__name__}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} whose keys are not all strings"
    return f"a {type(batch).__name__}"
