"""Predict on real low-bit kernels instead of simulated ones."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.callbacks.float_attention import FloatAttention, computes_in_bfloat16
from lightning_quant.checkpoint import record_of
from lightning_quant.kernels.cpu import integer_instructions
from lightning_quant.kernels.cuda.needs import gpu_in_words, why_not_on
from lightning_quant.kernels.memory import give_freed_memory_back, keep_freed_memory
from lightning_quant.kernels.openvino import LoweredModules, Trial, has_openvino
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.kernels.swapped import Swappable, SwappedKernels, attentions_of
from lightning_quant.kernels.table import KernelTable
from lightning_quant.kernels.torchao import has_torchao
from lightning_quant.layers import QuantizedLayer

Backend = Literal["auto", "torch", "openvino", "triton", "torchao"]
BACKENDS = ("auto", "torch", "openvino", "triton", "torchao")


class KernelSwap(Callback):
    r"""Lets the layers of a calibrated model compute with real integers while ``trainer.predict`` runs.

    A simulated layer rounds floats to a grid and multiplies floats. Its kernel multiplies the integers,

    .. math:: y_n = s_x s_n \sum_k (c_k - z) w_{nk} + b_n

    which is the same up to the rounding of floats. A layer that no low-bit kernel takes keeps multiplying floats on
    the grid, with weights that are rounded once; ``table`` names it and says why.

    On a CPU with bfloat16 instructions ``Trainer(precision="bf16-mixed")`` makes predict faster still: the products
    write bfloat16, and float attention, which takes as long as all products in float32, is computed in it by the
    faster of two ways. Where the model attends is seen in the first batch.

    On a CPU a convolution also takes over the BatchNorm and the activation behind it, and hands the next layer codes in
    the place of floats; whoever else reads what lies between is given floats, as ever. The norm becomes part of one
    scale and bias for each channel, so about one code in a million falls on the other side of a rounding. Nothing is
    taken over with ``compile``, where gradients are asked for, and in norms that train.

    The simulated layers come back when predict ends or fails. Their Parameters, names and state dict stay as they are
    throughout, so a checkpoint that is written meanwhile is that of the simulated model. With ``keep=True`` the
    kernels stay and the float weights are dropped: what is saved then holds packed integers.

    Args:
        backend: ``"torch"`` takes the low-bit kernels that torch brings along: those of CPUs, and of fp8 on GPUs;
            ``"triton"`` takes those of GPUs: integers by Triton, fp8 by torch; ``"openvino"`` compiles the largest
            submodules that OpenVINO takes in the first batch, with the scales that were calibrated, and leaves the rest
            to torch; ``"torchao"`` hands integers and scales to torchao, which is made for ``compile=True``;
            ``"auto"`` takes any of the first two, measures it in the first batch against the float product, and keeps
            the faster one; if OpenVINO is installed and predict has a while to go, it then tries that for a few
            batches, and keeps what is faster. With ``keep`` or ``compile`` it measures nothing.
        keep: keep the kernels and drop the float weights. There is no way back. Not with OpenVINO.
        compile: compile the swapped network with ``torch.compile`` while it predicts.
        strict: refuse a model in which a quantized layer has no low-bit kernel.

    Attributes:
        table: what ran on which kernel, and why not on a low-bit one; print it.

    Raises:
        RuntimeError: if the model has no calibrated quantized layer.
        ValueError: with ``strict``, naming the layers without a low-bit kernel; with ``backend="triton"``, if the model
            is not on a GPU, or Triton is not installed; with ``backend="torchao"``, if it takes no layer.
        ModuleNotFoundError: if OpenVINO or torchao is asked for and not installed.

    >>> from lightning_quant import PostTrainingQuantization
    >>> ptq, swap = PostTrainingQuantization(), KernelSwap()
    >>> trainer = L.Trainer(callbacks=[ptq, swap])  # doctest: +SKIP
    >>> trainer.validate(model, datamodule=dm)  # doctest: +SKIP
    >>> trainer.predict(model, datamodule=dm)  # doctest: +SKIP
    >>> print(swap.table)  # doctest: +SKIP
    """

    def __init__(
        self, backend: Backend = "auto", keep: bool = False, compile: bool = False, strict: bool = False
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is none of {', '.join(map(repr, BACKENDS))}")
        if backend == "openvino":
            if keep or compile:
                raise ValueError('backend="openvino" takes neither keep=True nor compile=True: take backend="torch"')
            if not has_openvino():
                raise ModuleNotFoundError('backend="openvino" needs it: pip install "lightning-quant[openvino]"')
        if backend == "torchao" and not has_torchao():
            raise ModuleNotFoundError('backend="torchao" needs it: pip install "lightning-quant[torchao]"')
        self.backend = backend
        self.keep = keep
        self.compile = compile
        self.strict = strict
        self.table: KernelTable | None = None
        self._swapped: SwappedKernels | LoweredModules | None = None
        self._trial: Trial | None = None
        self._compiled: list[nn.Module] = []
        self._attention = FloatAttention()

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let kernels answer for the layers."""
        self.swap(pl_module)
        self._tell("")
        tries = self.backend == "auto" and not self.keep and not self.compile and has_openvino()
        self._trial = Trial() if tries else None

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *where: int) -> None:
        """Look at the clock, and in the first batch at where the model attends."""
        if not any(where) and not self.compile and computes_in_bfloat16(trainer, pl_module):
            self._attention.look(pl_module)
        if self._trial is not None:
            self._trial.began()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *where: int
    ) -> None:
        """The first batch has measured or compiled the kernels: take them for good; perhaps try the other backend."""
        self._attention.looked()
        if self.settle():
            self._tell(", after the first batch")
        if self._trial is None:
            return
        answers = self._trial.ended(sum(trainer.num_predict_batches))
        if self._trial.turn is None:
            rank_zero_info(f"KernelSwap: {self._trial}")
            self._trial = None
        if answers is not None and (answers == "openvino") != isinstance(self._swapped, LoweredModules):
            self.give_back()
            self.swap(pl_module, "openvino" if answers == "openvino" else "auto")
            self._tell(f", now by {answers}")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the simulated layers back."""
        self.give_back()
        self._attention = FloatAttention()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no other hook after an exception."""
        self._attention.looked()
        self.give_back()
        self._attention = FloatAttention()

    # ---------------------------------------------------------------- what a user may call

    def swap(self, model: nn.Module, backend: Backend | None = None) -> KernelTable:
        """Let kernels answer for the layers of a calibrated model, and tell which; nothing changes if this fails.

        Args:
            model: a calibrated model.
            backend: another one than ``self.backend``; ``"auto"`` tries OpenVINO only while ``trainer.predict`` runs.
        """
        backend = backend or self.backend
        layers, attentions = _calibrated_layers(model), {} if self.compile else attentions_of(model)
        on = {layer.device.type for layer in layers.values()}
        if backend == "triton" and (reason := why_not_on(on)):
            raise ValueError(f'backend="triton" cannot serve: {reason}')
        places: dict[str, tuple[Swappable, AnySpec]] = {name: (it, LayerSpec.of(it)) for name, it in layers.items()}
        places.update(attentions)
        swapped: SwappedKernels | LoweredModules
        if backend == "openvino":
            swapped = LoweredModules(model, places)
        else:
            measure = backend == "auto" and not self.keep and not self.compile
            swapped = SwappedKernels(places, measure, self.keep, backend, fuse=not self.compile)
        self._require_kernels(swapped.without, len(places))
        if backend == "torchao" and not layers.keys() - swapped.without.keys():
            name = next(iter(layers))
            raise ValueError(
                f'backend="torchao" takes none of {len(layers)} quantized layers; `{name}`: {swapped.without[name]}. '
                f'Choose another format, or backend="auto"'
            )
        self.table = KernelTable(swapped.swap(), gpu_in_words() if on == {"cuda"} else integer_instructions())
        keep_freed_memory()
        self._swapped = swapped
        if self.compile:
            self._compiled = [child for child in model.children() if any(m in layers.values() for m in child.modules())]
            for child in self._compiled:
                child.compile()
        return self.table

    def looking(self, model: nn.Module) -> AbstractContextManager[None]:
        """See where a model attends in bfloat16; :meth:`settle` then lets kernels answer there, too.

        >>> swap.swap(model)  # doctest: +SKIP
        >>> with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), swap.looking(model):  # doctest: +SKIP
        ...     model(batch)
        >>> swap.settle()  # doctest: +SKIP
        """
        return self._attention.looking(model)

    def settle(self) -> bool:
        """Take the kernels that the first call has measured or compiled for good; whether there were any."""
        others = None if self._swapped is None else self._swapped.settle()
        if others and self.table is not None:
            self.table = self.table.with_others(others)
            if isinstance(self._swapped, LoweredModules):
                self._require_kernels({row.layer: row.why_not for row in self.table.simulated}, len(self.table.rows))
        attending = self._attention.route() if isinstance(self._swapped, SwappedKernels) else []
        if attending and self.table is not None:
            self.table = replace(self.table, rows=[*self.table.rows, *attending])
        return others is not None or bool(attending)

    def give_back(self) -> None:
        """Let the layers simulate again, unless ``keep``."""
        self._attention.give_back()
        while self._compiled and not self.keep:
            self._compiled.pop()._compiled_call_impl = None
        if self._swapped is not None:
            self._swapped.give_back()
            self._swapped = None
            give_freed_memory_back()

    # ---------------------------------------------------------------- private

    def _require_kernels(self, without: dict[str, str], among: int) -> None:
        if self.strict and without:
            named = "; ".join(f"`{name}`: {why}" for name, why in list(without.items())[:5])
            raise ValueError(
                f"strict=True, and {len(without)} of {among} quantized layers have no low-bit kernel: {named}. Leave "
                f"them float with skip= or attention=False, choose another format with overrides=, or set strict=False"
            )

    def _tell(self, when: str) -> None:
        assert self.table is not None
        rank_zero_info(f"KernelSwap{when}: {self.table.summary()}")


def _calibrated_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model, by name.

    Raises:
        RuntimeError: if there are none, or one has no scale yet.
    """
    record = record_of(model)
    plans = [] if record is None else list(record.plans.values())
    layers = {name: layer for plan in plans for name, layer in plan.quantized_layers(model).items()}
    how = "run trainer.validate(model, ...) with a quantization callback first, or load a quantized checkpoint"
    if not layers:
        raise RuntimeError(f"KernelSwap found no quantized layer in this {type(model).__name__}: {how}")
    for plan in plans:
        for name in plan.lacking(model):
            raise RuntimeError(f"KernelSwap found `{name}` without a scale: {how}")
    return layers
