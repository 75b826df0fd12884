"""What the methods share that solve layer after layer, block after block, on the inputs that calibration gives them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_quant.calibration import Hessian, first_samples, input_rows, merge_across_ranks
from lightning_quant.calibration.progress import progress_bar
from lightning_quant.graph import ModelGraph, units_of
from lightning_quant.layers import QuantizedLayer
from lightning_quant.layers.base import through
from lightning_quant.modules.block_sequence import Block, BlockSequence
from lightning_quant.modules.block_states import BlockStates
from lightning_quant.modules.unit_states import fingerprint

Notes = dict[str, float]


class LayerMethod(Protocol):
    """What a method says about one layer, for :func:`solve_blocks` to do it to all."""

    def statistics(self, name: str, layer: nn.Module) -> Hessian:
        """What is to be known of a layer's inputs; nothing is gathered yet."""
        ...

    def token_weights(self, block: Block) -> Sequence[Tensor] | None:
        """How much each token of each batch counts, (samples, tokens); asked before a block is begun."""
        ...

    def solve(self, name: str, layer: nn.Module, statistics: Hessian) -> Notes:
        """Change one layer for good; numbers for the log."""
        ...


def blocks_of(model: nn.Module, graph: ModelGraph, layers: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """Names of the repeated blocks that hold layers, or of the modules that patterns name.

    Raises:
        ValueError: if there are none.
    """
    if patterns is not None:
        return units_of(model, graph, layers, patterns)
    found = [unit for unit in units_of(model, graph, layers, "block") if unit in graph.blocks]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks with layers that are solved for; name the modules that run "
            f"one after another with blocks=[...]"
        )
    return found


def solve_blocks(
    trainer: Trainer,
    pl_module: LightningModule,
    method: LayerMethod,
    names: Sequence[str],
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    run: Callable[[Any], Any],
    settings: Mapping[str, Any],
    state_dir: str | Path | None = None,
    device: str | None = None,
    min_tokens: float = 4.0,
) -> dict[str, Notes]:
    """Solve the layers of one block after another, behind blocks and layers that are solved already.

    Within a block the layers that read the same tensor share their statistics and are solved together, in the order in
    which they run, each group behind the ones before it. A killed run goes on at the block in which it was.

    Args:
        trainer: the running Trainer.
        pl_module: the model.
        method: what is done to a layer.
        names: of the blocks.
        layers: those that are solved, by name; layers in no block are passed over.
        batches: the calibration batches of this rank.
        run: feeds one batch through the model.
        settings: what decides the result, as JSON can say it.
        state_dir: where finished blocks are written; ``None``: a folder of the Trainer's ``default_root_dir``.
        device: where one block at a time is solved; ``None``: where the model is.
        min_tokens: how many tokens a layer should see for each of its inputs; fewer are warned of.

    Returns:
        What the method noted of each layer; one that no batch reached is not among them.

    Raises:
        ValueError: naming the layer whose inputs are not finite, or that cannot be solved.
    """
    samples = merge_across_ranks(first_samples(batches[0], 2))[0]
    context = trainer.precision_plugin.val_step_context
    sequence = BlockSequence(pl_module, names, batches, run, samples, context, device)
    folder = Path(trainer.default_root_dir) / "solving" if state_dir is None else Path(state_dir)
    states = BlockStates(folder / fingerprint([dict(settings), list(names)], pl_module, batches), trainer)
    found: dict[str, Notes] = {}
    with progress_bar(trainer, "Solving", len(sequence), "blocks") as advance:
        for block in sequence:
            start = time.perf_counter()
            states.begin(block.module)
            notes = states.resume(block.number, block.module)
            if notes is None:
                inside = {name: layer for name, layer in layers.items() if name.startswith(f"{block.name}.")}
                notes = _solve_block(block, method, inside, min_tokens)
                states.save(block.number, block.module, notes)
                seconds = time.perf_counter() - start
                rank_zero_info(f"Solved {block.number + 1}/{len(sequence)} `{block.name}` in {seconds:.1f} s")
            else:
                rank_zero_info(f"`{block.name}` is solved already ({states.folder})")
            found |= notes
            advance(1)
    states.forget()
    _warn_of_few(found, min_tokens)
    return found


def _solve_block(
    block: Block, method: LayerMethod, layers: Mapping[str, nn.Module], min_tokens: float
) -> dict[str, Notes]:
    found: dict[str, Notes] = {}
    weights = method.token_weights(block)
    for group in block.groups(layers):
        first = group[0]  # they read the same tensor
        statistics = method.statistics(first, layers[first])

        def see(name: str, layer: nn.Module, x: Tensor, batch: int, statistics: Hessian = statistics) -> None:
            if isinstance(layer, QuantizedLayer):
                x = through(layer.input_quantizer, x)
            _add(statistics, name, input_rows(layer, x), None if weights is None else weights[batch])

        block.observe({first: layers[first]}, see)
        statistics.reduce()
        if not statistics.tokens:
            continue
        if not bool(statistics.diagonal().isfinite().all()):
            raise ValueError(
                f"the inputs of `{first}` are not finite (NaN or infinity) on the calibration data: check the data, or "
                f"leave what makes them float with skip="
            )
        for name in group:
            try:
                seen = {"inputs": statistics.features, "tokens": statistics.tokens}
                found[name] = {**seen, **method.solve(name, layers[name], statistics)}
            except ValueError as error:
                raise ValueError(f"`{name}`: {error}") from error
    return found


def _warn_of_few(found: Mapping[str, Notes], min_tokens: float) -> None:
    few = [name for name, notes in found.items() if notes["tokens"] < min_tokens * notes["inputs"]]
    if few:
        first = found[few[0]]
        rank_zero_warn(
            f"`{few[0]}` has {first['inputs']:g} inputs and saw {first['tokens']:g} tokens, fewer than {min_tokens:g} "
            f"for each, and so have {len(few) - 1} other layers: raise calibration_samples, or lower min_tokens to "
            f"accept that"
        )


def _add(statistics: Hessian, name: str, rows: Tensor, weights: Tensor | None) -> None:
    if weights is not None and weights.numel() != rows[..., 0].numel():
        raise ValueError(
            f"`{name}` reads {tuple(rows.shape)}, but the tokens have weights of shape {tuple(weights.shape)}: "
            f"leave it float with skip="
        )
    try:
        statistics.add(rows, weights)
    except ValueError as error:
        raise ValueError(f"`{name}` {error}") from error
