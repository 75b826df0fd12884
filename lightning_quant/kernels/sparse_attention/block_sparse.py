"""Attention to listed blocks of keys: one function, several backends."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from lightning_quant.kernels.cuda.needs import why_no_triton
from lightning_quant.kernels.sparse_attention.int8_scores import int8_blocks
from lightning_quant.kernels.sparse_attention.lists import BlockLists
from lightning_quant.kernels.sparse_attention.rectification import Rectification
from lightning_quant.kernels.sparse_attention.workspace import Workspace

Backend = Literal["auto", "triton", "torch", "flex"]


def why_not(backend: Backend, query: Tensor, int8_scores: bool = False) -> str | None:
    """Why a backend cannot serve this query, or ``None`` if it can.

    >>> import torch
    >>> why_not("torch", torch.ones(1, 1, 4, 8)) is None
    True
    """
    if backend in ("auto", "torch"):
        return None
    if not query.is_cuda:
        return f"the tensors are on {query.device.type}, and backend={backend!r} needs a CUDA device"
    if backend == "triton" and (reason := why_no_triton()):
        return reason
    if backend == "triton" and query.element_size() != 2:
        return f"the Triton kernel takes bfloat16 and float16, found {query.dtype}"
    if backend == "flex" and int8_scores:
        return "flex_attention makes its scores in floats"
    return None


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    block: int,
    *,
    blocked: int | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    causal: bool = False,
    rectification: Rectification | None = None,
    int8_scores: bool = False,
    backend: Backend = "auto",
    workspace: Workspace | None = None,
) -> Tensor:
    """Softmax attention of each query block to its listed key blocks and to all keys behind the blocked ones.

    A query with nothing to see answers 0 (and the addend of its rectification).

    Args:
        query: (B, Hq, L, d).
        key: (B, Hkv, S, d); Hq is a multiple of Hkv.
        value: (B, Hkv, S, dv).
        lists: the kept blocks of ``ceil(L / block)`` query blocks.
        block: tokens per block, of queries and of keys; the last ones may be ragged.
        blocked: how many of the keys, from the first, stand in blocks; default: all. Every query sees the others.
        scale: of the softmax; default: ``d ** -0.5``.
        valid: which keys are not padding: (B, S) bool.
        causal: a query sees no blocked key behind its own position.
        rectification: factor and addend per query block.
        int8_scores: whether queries and keys are rounded to 8 bits, with a scale for every block. Triton then
            multiplies integers; torch multiplies what they stand for.
        backend: ``"auto"``: Triton where it can serve, else torch. Without a gradient.
        workspace: memory that the torch backend uses, and leaves to later calls.

    Returns:
        (B, Hq, L, dv).

    Raises:
        RuntimeError: if the backend that was asked for cannot serve.
    """
    if reason := why_not(backend, query, int8_scores):
        raise RuntimeError(f"backend={backend!r} cannot serve this attention: {reason}")
    if backend == "auto":
        backend = "triton" if query.is_cuda and why_not("triton", query) is None else "torch"
    blocked = key.size(2) if blocked is None else blocked
    scale = query.size(-1) ** -0.5 if scale is None else scale
    # Imported when it first serves: triton may be absent, and triton and flex_attention are slow to import.
    served = import_module(f"{__package__}.block_sparse_{backend}")
    options: dict[str, Any] = {"workspace": workspace} if backend == "torch" else {}
    if int8_scores:
        codes = int8_blocks(query, key, block, blocked, valid)
        if backend == "triton":
            (query, key), options["scales"] = (x.codes for x in codes), tuple(x.scale for x in codes)
        else:
            query, key = (x.floats() for x in codes)
    rest = (lists, block, blocked, scale, valid, causal, rectification)
    out: Tensor = served.attend(query, key, value, *rest, **options)
    return out.to(value.dtype)
