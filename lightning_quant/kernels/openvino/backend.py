"""The submodules of a model that OpenVINO answers for, and how they come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_quant.kernels.openvino.door import answer_by, answer_itself
from lightning_quant.kernels.openvino.grids import has_bytes
from lightning_quant.kernels.openvino.lower import Call, Lowered, NotLowered, lower
from lightning_quant.kernels.registry import choose
from lightning_quant.kernels.spec import AnySpec, LayerSpec
from lightning_quant.kernels.swapped import Swappable, SwappedKernels
from lightning_quant.kernels.table import KernelRow
from lightning_quant.layers import CachedModule, QuantizedLayer, StepCorrection
from lightning_quant.quantizers import StepQuantizer

ON_BYTES, ON_FLOATS, LATER = "int8 (OpenVINO)", "float (OpenVINO)", "OpenVINO, after the first batch"
FEW = 2  # quantized layers: a module with fewer gains nothing over the layer's own kernel
PATIENCE = 8  # calls of shapes that were met only once, until a module is left to torch


class LoweredModules:
    """Lets OpenVINO answer for the largest submodules that it takes, until :meth:`give_back`.

    A submodule is tried in its first call: the outermost one first, then what is inside it. What is left over when the
    batch ends goes to torch's kernels. A call of other shapes than before is simulated when it comes for the first
    time, for it may be the last batch, and compiled when it comes again.

    Args:
        model: what predicts.
        places: the quantized layers and attentions, each with the spec that a kernel is asked with, by name.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, tuple[Swappable, AnySpec]]) -> None:
        self.model, self.places = model, dict(places)
        self.kernels = SwappedKernels({}, measure=False, keep=False, backend="torch")
        self._modules: dict[str, _Module] = {}
        self._known: frozenset[str] | None = None
        self._busy = False

    @property
    def without(self) -> dict[str, str]:
        """Only known after the first batch: what no low-bit kernel takes."""
        return {}

    def swap(self) -> list[KernelRow]:
        """Open the doors; nothing changes if this fails."""
        for name, module in self.model.named_modules():
            inside = {place: layer for place, (layer, _) in self.places.items() if _is_inside(place, name)}
            layers = [layer for layer in inside.values() if isinstance(layer, QuantizedLayer)]
            if len(layers) < FEW or "forward" in vars(module) or module._compiled_call_impl is not None:
                continue
            self._modules[name] = _Module(name, inside)
            answer_by(module, self._answer_of(self._modules[name]))
        return [KernelRow(name, LATER, spec.formats) for name, (_, spec) in self.places.items()]

    def settle(self) -> dict[str, tuple[str, str]] | None:
        """Leave to torch's kernels what OpenVINO does not answer for.

        Returns:
            Everything, each with its kernel and why that is not a low-bit one; ``None`` if there is nothing new.
        """
        answered = {name for name, module in self._modules.items() if module.lowered}
        taken = {name: place for module in answered for name, place in self._found(module).items()}
        if self._known == frozenset(taken):
            return None
        self._known = frozenset(taken)
        self.kernels.give_back()
        rest = {name: place for name, place in self.places.items() if name not in taken}
        self.kernels = SwappedKernels(rest, measure=False, keep=False, backend="torch")
        return taken | {row.layer: (row.kernel, self._why(row)) for row in self.kernels.swap()}

    def give_back(self) -> None:
        """Let everything simulate again."""
        self.kernels.give_back()
        for name in self._modules:
            answer_itself(self.model.get_submodule(name))
        self._modules.clear()

    def _answer_of(self, record: _Module) -> Callable[..., Any]:
        def answer(
            module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            if self._busy or record.why_not:
                return forward(*args, **kwargs)
            try:
                call = Call.of(args, kwargs)
            except NotLowered as reason:
                record.refuse(str(reason))
                return forward(*args, **kwargs)
            lowered = record.lowered.get(call.key)
            return self._meet(record, module, forward, call) if lowered is None else lowered(call.tensors)

        return answer

    def _meet(self, record: _Module, module: nn.Module, forward: Callable[..., Any], call: Call) -> Any:
        """Answer a call that is not compiled, by simulating; and compile it unless it may be the only one."""
        args, kwargs = call.with_tensors(call.tensors)
        compiles = not record.lowered or call.key in record.met
        record.met[call.key] = record.met.get(call.key, 0) + 1
        if not compiles and sum(record.met.values()) > PATIENCE + len(record.lowered):
            for inner in self._modules.values():
                if inner.inside.items() <= record.inside.items():
                    inner.refuse(f"the shapes of its inputs keep changing: {len(record.met)} so far")
        self._busy = True
        try:
            if not compiles:
                return forward(*args, **kwargs)
            if reason := _why_not(module) or self._why_not_worth(record):
                raise NotLowered(reason)
            began, called = time.perf_counter(), record.called
            rank_zero_info(f"KernelSwap: OpenVINO compiles {called}, which takes a few seconds")
            before = tuple(tensor.clone() for tensor in call.tensors)
            simulated = forward(*args, **kwargs)
            record.lowered[call.key] = lower(module, forward, call.with_other(before), simulated, record.inside)
            rank_zero_info(f"KernelSwap: OpenVINO answers for {called} after {time.perf_counter() - began:.1f} s")
            return simulated
        except NotLowered as reason:
            record.refuse(str(reason))
            rank_zero_info(f"KernelSwap: OpenVINO does not answer for {record.called}: {reason}")
        finally:
            self._busy = False
        return forward(*args, **kwargs)

    def _why_not_worth(self, record: _Module) -> str | None:
        """Why a module is better left to torch's kernels, which take more formats."""
        layers = {name: layer for name, layer in record.inside.items() if isinstance(layer, QuantizedLayer)}
        theirs = sum(map(has_bytes, layers.values()))
        ours = sum(choose(self.places[name][1], "torch").why_not is None for name in layers)
        if 2 * theirs >= ours:
            return None
        return f"of its {len(layers)} layers it would multiply {theirs} as bytes, torch's kernels take {ours}"

    def _found(self, name: str) -> dict[str, tuple[str, str]]:
        """The kernel of everything inside a module that OpenVINO answers for."""
        on_bytes = next(iter(self._modules[name].lowered.values())).on_bytes
        found = {}
        for place in self._modules[name].inside:
            spec = self.places[place][1]
            why = spec.why_not_plain_integers() if isinstance(spec, LayerSpec) else None
            floats = ON_FLOATS, why or "its operands are rounded, and multiplied as floats"
            found[place] = (ON_BYTES, "") if on_bytes.get(place) else floats
        return found

    def _why(self, row: KernelRow) -> str:
        """Why a place has no low-bit kernel, and why OpenVINO does not answer for it."""
        outer = [module for name, module in self._modules.items() if row.layer in module.inside and module.why_not]
        if not row.why_not or not outer:
            return row.why_not
        return f"{row.why_not}; not on OpenVINO: {outer[-1].called}: {outer[-1].why_not}"


class _Module:
    """What is known of a module that OpenVINO may answer for."""

    def __init__(self, name: str, inside: dict[str, Swappable]) -> None:
        self.inside = inside
        self.called = f"`{name}`" if name else "the whole model"
        self.lowered: dict[Any, Lowered] = {}
        self.met: dict[Any, int] = {}
        self.why_not = ""

    def refuse(self, why: str) -> None:
        """Leave the module alone from now on."""
        self.why_not = why
        self.lowered.clear()


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


def _is_inside(place: str, module: str) -> bool:
    return not module or place == module or place.startswith((f"{module}.", f"{module}["))


def _why_not(module: nn.Module) -> str | None:
    """Why a module must not be answered for as a whole, whatever its call."""
    if module.training:
        return "it is in training mode"
    for name, part in module.named_modules():
        if isinstance(part, (StepQuantizer, StepCorrection, CachedModule)):
            return f"`{name}` depends on the step of the trajectory"
        if part is not module and (part._forward_hooks or part._forward_pre_hooks):
            return f"`{name}` has hooks, which would see nothing"
    other = next((p.device.type for p in module.parameters() if p.device.type != "cpu"), None)
    return other and f"it is on {other}"
