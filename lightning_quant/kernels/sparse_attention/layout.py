"""Where the tokens of a picture or a video stand in a sequence, and how they are cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Literal

import torch
from torch import Tensor

from lightning_quant.kernels.sparse_attention.curve import (
    blocks_of_first_frame,
    inverse_order,
    neighbouring_blocks,
    token_order,
)


@dataclass(frozen=True)
class TokenLayout:
    """A sequence: ``prefix`` text or class tokens, the tokens of a grid in raster order, ``suffix`` more text tokens.

    >>> TokenLayout((24, 24), prefix=1).tokens
    577
    """

    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0

    @property
    def visual(self) -> int:
        """How many tokens the grid has."""
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        """How many tokens the sequence has."""
        return self.prefix + self.visual + self.suffix

    def __str__(self) -> str:
        parts = [f"{self.prefix} + " if self.prefix else "", "x".join(map(str, self.grid))]
        return "".join(parts) + (f" + {self.suffix}" if self.suffix else "") + " tokens"


class Blocks:
    """The blocks of a layout, as tables on a device.

    Args:
        layout: where the visual tokens stand.
        block: tokens per block.
        order: along which they are cut.
        first_frame: whether blocks of the first frame keep each other.
    """

    def __init__(
        self,
        layout: TokenLayout,
        block: int,
        order: Literal["gilbert", "raster"] = "gilbert",
        first_frame: bool = False,
    ) -> None:
        along = token_order(layout.grid, order)
        self.layout, self.size = layout, block
        behind = torch.arange(layout.prefix + layout.visual, layout.tokens)
        # Positions of the visual tokens in the order of the blocks, and then of the text tokens.
        self.order = torch.cat([along + layout.prefix, torch.arange(layout.prefix), behind])
        self.inverse = inverse_order(self.order)
        self.always = neighbouring_blocks(layout.grid, along, block)
        if first_frame:
            self.always |= blocks_of_first_frame(layout.grid, along, block)

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.always)

    @property
    def visual(self) -> Tensor:
        """Positions of the visual tokens, in the order of the blocks."""
        return self.order[: self.layout.visual]

    @property
    def text(self) -> Tensor:
        """Positions of the other tokens."""
        return self.order[self.layout.visual :]

    def to(self, device: torch.device) -> Blocks:
        """Move the tables."""
        self.order, self.inverse, self.always = (x.to(device) for x in (self.order, self.inverse, self.always))
        return self

    def join(self, visual: Tensor, text: Tensor | None) -> Tensor:
        """The sequence, from its visual tokens in the order of the blocks and its text tokens: (B, H, L, d) each."""
        return (visual if text is None else torch.cat([visual, text], 2)).index_select(2, self.inverse)


def find_layout(
    tokens: int,
    grid: Literal["auto"] | tuple[int, ...] = "auto",
    prefix: Literal["auto"] | int = "auto",
    suffix: Literal["auto"] | int = "auto",
    *,
    pictures: Sequence[tuple[int, ...]] = (),
    joined: Sequence[tuple[int, ...]] = (),
    causal: bool = False,
) -> TokenLayout:
    """The layout of a sequence, from what the user says and what was seen while the model ran.

    In this order: the grid that was given; a feature map of a convolution (the patch embedding) with as many positions
    as the sequence, or a part of it, has tokens, or a divisor of that (one map for each frame); a part, or the
    sequence, with a square number of tokens; one row of tokens.

    Args:
        tokens: length of the sequence.
        grid: sizes of the token grid, or "auto".
        prefix: tokens before the grid, or "auto".
        suffix: tokens behind it, or "auto".
        pictures: spatial sizes of the feature maps that were seen, latest last.
        joined: lengths of the parts that were seen to be joined into a sequence of this length, latest last.
        causal: a causal sequence is one row, in its own order.

    Raises:
        ValueError: if grid, prefix and suffix do not add up to the sequence.

    >>> str(find_layout(577, pictures=[(24, 24)], joined=[(1, 576)]))
    '1 + 24x24 tokens'
    >>> str(find_layout(1300, pictures=[(16, 16)], joined=[(1280, 20)]))
    '5x16x16 + 20 tokens'
    >>> str(find_layout(577, grid=(24, 24)))
    '1 + 24x24 tokens'
    """
    before, behind = (0 if x == "auto" else x for x in (prefix, suffix))
    if before + behind >= tokens:
        raise ValueError(
            f"prefix_tokens={prefix} and suffix_tokens={suffix} leave nothing of a sequence of {tokens} tokens"
        )
    cuts = [*_cuts(joined), (before, tokens - before - behind, behind)]
    cuts = [cut for cut in cuts if prefix in ("auto", cut[0]) and suffix in ("auto", cut[2]) and sum(cut) == tokens]
    if causal:
        return TokenLayout((tokens - before - behind,), before, behind)
    if grid != "auto":
        rest = tokens - prod(grid)
        fitting = [cut for cut in cuts if cut[1] == prod(grid)]
        cut = fitting[0] if fitting else (rest - behind if prefix == "auto" else before, prod(grid), 0)
        layout = TokenLayout(tuple(grid), cut[0], rest - cut[0])
        if min(layout.prefix, layout.suffix) < 0 or suffix not in ("auto", layout.suffix):
            raise ValueError(
                f"grid={tuple(grid)} has {prod(grid)} tokens, which with prefix_tokens={prefix} and "
                f"suffix_tokens={suffix} does not make a sequence of {tokens} tokens"
            )
        return layout
    maps = [picture for picture in reversed(pictures) if prod(picture) >= 4]
    # A map that is all of a part, before one map per frame, before a part that could be a square picture.
    found = (
        [((*picture,), cut) for picture in maps for cut in cuts if cut[1] == prod(picture)]
        + [((cut[1] // prod(m), *m), cut) for m in maps for cut in cuts if len(m) == 2 and cut[1] % prod(m) == 0]
        + [((isqrt(cut[1]),) * 2, cut) for cut in cuts if isqrt(cut[1]) ** 2 == cut[1]]
        + [((cut[1],), cut) for cut in cuts]
    )
    sizes, (before, _, behind) = found[0]
    return TokenLayout(sizes, before, behind)


def _cuts(joined: Sequence[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """Which part could be the picture, with what stands before and behind it; longer parts first."""
    cuts = [(sum(parts[:i]), parts[i], sum(parts[i + 1 :])) for parts in reversed(joined) for i in range(len(parts))]
    return sorted(cuts, key=lambda cut: -cut[1])
