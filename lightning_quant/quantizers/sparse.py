"""Pruned weights: which of them are kept, and what a solver made of those."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Mask", "Pattern"]

_N_OF_M = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """How many weights are pruned, and whether it matters where.

    Args:
        sparsity: Share of the weights that are pruned, 0 to 1.
        kept: For ``"2:4"`` and the like, how many of every ``group`` consecutive inputs of a row are kept at most.
        group: How many consecutive inputs that is; ``None`` where pruned weights may lie anywhere.

    Example:
        >>> Pattern.parse("1:4")
        Pattern(sparsity=0.75, kept=1, group=4)
        >>> str(Pattern.parse(0.5)), str(Pattern.parse("0.50"))
        ('0.5', '0.5')
    """

    sparsity: float
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str | float | Pattern) -> Pattern:
        """Reads a pattern: a share such as ``0.5``, or ``"2:4"``, two of every four weights kept.

        Args:
            text: The pattern; a :class:`Pattern` is returned as it is.

        Raises:
            ValueError: If the text is no pattern, or one that prunes nothing or everything.
        """
        if isinstance(text, Pattern):
            return text
        if match := _N_OF_M.fullmatch(str(text)):
            kept, group = int(match[1]), int(match[2])
            if not 0 < kept < group:
                raise ValueError(f'pattern "{text}" keeps {kept} of every {group} weights; say fewer, as "2:4" does')
            return cls(1 - kept / group, kept, group)
        try:
            sparsity = float(text)
        except ValueError:
            sparsity = -1.0
        if not 0 < sparsity < 1:
            raise ValueError(
                f'pattern {text!r} is neither a share of pruned weights between 0 and 1, as 0.5, nor "2:4" or '
                f'"4:8", which YAML wants in quotes'
            )
        return cls(sparsity)

    def why_not(self, inputs: int) -> str | None:
        """Why rows of so many inputs cannot have the pattern, or ``None`` if they can."""
        if self.group is not None and inputs % self.group:
            return f"its rows of {inputs} weights are no groups of {self.group}"
        return None

    def __str__(self) -> str:
        return f"{self.sparsity:g}" if self.group is None else f"{self.kept}:{self.group}"


class Mask(nn.Module):
    r"""What stands between a float weight and the layer that computes with it: some weights are 0.

    .. math:: \hat W = M \odot (W + D)

    where :math:`M` says which weights are kept and :math:`D`, where a solver moved those, by how much. The state is
    buffers, and an empty ``keep`` means that nothing is decided yet. The float weight is never touched. It can be
    trained behind the mask: the gradient of a pruned weight is 0.

    Args:
        pattern: How many weights are pruned, a :class:`Pattern` or its text.

    Attributes:
        keep: Which weights are kept, bool (out, ...).
        offset: What a solver added to them, or ``None``.
        correction: What is added to the bias of the layer behind, or ``None``.
        before: The codes that a quantizer behind the mask had before they were pruned, or ``None``.
        observer: While set, ``forward(x)`` returns ``observer(x)``.

    Example:
        >>> mask = Mask("2:4")
        >>> mask.decide(torch.tensor([[True, False, False, True]]))
        >>> mask(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[1., 0., 0., 4.]])
        >>> mask
        Mask(2:4, 50.0 % pruned)
    """

    keep: Tensor
    offset: Tensor | None
    correction: Tensor | None
    before: Tensor | None

    def __init__(self, pattern: Pattern | str | float) -> None:
        super().__init__()
        self.pattern = Pattern.parse(pattern)
        self.observer: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("keep", torch.empty(0, dtype=torch.bool))
        self.register_buffer("offset", None)
        self.register_buffer("correction", None)
        self.register_buffer("before", None)

    @property
    def calibrated(self) -> bool:
        """Whether it is decided what is pruned."""
        return self.keep.numel() > 0

    @torch.no_grad()
    def decide(self, keep: Tensor, offset: Tensor | None = None) -> None:
        """Say what is kept, and by how much it moves.

        Args:
            keep: bool, in the shape of the weight, output channels first.
            offset: in the same shape; 0 where nothing is kept.
        """
        self.keep = keep.detach().to(self.keep.device).clone()
        self.offset = None if offset is None else offset.detach().to(self.keep.device).clone()

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` with its pruned weights 0, or ``x`` itself while observed or undecided."""
        if self.observer is not None:
            return self.observer(x)
        if not self.calibrated:
            return x
        moved = x if self.offset is None else (x + self.offset).to(x.dtype)
        return moved.masked_fill(~self.keep, 0)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """The stored shapes say what is known; a float checkpoint knows nothing, and lacks nothing."""
        keep = state_dict.get(f"{prefix}keep")
        self.keep = torch.empty(() if keep is None else keep.shape, dtype=torch.bool, device=self.keep.device)
        for name in ("offset", "correction", "before"):
            stored = state_dict.get(f"{prefix}{name}")
            setattr(self, name, None if stored is None else torch.empty_like(stored, device=self.keep.device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if keep is None:
            missing[:] = [key for key in missing if key != f"{prefix}keep"]
            self.keep = self.keep.new_empty(0)

    def extra_repr(self) -> str:
        """The pattern, and how much is pruned."""
        if not self.calibrated:
            return f"{self.pattern}, undecided"
        return f"{self.pattern}, {100 * (1 - self.keep.float().mean().item()):.1f} % pruned"
