"""Rectified sparse attention against dense attention, timed in turn: `python benchmarks/sparse_attention.py`.

On the CPU the `torch` backend runs against `F.scaled_dot_product_attention`. On a CUDA device the Triton kernel runs
against flash attention and flex_attention at the shapes of HunyuanVideo and Wan; without one those lines say "not
measured". Queries, keys and values are smooth fields over the token grid with noise, as a video's are.

Columns: the share of keys that is attended to, text and neighbours included; milliseconds; how much faster the whole
call is, choosing included, and which share of the ideal 1/kept that is; the same share for the block-sparse kernel
alone; what choosing alone costs, as a share of dense attention; the relative error on sampled queries, rectified and
plain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_quant.kernels.sparse_attention import (
    BlockLists,
    Blocks,
    KeyMask,
    Sparsity,
    TokenLayout,
    Workspace,
    attention_facts,
    block_sparse_attention,
    rectified_sparse_attention,
    select,
)

HEADER = (
    f"{'grid':>9} {'tokens':>7} {'kept':>6} {'dense ms':>9} {'sparse ms':>9} {'speed-up':>8} {'of ideal':>8} "
    f"{'kernel':>6} {'choosing':>8} {'error':>6} {'plain':>6}"
)
CPU_GRIDS = ((4, 32, 32), (8, 32, 32), (16, 32, 32))
# heads, grid, text tokens: 8k to 32k tokens, HunyuanVideo at 720p with 129 frames, Wan at 720p with 81 frames
CUDA_SHAPES = (
    ("", 24, (8, 32, 32), 256),
    ("", 24, (16, 32, 32), 256),
    ("", 24, (8, 64, 64), 256),
    ("", 24, (16, 64, 64), 256),
    ("HunyuanVideo", 24, (32, 45, 80), 256),
    ("Wan 14B", 40, (21, 45, 80), 0),
)


def video_like(grid: tuple[int, ...], heads: int, dim: int, text: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value (1, heads, tokens, dim): a smooth field that queries and keys share, and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = [max(2, size // 6) for size in grid]

    def field() -> Tensor:
        corners = torch.randn(heads, dim, *coarse, generator=generator).to(device)
        smooth = F.interpolate(corners, size=grid, mode="trilinear", align_corners=True).flatten(2).mT
        return smooth / smooth.std()

    def with_text(x: Tensor) -> Tensor:
        tail = torch.randn(heads, text, dim, generator=generator).to(device)
        return torch.cat([x, tail], 1)[None].to(dtype)

    def noise() -> Tensor:
        return 0.5 * torch.randn(heads, grid[0] * grid[1] * grid[2], dim, generator=generator).to(device)

    shared = field()
    return [with_text(x + noise()) for x in (shared, shared, 1 + field())]


def timed(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, run in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(rounds + 1):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def measure(
    shape: tuple[str, int, tuple[int, ...], int],
    dim: int,
    arguments: argparse.Namespace,
    device: str,
    dtype: torch.dtype,
    peers: dict[str, Sparsity],
) -> str:
    """One line of the table.

    Args:
        shape: name, heads, grid, text tokens.
        dim: head dim.
        arguments: of the command line.
        device: where.
        dtype: of queries, keys and values.
        peers: how they are sparse, by name; the columns are those of the first.
    """
    name, heads, grid, text = shape
    query, key, value = video_like(grid, heads, dim, text, device, dtype)
    blocks = Blocks(TokenLayout(grid, suffix=text), arguments.block).to(query.device)
    first = next(iter(peers))
    workspace = Workspace()  # as RectifiedSparseAttention has one for all layers
    attended = rectified_sparse_attention(query, key, value, blocks, peers[first])
    facts = attention_facts(query, key, value, blocks, attended, KeyMask(), dim**-0.5, rows=32)
    visual, ordered = query[:, :, blocks.visual], [x[:, :, blocks.order] for x in (key, value)]
    lists = BlockLists.of(attended.selection.kept)

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" else nullcontext():
            return F.scaled_dot_product_attention(query, key, value)

    functions: dict[str, Callable[[], object]] = {
        "dense": dense,
        "choosing": lambda: BlockLists.of(select(visual, *ordered, blocks, peers[first], dim**-0.5, KeyMask()).kept),
        "kernel": lambda: block_sparse_attention(
            visual,
            *ordered,
            lists,
            blocks.size,
            blocked=len(blocks.visual),
            backend=peers[first].backend,
            workspace=workspace,
        ),
    }
    for peer, sparsity in peers.items():
        functions[peer] = partial(rectified_sparse_attention, query, key, value, blocks, sparsity, workspace=workspace)
    found = timed(functions, arguments.rounds, device)
    kept, faster = float(facts.kept_share.mean()), found["dense"] / found[first]
    line = (
        f"{'x'.join(map(str, grid)):>9} {query.size(2):>7} {kept:>6.1%} {found['dense']:>9.1f} {found[first]:>9.1f} "
        f"{faster:>7.2f}x {faster * kept:>8.0%} {found['dense'] / found['kernel'] * kept:>6.0%} "
        f"{found['choosing'] / found['dense']:>8.1%} {float(facts.error.mean()):>6.3f} "
        f"{float(facts.plain_error.mean()):>6.3f}  {name}"
    )
    return line + "".join(f"  {peer} {found[peer]:.1f} ms" for peer in list(peers)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--p-remain", type=float, default=0.3)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4, help="on the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--longest", type=int, default=16384, help="tokens, on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sparsity = Sparsity(arguments.drop_rate, arguments.p_remain)
    print(f"drop_rate={arguments.drop_rate}, p_remain={arguments.p_remain}, blocks of {arguments.block}")
    print(f"CPU, {torch.get_num_threads()} threads, {arguments.heads} heads of 64, torch backend")
    print(HEADER)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for grid in CPU_GRIDS:
                if prod(grid) <= arguments.longest:
                    shape = (str(dtype).removeprefix("torch."), arguments.heads, grid, 0)
                    print(measure(shape, 64, arguments, "cpu", dtype, {"torch": sparsity}), flush=True)
        if not torch.cuda.is_available():
            print("CUDA: not measured, there is no such device here")
            return
        print(f"CUDA, {torch.cuda.get_device_name()}, bfloat16, heads of 128, Triton kernel against flash attention")
        print(HEADER)
        for shape in CUDA_SHAPES:
            peers = {
                "triton": replace(sparsity, backend="triton"),
                "with scores of 8 bits": replace(sparsity, backend="triton", int8_scores=True),
                "flex_attention": replace(sparsity, backend="flex"),
            }
            print(measure(shape, 128, arguments, "cuda", torch.bfloat16, peers), flush=True)


if __name__ == "__main__":
    main()
