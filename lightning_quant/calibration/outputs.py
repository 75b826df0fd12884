"""What a model answers to a calibration batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_quant.calibration.samples import sample_count


def sample_output(model: nn.Module, batch: Any, run: Callable[[Any], Any], instead: str = "") -> Tensor:
    """The first floating tensor of the model's output, which must have an entry for each sample.

    Args:
        model: named in the error.
        batch: a calibration batch.
        run: feeds it through the model.
        instead: what to do without such an output, for the error: ``"set bias_steps=0"``.

    Raises:
        ValueError: if there is none.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> sample_output(layer, torch.ones(4, 2), layer).shape
    torch.Size([4, 3])
    """
    found = [leaf for leaf in tree_leaves(run(batch)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found or found[0].dim() == 0 or len(found[0]) != sample_count(batch):
        shape = tuple(found[0].shape) if found else None
        raise ValueError(
            f"the output of {type(model).__name__} (shape {shape}) has no entry for each of {sample_count(batch)} "
            f"samples: {instead + ', or ' if instead else ''}define calibration_step(self, batch) that returns the "
            f"output"
        )
    return found[0]
