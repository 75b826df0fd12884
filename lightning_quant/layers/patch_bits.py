"""Fewer bits for the tokens that nobody looks at: patch-wise precision in the attention of a quantized model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.layers.attention import QuantAttention
from lightning_quant.quantizers import Quantizer, UniformQuantizer, build_quantizer

__all__ = ["PatchBits", "coarser", "important_tokens"]


def important_tokens(probabilities: Tensor, share: float, always: int = 1) -> Tensor:
    r"""The tokens that queries look at most, :math:`I_t = \text{mean}_{h, q} A_{hqt}`, as a mask (B, T).

    Exactly :math:`\lceil share \cdot T \rceil` of each sample are important, the first ``always`` among them.

    Args:
        probabilities: attention maps (B, H, Q, T).
        share: of the tokens.
        always: so many first tokens are important whatever the map says; the class token is one.

    >>> maps = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.3, 0.6]])[None, None]
    >>> important_tokens(maps, 0.5).tolist()
    [[True, False, True]]
    """
    importance = probabilities.mean((1, 2))  # (B, T)
    count = min(importance.size(-1), max(math.ceil(share * importance.size(-1)), always))
    importance = importance.clone()
    importance[:, :always] = math.inf
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, importance.topk(count, -1).indices, True)


def coarser(quantizer: UniformQuantizer, bits: int) -> Quantizer:
    """A quantizer of fewer bits over the same range.

    >>> fine = UniformQuantizer("uint4_asym")
    >>> fine.freeze(torch.tensor(0.0), torch.tensor(15.0))
    >>> coarser(fine, 2).scale
    tensor(5.)
    """
    found = build_quantizer(replace(quantizer.scheme, bits=bits), quantizer.axis).to(quantizer.scale.device).eval()
    if not quantizer.scheme.dynamic:
        ends = (torch.full_like(quantizer.zero_point, end) for end in (quantizer.scheme.qmin, quantizer.scheme.qmax))
        lo, hi = ((end - quantizer.zero_point) * quantizer.scale for end in ends)
        found.freeze(lo, hi)
    return found


class PatchBits:
    """Rounds unimportant tokens of query, key and value more coarsely, as the attention before has ranked them.

    The first attention of a forward keeps all its bits, and so does one whose tokens are not those of the one before.

    Args:
        share: of the tokens that keep their bits.
        fewer: how many bits the others give up; two are left at least.
        always: so many first tokens keep their bits.
    """

    def __init__(self, share: float = 0.5, fewer: int = 2, always: int = 1) -> None:
        self.share, self.fewer, self.always = share, fewer, always
        self._forget()

    @contextmanager
    def at_work(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile the model computes so."""
        handles = [model.register_forward_pre_hook(self._forget)]
        try:
            for site in [module for module in model.modules() if isinstance(module, QuantAttention)]:
                handles += self._watch(site)
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._forget()

    def _watch(self, site: QuantAttention) -> list[RemovableHandle]:
        if not isinstance(site.query_quantizer, UniformQuantizer) or site.probabilities_quantizer is None:
            return []
        handles = [
            site.query_quantizer.register_forward_pre_hook(self._begin_site),  # a site rounds its query first
            site.probabilities_quantizer.register_forward_hook(self._rank),
        ]
        for quantizer in (site.query_quantizer, site.key_quantizer, site.value_quantizer):
            if isinstance(quantizer, UniformQuantizer):
                few = coarser(quantizer, max(2, quantizer.scheme.bits - self.fewer))
                handles.append(quantizer.register_forward_hook(partial(self._round, few)))
        return handles

    def _forget(self, *call: Any) -> None:
        self.mask: Tensor | None = None  # (B, T), of the attention before
        self.following: Tensor | None = None  # for the attention behind

    def _begin_site(self, *call: Any) -> None:
        self.mask, self.following = self.following, None

    def _rank(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if args[0].dim() == 4 and args[0].size(-1) == args[0].size(-2):
            self.following = important_tokens(args[0].detach(), self.share, self.always)

    def _round(self, few: Quantizer, quantizer: Quantizer, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Query, key or value (B, H, T, d)."""
        x, mask = args[0], self.mask
        if mask is None or quantizer.observer is not None or x.dim() != 4 or mask.shape != (x.size(0), x.size(-2)):
            return out
        return torch.where(mask[:, None, :, None], out, few(x))
