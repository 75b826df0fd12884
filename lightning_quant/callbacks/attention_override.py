"""What callbacks share that answer a float model's attention calls in their own way while it predicts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_quant.calibration import check_feedable, feed, first_samples, undisturbed
from lightning_quant.graph import attention_name, matches
from lightning_quant.graph.tokens import AttentionTokens, attention_tokens
from lightning_quant.kernels.attention_door import (
    AttentionFunction,
    RoutedAttention,
    attends_quantized,
    give_back_attention,
    route_attention,
    why_not_routable,
)


class AttentionOverride(Callback):
    """Routes attention while validate, test and predict run; fit and its validation stay as they are.

    At the first batch one sample of it is run (``calibration_step``, else ``predict_step``, else ``forward``; of a
    sampler only its first step), which tells where the model attends and over what. The modules that attend then get a
    subclass of their own class, and their own class back at the end, also after an exception. Weights, names and
    state dict stay as they are throughout.
    """

    def __init__(self) -> None:
        self._open = False
        self._routed: list[RoutedAttention] = []

    @abstractmethod
    def functions(
        self, pl_module: LightningModule, calls: Sequence[AttentionTokens]
    ) -> Mapping[str, AttentionFunction]:
        """What answers the attention of which module; called once, before anything is changed."""

    # ---------------------------------------------------------------- hooks, in the order in which Lightning calls them

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *where: int) -> None:
        """Route, at the first batch of a validate."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.route(trainer, pl_module, batch)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *where: int) -> None:
        """Route, at the first batch."""
        self.route(trainer, pl_module, batch)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *where: int) -> None:
        """Route, at the first batch."""
        self.route(trainer, pl_module, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self.give_back()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self.give_back()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self.give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no other hook after an exception."""
        self.give_back()

    # ---------------------------------------------------------------- how it is done

    def give_back(self) -> None:
        """Give every module its own attention back."""
        self._open = False
        while self._routed:
            give_back_attention(self._routed.pop())

    def route(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """A batch begins: learn from the first one where the model attends, and route it."""
        if self._open:
            return
        check_feedable(pl_module)
        quantized = [name for name, module in pl_module.named_modules() if attends_quantized(module)]
        if quantized:
            raise ValueError(
                f"{type(self).__name__} answers float attention, and this model has quantized attention: "
                f"`{quantized[0]}` and {len(quantized) - 1} more; quantize it with attention=False"
            )
        sample, inference = first_samples(batch, 1), torch.is_inference_mode_enabled()
        with undisturbed(pl_module), torch.inference_mode(inference):  # the batch was born in the loop's mode
            calls = attention_tokens(pl_module, lambda: feed(trainer, pl_module, sample))
        functions = self.functions(pl_module, calls)
        for site in functions:
            if reason := why_not_routable(pl_module.get_submodule(site)):
                raise ValueError(f"{type(self).__name__} cannot answer the attention of `{site}`: {reason}")
        for site, function in functions.items():
            module = pl_module.get_submodule(site)
            route_attention(module, function)
            assert isinstance(module, RoutedAttention)
            self._routed.append(module)
        self._open = True


def chosen_sites(sites: Sequence[str], patterns: Sequence[int | str], argument: str) -> set[str]:
    """The attention sites that numbers (in the order of their first call) and name patterns choose.

    >>> sorted(chosen_sites(["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], [0, -1, "blocks.1.*"], "dense_layers"))
    ['blocks.0.attn', 'blocks.1.attn', 'blocks.2.attn']

    Raises:
        ValueError: for a number or a pattern that fits none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, int):
            found = [sites[pattern]] if -len(sites) <= pattern < len(sites) else []
        else:
            found = [site for site in sites if matches(attention_name(site), pattern)]
        if not found:
            raise ValueError(
                f"{argument}: {pattern!r} fits no attention site; there are {len(sites)}: {list(sites)[:3]}"
            )
        chosen.update(found)
    return chosen
