"""The layers and attentions of a model that kernels of torch answer for, and how they come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from lightning_quant.kernels.attention_door import KernelAttention, attend_on, simulate_attention
from lightning_quant.kernels.fastest import Fastest
from lightning_quant.kernels.layer_door import KernelLayer, give_back, run_on
from lightning_quant.kernels.pending import PatientKernel
from lightning_quant.kernels.registry import FALLBACK, Choice, choose
from lightning_quant.kernels.spec import AnySpec, AttentionSpec
from lightning_quant.kernels.table import KernelRow
from lightning_quant.layers import AttentionSite, QuantAttention, QuantizedLayer

Swappable = QuantizedLayer | QuantAttention


class SwappedKernels:
    """Lets kernels answer for layers and attentions, until :meth:`give_back`.

    Args:
        places: the layers and attentions, each with the spec that a kernel is asked with, by name.
        measure: run the low-bit kernel of every layer beside the float product in its first call, and keep the faster
            one.
        keep: drop the float weights; then nothing comes back.
        backend: which kernels are asked.
        fuse: let kernels take over norms and activations that follow them.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[Swappable, AnySpec]],
        measure: bool,
        keep: bool,
        backend: str = "auto",
        fuse: bool = True,
    ) -> None:
        self.places = {name: place for name, (place, _) in places.items()}
        self.choices: dict[str, Choice] = {name: choose(spec, backend) for name, (_, spec) in places.items()}
        self.formats = {name: spec.formats for name, (_, spec) in places.items()}
        self.measure, self.keep, self.fuse = measure, keep, fuse
        self._swapped: dict[str, KernelLayer | KernelAttention] = {}
        self._told: dict[str, str] = {}

    @property
    def without(self) -> dict[str, str]:
        """What no low-bit kernel takes, and why not."""
        return {name: choice.why_not for name, choice in self.choices.items() if choice.why_not}

    def swap(self) -> list[KernelRow]:
        """Let the kernels answer; nothing changes if this fails."""
        try:
            for name, place in self.places.items():
                if not isinstance(place, (KernelLayer, KernelAttention)):
                    self._swap_one(name, place)
        except BaseException:
            self.give_back()
            raise
        return [
            KernelRow(name, _name(place), self.formats[name], self.choices[name].why_not or "")
            for name, place in self.places.items()
        ]

    def settle(self) -> dict[str, tuple[str, str]] | None:
        """Take the kernels that were faster in the first call for good.

        Returns:
            Those that are not low-bit ones, each with the reason, and those that took over what follows them; ``None``
            if there is nothing new.
        """
        measured = {
            name: place.kernel
            for name, place in self._swapped.items()
            if isinstance(place.kernel, Fastest) and place.kernel.seconds
        }
        found = {}
        for name, pair in measured.items():
            self._swapped[name].__dict__["kernel"] = pair.chosen
            if not pair.chosen.low_bit:
                why = f"{pair.first.name} took {pair.seconds[0] / pair.seconds[1]:.2f}x as long in the first batch"
                found[name] = pair.chosen.name, why
        for name, place in self.places.items():
            kernel = getattr(place, "kernel", None)
            if isinstance(kernel, PatientKernel) and kernel.absorbed and self._told.get(name) != kernel.in_words:
                self._told[name] = kernel.in_words
                found[name] = kernel.in_words, ""
        return found if measured or found else None

    def give_back(self) -> None:
        """Let everything simulate again, unless the kernels are kept."""
        while self._swapped:
            _, place = self._swapped.popitem()
            give_back(place)
            simulate_attention(place)

    def _swap_one(self, name: str, place: Swappable) -> None:
        chosen = self.choices[name].kernel
        if isinstance(place, QuantAttention):
            if not chosen.low_bit:
                return
            attend_on(place, chosen.of(place), self.keep)
        else:
            kernel = chosen.of(place, packed=self.keep)
            for part in kernel.modules():
                if isinstance(part, PatientKernel):
                    part.patient = self.fuse
            run_on(place, Fastest(kernel, FALLBACK.of(place)) if self.measure and kernel.low_bit else kernel, self.keep)
        if not self.keep:
            self._swapped[name] = cast(KernelLayer | KernelAttention, place)


def attentions_of(model: nn.Module) -> dict[str, tuple[QuantAttention, AttentionSpec]]:
    """The quantized attentions of a model by the name of their module, those of ``nn.MultiheadAttention`` left out."""
    found: dict[str, tuple[QuantAttention, AttentionSpec]] = {}
    for name, site in model.named_modules():
        if not isinstance(site, AttentionSite):
            continue
        fused = len(site.attention_quantizers) - len(site.spelled)
        for place, module in enumerate(site.attention_quantizers):
            attention = cast(QuantAttention, module)
            if attention.activation_quantizers():
                called = name if len(site.attention_quantizers) == 1 else f"{name}[{place}]"
                found[called] = attention, AttentionSpec.of(attention, spelled=place >= fused)
    return found


def _name(place: Swappable) -> str:
    if not isinstance(place, (KernelLayer, KernelAttention)):
        return FALLBACK.name
    kernel = place.kernel
    return kernel.first.name if isinstance(kernel, Fastest) else kernel.name
