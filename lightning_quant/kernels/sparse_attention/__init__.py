"""Block-sparse attention whose output is rectified towards the full attention map.

The method: order the tokens along a curve (``curve``), cut them into blocks and pool these (``pooling``), estimate the
attention between blocks and choose which to keep (``selection``), attend to the kept ones only (``block_sparse`` and
its backends), and give kept and dropped blocks the weight they would have had (``rectification``). ``attention`` puts
the steps together; ``reference`` says the same slowly.
"""

from lightning_quant.kernels.sparse_attention.attention import Attended, Sparsity, rectified_sparse_attention, select
from lightning_quant.kernels.sparse_attention.block_sparse import Backend, block_sparse_attention, why_not
from lightning_quant.kernels.sparse_attention.facts import AttentionFacts, attention_facts
from lightning_quant.kernels.sparse_attention.layout import Blocks, TokenLayout, find_layout
from lightning_quant.kernels.sparse_attention.lists import BlockLists
from lightning_quant.kernels.sparse_attention.masks import KeyMask, read_mask
from lightning_quant.kernels.sparse_attention.site import SiteFacts, SparseSite
from lightning_quant.kernels.sparse_attention.workspace import Workspace

__all__ = [
    "Attended",
    "AttentionFacts",
    "Backend",
    "BlockLists",
    "Blocks",
    "KeyMask",
    "SiteFacts",
    "SparseSite",
    "Sparsity",
    "TokenLayout",
    "Workspace",
    "attention_facts",
    "block_sparse_attention",
    "find_layout",
    "read_mask",
    "rectified_sparse_attention",
    "select",
    "why_not",
]
