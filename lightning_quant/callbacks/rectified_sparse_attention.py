"""Rectified sparse attention: skip most of the attention and keep its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.callbacks.attention_override import AttentionOverride, chosen_sites
from lightning_quant.callbacks.denoising_steps import DenoisingSteps
from lightning_quant.callbacks.sparse_attention_section import sparse_attention_section
from lightning_quant.graph.tokens import AttentionTokens
from lightning_quant.kernels.attention_door import AttentionFunction
from lightning_quant.kernels.sparse_attention import (
    Backend,
    Blocks,
    KeyMask,
    SiteFacts,
    SparseSite,
    Sparsity,
    TokenLayout,
    Workspace,
    find_layout,
    read_mask,
)
from lightning_quant.reports import Section

NOTHING = "nothing calls scaled_dot_product_attention (nn.MultiheadAttention keeps its call to itself)"
FEWEST_BLOCKS = 4  # with fewer, the blocks that touch are all there are


class RectifiedSparseAttention(AttentionOverride):
    r"""Block-sparse attention, training-free, whose output is rectified towards that of full attention (2025).

    The tokens of a picture or video are cut into blocks along a space-filling curve. For every block of queries i the
    attention to each block of keys j is estimated from block means, :math:`P_{ij} \propto c_j e^{s \bar q_i \bar k_j}`
    with :math:`c_j` tokens in the block; text keys stay single. Attention is computed over the blocks with most of it,
    those that touch, and all text, and then corrected:

    .. math:: O_i = R_i \, O_i^{sparse} + \sum_{j \text{ dropped, worth it}} P_{ij} \bar v_j, \qquad
        R_i = 1 - \sum_{j \text{ dropped, worth it}} P_{ij}

    A dropped block is worth its mean value where :math:`|\bar q_i \bar k_j|` exceeds the estimated error of pooling;
    others leave their mass with the kept ones. It works on any float model whose attention goes through
    ``scaled_dot_product_attention``, in validate, test and predict; weights and state dict stay as they are. Cross
    attention, short sequences and masks that are neither padding nor causal are left dense; ``facts()`` says so.

    Args:
        drop_rate: share of the key blocks that may be dropped; 0 keeps all.
        p_remain: estimated attention that is kept at least.
        block: tokens per block.
        grid: sizes of the token grid, ``(h, w)`` or ``(t, h, w)``. ``"auto"``: the feature map of a convolution (the
            patch embedding) that has as many positions, else a square number of tokens, else one row.
        prefix_tokens: text or class tokens before the grid, which all queries see; ``"auto"``: as they were joined.
        suffix_tokens: the same behind it.
        warmup_steps: so many first steps of every denoising trajectory are dense; the denoiser takes a ``timestep``.
        dense_layers: attention sites that stay dense: numbers in the order of their calls, or name patterns.
        order: how the grid is cut into blocks: along the ``"gilbert"`` curve, or in ``"raster"`` order.
        rectify: ``"critical"`` (the factor R) and ``"noncritical"`` (the sum); with ``()`` plain sparse attention.
        backend: ``"triton"``, ``"flex"`` (CUDA) or ``"torch"`` (anywhere); ``"auto"``: the first that can serve.
        dense_first_frame: whether the blocks of the first frame all keep each other, as Wan wants it.
        int8_scores: whether the kernel rounds queries and keys to 8 bits, with a scale for every block. Triton then
            multiplies integers; the torch backend multiplies what they stand for, and gains nothing.

    Raises:
        ValueError: at the first batch, if no attention can be sparse, or grid, prefix and suffix fit no sequence.

    >>> from lightning_quant import RectifiedSparseAttention
    >>> callback = RectifiedSparseAttention(drop_rate=0.5, block=32)
    >>> trainer = L.Trainer(callbacks=[callback])  # doctest: +SKIP
    >>> trainer.predict(model, datamodule=dm)  # doctest: +SKIP
    >>> callback.facts()["net.blocks.0.attn"].sampled.error  # doctest: +SKIP
    """

    def __init__(
        self,
        drop_rate: float = 0.8,
        p_remain: float = 0.3,
        block: int = 128,
        grid: Literal["auto"] | tuple[int, ...] = "auto",
        prefix_tokens: Literal["auto"] | int = "auto",
        suffix_tokens: Literal["auto"] | int = "auto",
        warmup_steps: int = 0,
        dense_layers: Sequence[int | str] = (),
        order: Literal["gilbert", "raster"] = "gilbert",
        rectify: Sequence[Literal["critical", "noncritical"]] = ("critical", "noncritical"),
        backend: Backend = "auto",
        dense_first_frame: bool = False,
        int8_scores: bool = False,
    ) -> None:
        super().__init__()
        if block < 1 or warmup_steps < 0:
            raise ValueError(f"block must be at least 1 and warmup_steps 0, found {block} and {warmup_steps}")
        if order not in ("gilbert", "raster"):
            raise ValueError(f'order is "gilbert" or "raster", found {order!r}')
        self.block, self.order, self.dense_first_frame = block, order, dense_first_frame
        self.grid, self.prefix_tokens, self.suffix_tokens = grid, prefix_tokens, suffix_tokens
        self.warmup_steps, self.dense_layers = warmup_steps, list(dense_layers)
        self.sparsity = Sparsity(drop_rate, p_remain, tuple(rectify), backend, int8_scores)
        self._steps, self._workspace = DenoisingSteps(), Workspace()
        self._sites: dict[str, SparseSite] = {}

    def facts(self) -> dict[str, SiteFacts]:
        """What happened at each sparse attention site in the last run, by the name of its module."""
        return {name: site.facts for name, site in self._sites.items()}

    def report_sections(self, trainer: Trainer, pl_module: LightningModule) -> list[Section]:
        """These facts as a part of the report of :class:`~lightning_quant.QuantReport`."""
        return [sparse_attention_section(self.facts())] if self._sites else []

    def functions(
        self, pl_module: LightningModule, calls: Sequence[AttentionTokens]
    ) -> Mapping[str, AttentionFunction]:
        """Sparse attention for every site with a sequence that can be cut into blocks."""
        layouts: dict[str, dict[tuple[int, bool], Blocks]] = {}
        reasons: dict[str, str] = {}
        tables: dict[tuple[TokenLayout, bool], Blocks] = {}
        for call in calls:
            try:
                layout, causal = self._layout(call)
            except ValueError as error:
                reasons[call.site] = str(error)
                continue
            order = "raster" if causal else self.order
            if (layout, causal) not in tables:
                tables[layout, causal] = Blocks(layout, self.block, order, self.dense_first_frame)
            layouts.setdefault(call.site, {})[call.queries, causal] = tables[layout, causal]
        if not layouts:
            raise ValueError(
                f"RectifiedSparseAttention found no attention in this {type(pl_module).__name__} that can be sparse: "
                + ("; ".join(f"`{site}`: {why}" for site, why in list(reasons.items())[:3]) or NOTHING)
            )
        for site in chosen_sites(list(layouts), self.dense_layers, "dense_layers"):
            del layouts[site]
        if self.warmup_steps and layouts and not self._steps.watch(pl_module, layouts):
            raise ValueError(
                f"warmup_steps={self.warmup_steps} needs a denoiser that is called with a timestep, and no module "
                f"around the attention takes one; warmup_steps=0 makes every call sparse"
            )
        self._sites = {
            site: SparseSite(known, self.sparsity, self._resting, self._workspace) for site, known in layouts.items()
        }
        sparse = Counter(layout for site in self._sites.values() for layout in site.facts.layouts)
        dense = Counter(reason for site, reason in reasons.items() if site not in layouts)
        notes = [f"{count} sites over {layout} in blocks of {self.block}" for layout, count in sparse.items()]
        notes += [f"{count} stay dense ({reason})" for reason, count in dense.items()]
        rank_zero_info(f"RectifiedSparseAttention: {'; '.join(notes)}")
        return self._sites

    def route(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """A batch begins, and with it a trajectory."""
        self._steps.restart()
        super().route(trainer, pl_module, batch)

    def give_back(self) -> None:
        """Give every module its own attention back."""
        self._steps.forget()
        self._workspace.clear()
        super().give_back()

    # ---------------------------------------------------------------- private

    def _resting(self) -> bool:
        return self.warmup_steps > max(self._steps.step, 0)

    def _layout(self, call: AttentionTokens) -> tuple[TokenLayout, bool]:
        """The layout of the sequence of a call, and whether it is causal.

        Raises:
            ValueError: if the call has to stay dense.
        """
        mask = KeyMask(causal=True) if call.causal else read_mask(call.mask, call.queries, call.keys)
        if call.queries != call.keys or mask is None:
            raise ValueError("cross attention" if mask else "its mask is neither padding nor causal")
        layout = find_layout(
            call.queries,
            self.grid,
            self.prefix_tokens,
            self.suffix_tokens,
            pictures=call.pictures,
            joined=call.joined,
            causal=mask.causal,
        )
        if (count := -(-layout.visual // self.block)) < FEWEST_BLOCKS:
            raise ValueError(f"{layout} make {count} blocks of {self.block}, fewer than {FEWEST_BLOCKS}: lower block=")
        return layout, mask.causal
