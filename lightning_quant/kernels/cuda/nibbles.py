"""Codes of at most 4 bits, two in a byte, as the Triton kernel reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of 32 inputs the first 16 are the lower halves of 16 bytes and the others the upper ones, so that a program reads
# either half of what it multiplies as it stands, and shuffles nothing.
RUN = 32


def to_nibbles(codes: Tensor) -> Tensor:
    """Pack codes.

    Args:
        codes: integers from 0 to 15, (out, in).

    Returns:
        (out, 16 * ceil(in / 32)) uint8.

    >>> to_nibbles(torch.arange(32).view(1, 32) % 16)[0, :3].tolist()
    [0, 17, 34]
    """
    runs = F.pad(codes, (0, -codes.shape[1] % RUN)).to(torch.uint8).unflatten(1, (-1, 2, RUN // 2))
    packed: Tensor = runs[:, :, 0] | runs[:, :, 1] << 4
    return packed.flatten(1)


def from_nibbles(packed: Tensor, inputs: int) -> Tensor:
    """The codes again: (out, bytes) uint8 -> (out, in) int32.

    >>> codes = torch.randint(0, 16, (3, 41), dtype=torch.int32)
    >>> torch.equal(from_nibbles(to_nibbles(codes), 41), codes)
    True
    """
    runs = packed.unflatten(1, (-1, 1, RUN // 2))
    codes: Tensor = torch.cat([runs & 15, runs >> 4], 2).flatten(1)
    return codes[:, :inputs].to(torch.int32)
