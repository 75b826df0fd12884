"""The method that calibrates with bits that another one chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, Literal

from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.post_training import PostTrainingQuantization
from lightning_quant.callbacks.repq_vit import RepQViT
from lightning_quant.quantizers import Scheme
from lightning_quant.solvers import Reconstruction


def calibrating(
    method: str | QuantizationCallback,
    attention: bool = True,
    first_last: str | None = None,
    overrides: Mapping[str, str] | None = None,
    target: str | None = None,
    skip: Sequence[str] = (),
    calibration_samples: int = 32,
    calibration_loader: Literal["auto", "train", "val"] | Iterable[Any] | Callable[[], Iterable[Any]] = "auto",
    during_fit: bool = False,
    reconstruct: str | Reconstruction | None = None,
) -> QuantizationCallback:
    """A method by its short name, all of whose tensors have a choice of bits; one that is ready is returned.

    Args:
        method: ``"repq"``, ``"ptq"``, or a callback that calibrates.
        attention: whether q, k, v and the attention probabilities are quantized.
        first_last: format of the first and the last layer, ``None`` for no exemption.
        overrides: format of single layers by name pattern, which keep it.
        target: name of the submodule to quantize; default: every layer that runs in the calibration forward.
        skip: name patterns of layers that stay float.
        calibration_samples: how many samples (not batches) calibrate.
        calibration_loader: ``"auto"``, ``"train"``, ``"val"``, a DataLoader, or a callable that gives one.
        during_fit: whether to calibrate in the validation loops of ``trainer.fit`` as well.
        reconstruct: how units are fitted to their float twins after the ranges are found; ``None`` rounds to the
            nearest.
    """
    common: dict[str, Any] = {
        "attention": attention, "first_last": first_last, "overrides": overrides, "target": target, "skip": skip,
        "calibration_samples": calibration_samples, "calibration_loader": calibration_loader, "during_fit": during_fit,
        "reconstruct": reconstruct,
    }  # fmt: skip
    if not isinstance(method, str):  # YAML gives every argument
        given = [name for name, value in common.items() if (value or None) != (DEFAULTS[name] or None)]
        if given:
            raise ValueError(f"{', '.join(given)}: give this to the {type(method).__name__} that is the method")
        return method
    if method == "repq":
        return RepQViT(stem_activations=None, **common)
    if method == "ptq":
        return PostTrainingQuantization(**common)
    raise ValueError(f"method={method!r} is none of 'repq', 'ptq', nor a callback that calibrates")


DEFAULTS = {name: argument.default for name, argument in signature(calibrating).parameters.items()}


def with_bits(text: str | None, bits: int) -> str | None:
    """A format with another number of bits.

    >>> with_bits("int8_asym_g64", 3), with_bits("logsqrt2_4", 6)
    ('int3_asym_g64', 'logsqrt2_6')
    """
    if text is None:
        return None
    scheme = Scheme.parse(text)
    if scheme.kind == "float":
        raise ValueError(f"{text!r} is a float format, whose bits mixed precision cannot choose; give it an intN")
    return str(replace(scheme, bits=bits))
