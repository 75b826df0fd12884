"""Where a denoiser can be cut into a shallow part, which runs at every step, and a deep one, whose answer is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from torch import nn


@dataclass(frozen=True)
class CachePoint:
    """The deep part of a denoiser. Names are relative to it.

    Args:
        deep: the modules that are skipped, outermost ones only, in the order in which they run.
        point: the last of them, whose answer is handed to the shallow part.
        residual: whether the deep part is a run of blocks on one stream, of which what it *adds* is kept. Otherwise the
            answer of ``point`` itself is kept, and fresh skip connections join it.
    """

    deep: tuple[str, ...]
    point: str
    residual: bool


def find_cache_point(denoiser: nn.Module, wanted: str = "auto") -> CachePoint:
    """Cut a denoiser.

    A U-Net with ``down_blocks`` and ``up_blocks`` is cut just before its last skip connection, so that only the first
    convolution, the last layer of the last up block and the head run at every step. A transformer is cut behind its
    first and before its last block.

    Args:
        denoiser: the network.
        wanted: ``"auto"``; of a U-Net the name of the layer or up block whose answer is kept, such as
            ``"up_blocks.2.resnets.0"``; of anything else a run of blocks, ``"transformer_blocks.2:6"``.

    Raises:
        ValueError: if it cannot be cut, or not there.

    >>> from diffusers import UNet2DModel
    >>> net = UNet2DModel(
    ...     8,
    ...     1,
    ...     1,
    ...     block_out_channels=(8, 8),
    ...     norm_num_groups=4,
    ...     layers_per_block=1,
    ...     down_block_types=("DownBlock2D",) * 2,
    ...     up_block_types=("UpBlock2D",) * 2,
    ... )
    >>> find_cache_point(net).deep
    ('down_blocks.0', 'down_blocks.1', 'mid_block', 'up_blocks.0', 'up_blocks.1.resnets.0')
    """
    if hasattr(denoiser, "up_blocks") and hasattr(denoiser, "down_blocks"):
        return _in_unet(denoiser, wanted)
    return _in_blocks(denoiser, wanted)


def readers(denoiser: nn.Module, point: CachePoint) -> dict[str, int]:
    """The layers that are linear in the kept feature, or in its norm, and how many of their first channels are it.

    In a U-Net that is the shortcut of the layer that joins the feature with a skip connection; in a transformer the
    projections to queries, keys and values of the block behind. Names are relative to the denoiser.

    Args:
        denoiser: the network.
        point: where it is cut.
    """
    modules = dict(denoiser.named_modules())
    *head, number = point.point.split(".")
    if point.residual:
        behind = f"{'.'.join(head)}.{int(number) + 1}.attn1"
        names = [f"{behind}.{name}" for name in ("to_q", "to_k", "to_v")]
        return {name: cast(nn.Linear, modules[name]).in_features for name in names if modules.get(name) is not None}
    if head[-1] == "up_blocks":  # the answer of a whole block
        last = f"{point.point}.resnets.{_layers(modules[point.point]) - 1}"
        reader = f"up_blocks.{int(number) + 1}.resnets.0.conv_shortcut"
    else:
        resnets = f"{'.'.join(head[:-1])}.resnets"
        last, reader = f"{resnets}.{number}", f"{resnets}.{int(number) + 1}.conv_shortcut"
    return {reader: cast(nn.Conv2d, modules[last].conv2).out_channels} if modules.get(reader) is not None else {}


def _in_blocks(denoiser: nn.Module, wanted: str) -> CachePoint:
    if wanted == "auto":
        lists = {
            name: blocks
            for name, blocks in denoiser.named_modules()
            if isinstance(blocks, nn.ModuleList) and len(blocks) > 2 and len({type(block) for block in blocks}) == 1
        }
        if not lists:
            raise ValueError(
                f"cache_point='auto' finds neither skip connections nor a list of three or more equal blocks in "
                f"{type(denoiser).__name__}: name a run of blocks with cache_point='blocks.1:7'"
            )
        name = max(lists, key=lambda name: len(lists[name]))
        start, stop = 1, len(lists[name]) - 1
    else:
        match = re.fullmatch(r"(.+)\.(\d+):(\d+)", wanted)
        blocks = dict(denoiser.named_modules()).get(match[1]) if match else None
        if match is None or not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
            raise ValueError(
                f"cache_point={wanted!r} names no run of blocks of {type(denoiser).__name__}: give the name of a list "
                f"of blocks, and from which on to which, as in cache_point='transformer_blocks.2:6'"
            )
        name, start, stop = match[1], int(match[2]), int(match[3])
        if not 0 <= start < stop <= len(blocks):
            raise ValueError(f"cache_point={wanted!r}: `{name}` has {len(blocks)} blocks, and no run {start}:{stop}")
    deep = tuple(f"{name}.{index}" for index in range(start, stop))
    return CachePoint(deep, deep[-1], residual=True)


def _in_unet(denoiser: nn.Module, wanted: str) -> CachePoint:
    downs, ups = _blocks(denoiser, "down_blocks"), _blocks(denoiser, "up_blocks")
    odd = [
        type(block).__name__ for block in [*downs, *ups] if not hasattr(block, "resnets") or hasattr(block, "skip_conv")
    ]
    if odd:
        raise ValueError(
            f"{type(denoiser).__name__} cannot be cut at its skip connections, for it has a {odd[0]}: only blocks made "
            f"of resnets and attentions are known here"
        )
    points: dict[str, tuple[int, int]] = {}  # the layer whose answer is kept -> how much of the up part is deep
    for i, block in enumerate(ups):
        layers = _layers(block)
        for j in range(1, layers):
            points[f"up_blocks.{i}.{_layer(block)}.{j - 1}"] = (i, j)
        if i + 1 < len(ups):
            points[f"up_blocks.{i}"] = (i + 1, 0)
    name = list(points)[-1] if wanted == "auto" and points else wanted
    if name not in points:
        raise ValueError(
            f"cache_point={wanted!r}: in this {type(denoiser).__name__} the answer of one of {list(points)} can be kept"
        )
    cut, partly = points[name]
    shallow = sum(_layers(block) for block in ups[cut:]) - partly  # each layer of the up part takes one skip
    deep = _deep_downs(downs, shallow)
    deep += ["mid_block"] if getattr(denoiser, "mid_block", None) is not None else []
    deep += [f"up_blocks.{i}" for i in range(cut)]
    for j in range(partly):
        deep += [f"up_blocks.{cut}.{kind}.{j}" for kind in _kinds(ups[cut])]
    return CachePoint(tuple(deep), name, residual=False)


def _deep_downs(downs: list[nn.Module], shallow: int) -> list[str]:
    """What of the down part is not needed for the first few skip connections, one of which the first layer gives."""
    deep = []
    left = shallow - 1
    for i, block in enumerate(downs):
        layers, samplers = _layers(block), getattr(block, "downsamplers", None) or ()
        if left <= 0:
            deep.append(f"down_blocks.{i}")
            continue
        for j in range(min(left, layers), layers):
            deep += [f"down_blocks.{i}.{kind}.{j}" for kind in _kinds(block)]
        if left <= layers:
            deep += [f"down_blocks.{i}.downsamplers.{j}" for j in range(len(samplers))]
        left -= layers + len(samplers)
    return deep


def _blocks(denoiser: nn.Module, name: str) -> list[nn.Module]:
    return list(cast(nn.ModuleList, getattr(denoiser, name)))


def _kinds(block: nn.Module) -> list[str]:
    """The lists of a block that each have a module for every layer, in the order in which they run."""
    return ["resnets", "attentions"] if getattr(block, "attentions", None) is not None else ["resnets"]


def _layers(block: nn.Module) -> int:
    return len(cast(nn.ModuleList, block.resnets))


def _layer(block: nn.Module) -> str:
    return _kinds(block)[-1]
