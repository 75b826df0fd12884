"""The feature in the middle of a denoiser."""

from __future__ import annotations

from torch import nn


def find_bottleneck(denoiser: nn.Module) -> str:
    """The module whose answer goes into the middle of a denoiser; its name is relative to the denoiser.

    Of a U-Net that is the layer before the attention in its ``mid_block``, of anything else the block before the middle
    one of its longest list of equal blocks.

    Args:
        denoiser: the network.

    Raises:
        ValueError: if it has neither.

    >>> find_bottleneck(nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(6))}))
    'blocks.2'
    """
    resnets = getattr(getattr(denoiser, "mid_block", None), "resnets", None)
    if isinstance(resnets, nn.ModuleList) and len(resnets):
        return "mid_block.resnets.0"
    lists = {
        name: blocks
        for name, blocks in denoiser.named_modules()
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if type(blocks[0]) not in (nn.ModuleList, nn.ModuleDict)  # which are never called
    }
    if not lists:
        raise ValueError(
            f"feature='auto' finds neither a mid_block nor a list of equal blocks in {type(denoiser).__name__}: name a "
            f"module in its middle with feature="
        )
    name = max(lists, key=lambda name: len(lists[name]))
    return f"{name}.{max(0, len(lists[name]) // 2 - 1)}"
