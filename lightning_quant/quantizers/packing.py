"""Codes of a few bits, packed without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack non-negative integer codes of ``bits`` bits each into bytes.

    Args:
        codes: integers in [0, 2^bits), any shape.
        bits: 1 to 16.

    >>> pack(torch.tensor([1, 2, 3, 15]), bits=4).tolist()
    [33, 243]
    """
    wide = codes.flatten().cpu().numpy().astype("<u2")  # (n,)
    spread = np.unpackbits(wide.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")[:, :bits]  # (n, bits)
    return torch.from_numpy(np.packbits(spread, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes out of the bytes, as int32.

    >>> unpack(pack(torch.tensor([[5, 0], [7, 2]]), bits=3), 3, (2, 2)).tolist()
    [[5, 0], [7, 2]]
    """
    count = int(np.prod(shape))
    spread = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    wide = np.packbits(spread, axis=1, bitorder="little")  # (n, 1 or 2)
    wide = np.pad(wide, ((0, 0), (0, 2 - wide.shape[1])))
    return torch.from_numpy(np.ascontiguousarray(wide).view("<u2").reshape(shape).astype(np.int32))
