"""A LightningModule that knows that it may be quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from lightning_quant.checkpoint import attach_record, detach_record, read_plans


class CalibrationMixin:
    """Lets a LightningModule load its quantized checkpoints by itself, and bring its quantization callbacks along.

    Put it before ``LightningModule`` in the bases. Then ``MyModel.load_from_checkpoint("w4a4.ckpt")`` rebuilds the
    quantized layers from the plan in the checkpoint, with no callback needed. A model that overrides
    :meth:`configure_quantization` is quantized by every Trainer it meets.

    Optional hooks that calibration looks for on any LightningModule, with or without this mixin:
    ``calibration_dataloader()`` and ``calibration_step(batch)``.

    >>> import lightning as L
    >>> from torch import nn
    >>> class Net(CalibrationMixin, L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(4, 2)
    >>> Net().configure_callbacks()
    []
    """

    def configure_quantization(self) -> Callback | list[Callback]:
        """The callbacks that quantize this model; none by default."""
        return []

    def configure_callbacks(self) -> list[Callback]:
        """The model's callbacks. Lightning asks before every run, so the same objects are given each time."""
        if not hasattr(self, "_quantization_callbacks"):
            callbacks = self.configure_quantization()
            self._quantization_callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        others = super().configure_callbacks()  # type: ignore[misc]
        return [*(others if isinstance(others, (list, tuple)) else [others]), *self._quantization_callbacks]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a float or a quantized state dict; the structure follows what the state dict holds."""
        if read_plans(dict(state_dict)):
            attach_record(self)  # type: ignore[arg-type]
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        finally:
            detach_record(self)  # type: ignore[arg-type]
