"""The blocks of a model, one after another, each fed with what the finished ones before it make of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from lightning_quant.calibration import merge_across_ranks

__all__ = ["Block", "BlockSequence"]

See = Callable[[str, nn.Module, Tensor, int], None]


class BlockSequence:
    """Iterates over blocks; whatever is done to a block meanwhile is what the next ones are fed with.

    The inputs of the first block are caught once, and the rest of the model need not run. A later block gets the
    outputs of the one before it, together with what does not depend on any block (masks, rotary tables). Which argument
    is which is learned from two forwards of a few samples, in one of which the blocks' outputs are disturbed. A block
    that is not fed in this way, because something happens between the blocks, has its inputs caught by running the
    model up to it again.

    Args:
        model: the model, in eval mode.
        names: of its blocks, in the order in which they run; each runs once in a forward.
        batches: the calibration batches.
        run: feeds one batch through the model.
        samples: a few samples to learn on, the same on every rank.
        context: entered around every run of a block, for its precision.
        device: where one block at a time is worked on; ``None`` leaves it where the model is.

    Raises:
        ValueError: if a block does not run once in a forward, or keeps a cache of past tokens.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3)) for _ in range(2))).eval()
        >>> blocks = BlockSequence(net, ["0", "1"], [torch.ones(4, 3), torch.zeros(2, 3)], net, torch.ones(2, 3))
        >>> for block in blocks:
        ...     block.name, block.groups({f"{block.name}.0": block.module[0]})
        ('0', [['0.0']])
        ('1', [['1.0']])
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Sequence[Any],
        run: Callable[[Any], Any],
        samples: Any,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        device: torch.device | str | None = None,
    ) -> None:
        self.names, self.batches, self.run = list(names), batches, run
        self.model, self.context, self.device = model, context, device
        self.modules = [model.get_submodule(name) for name in names]
        with caches_off(model):
            self.links = self._learn(samples)
        self._pooled = {source.value for link in self.links for source in link.sources if source.kind == "pool"}
        self._inputs: list[_Inputs] = []

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Block]:
        with caches_off(self.model):
            for number, (name, module) in enumerate(zip(self.names, self.modules, strict=True)):
                if not self.links[number].follows:
                    self._inputs = []
                    for batch in self.batches:
                        self._inputs.append(self._caught(number, batch))
                home = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
                with _moved(module, self.device, home):
                    block = Block(name, module, self, number, self.device or home)
                    yield block
                    if number + 1 < len(self) and self.links[number + 1].follows:
                        self._hand_on(block, home)
            self._inputs = []

    # ---------------------------------------------------------------- private

    def _learn(self, samples: Any) -> list[_Link]:
        plain, disturbed = self._watched(samples, disturb=False), self._watched(samples, disturb=True)
        links: list[_Link] = []
        known: dict[int, int] = {}  # tensors that no block has a part in, by id: numbers in the pool
        for number, (call, other) in enumerate(zip(plain, disturbed, strict=True)):
            last = plain[number - 1] if number else None
            before = {} if last is None else {
                (id(x), version): i for i, (x, version) in enumerate(zip(last.outputs, last.returned, strict=True))
            }  # fmt: skip
            sources: list[_Source] = []
            for leaf, twin, version in zip(call.inputs, other.inputs, call.given, strict=True):
                if not isinstance(leaf, Tensor):
                    sources.append(_Source("constant", leaf))
                elif (id(leaf), version) in before:
                    sources.append(_Source("output", before[id(leaf), version]))
                elif leaf.shape == twin.shape and torch.equal(leaf, twin):
                    new = id(leaf) not in known
                    sources.append(_Source("new" if new else "pool", known.setdefault(id(leaf), len(known))))
                else:
                    sources.append(_Source("caught", None))
            follows = number > 0 and all(source.kind not in ("new", "caught") for source in sources)
            links.append(_Link(call.spec, sources, follows, call.writes))
        return links

    def _watched(self, samples: Any, disturb: bool) -> list[_Seen]:
        """What goes into every block and comes out, in one forward; the tensors themselves."""
        seen: dict[int, list[_Seen]] = {number: [] for number in range(len(self))}

        def enter(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                leaves, spec = tree_flatten((args, kwargs))
                seen[number].append(_Seen(leaves, spec))

            return hook

        def leave(number: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                if disturb:
                    output = tree_map(_disturbed, output)
                seen[number][-1].returns(tree_flatten(output)[0])
                return output

            return hook

        with ExitStack() as stack:
            for number, module in enumerate(self.modules):
                stack.callback(module.register_forward_pre_hook(enter(number), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave(number), with_kwargs=True).remove)
            self.run(samples)
        for name, calls in zip(self.names, seen.values(), strict=True):
            if len(calls) != 1:
                raise ValueError(
                    f"`{name}` runs {len(calls)} times in one forward, but blocks are solved one after another, each "
                    f"in one run; name other ones with blocks=[...]"
                )
            cache = next((leaf for leaf in calls[0].inputs if "Cache" in type(leaf).__name__), None)
            if cache is not None:
                raise ValueError(
                    f"`{name}` is given a {type(cache).__name__}, which would grow with every run of it; let the "
                    f"calibration forward run without one (use_cache=False)"
                )
        return [calls[0] for calls in seen.values()]

    def _caught(self, number: int, batch: Any) -> _Inputs:
        """What a block is given now, by running the model up to it."""
        pool: dict[int, Tensor] = {}
        found: list[Any] = []

        def keep(place: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                leaves, _ = tree_flatten((args, kwargs))
                for i, source in enumerate(self.links[place].sources):
                    if source.kind == "new" and source.value in self._pooled:
                        pool[source.value] = leaves[i] = self._once(source.value, leaves[i])
                if place == number:
                    found.extend(leaves)
                    raise _Enough

            return hook

        with ExitStack() as stack:
            for place, module in enumerate(self.modules[: number + 1]):
                stack.callback(module.register_forward_pre_hook(keep(place), with_kwargs=True).remove)
            with suppress(_Enough):
                self.run(batch)
        return _Inputs(found, pool)

    def _once(self, number: int, leaf: Tensor) -> Tensor:
        """The tensor itself, or that of the first batch if it is the same, as masks and rotary tables are."""
        first = self._inputs[0].pool.get(number) if self._inputs else None
        same = first is not None and (first.shape, first.dtype) == (leaf.shape, leaf.dtype) and torch.equal(first, leaf)
        return first if first is not None and same else leaf

    def _arguments(self, number: int, inputs: _Inputs, device: torch.device | str) -> tuple[Any, Any]:
        link = self.links[number]
        moved = [leaf.to(device, copy=link.writes) if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves]
        args, kwargs = tree_unflatten(moved, link.spec)
        return args, kwargs

    def _hand_on(self, block: Block, home: torch.device) -> None:
        """Run a finished block, and put what it gives, with what the next one needs besides, in its inputs' place."""
        for number, inputs in enumerate(self._inputs):
            outputs = tree_flatten(block(number))[0]
            leaves: list[Any] = []
            for source in self.links[block.number + 1].sources:
                if source.kind == "output":
                    leaves.append(outputs[source.value].to(home))
                else:
                    leaves.append(inputs.pool[source.value] if source.kind == "pool" else source.value)
            self._inputs[number] = _Inputs(leaves, inputs.pool)


class Block:
    """One block, with the inputs of all batches.

    Args:
        name: of the block.
        module: the block itself.
        sequence: what it is a part of.
        number: its place there.
        device: where it is worked on.
    """

    def __init__(
        self, name: str, module: nn.Module, sequence: BlockSequence, number: int, device: torch.device | str
    ) -> None:
        self.name, self.module, self.number = name, module, number
        self._sequence, self._device = sequence, device
        self._calls: dict[str, int] = {}

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._sequence._inputs)

    def __call__(self, batch: int) -> Any:
        """Run the block, as it is now, on a batch of this number."""
        args, kwargs = self._sequence._arguments(self.number, self._sequence._inputs[batch], self._device)
        with self._sequence.context():
            return self.module(*args, **kwargs)

    def hidden(self, batch: int) -> Tensor:
        """The first floating tensor that the block is given: (samples, tokens, width) in a transformer."""
        leaves = self._sequence._inputs[batch].leaves
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()).to(self._device)

    def groups(self, layers: Mapping[str, nn.Module]) -> list[list[str]]:
        """Names of the layers that read the same tensor, in the order of their first call in the first batch.

        Layers that it does not reach come last, each for itself. Ranks agree.
        """
        readers: dict[tuple[Any, ...], list[str]] = {}
        held: list[Tensor] = []  # the storage of a tensor that is gone may be taken by another

        def see(name: str, layer: nn.Module, x: Tensor, batch: int) -> None:
            held.append(x)
            group = readers.setdefault((x.data_ptr(), x._version, x.shape, x.stride()), [])
            self._calls[name] = self._calls.get(name, 0) + 1
            if not any(name in others for others in readers.values()):
                group.append(name)

        if len(self):
            self._observe(layers, see, 0)
        groups, self._calls = merge_across_ranks((list(readers.values()), self._calls))[0]
        found: list[list[str]] = []
        for group in groups:  # a layer that also reads something else later shares with nobody
            alone = [name for name in group if self._calls[name] > 1]
            shared = [name for name in group if name not in alone]
            found += [[name] for name in alone] + ([shared] if shared else [])
        reached = {name for group in found for name in group}
        return found + [[name] for name in layers if name not in reached]

    def observe(self, layers: Mapping[str, nn.Module], see: See) -> None:
        """Run all batches, and show what the layers are given; what lies behind them in the block does not run.

        Args:
            layers: by name.
            see: gets the name, the layer, its input and the number of the batch.
        """
        for batch in range(len(self)):
            self._observe(layers, see, batch, {name: self._calls.get(name, 0) for name in layers})

    def _observe(
        self, layers: Mapping[str, nn.Module], see: See, batch: int, calls: dict[str, int] | None = None
    ) -> None:
        left = dict(calls or {})
        enough = bool(left) and all(left.values())  # only where every layer is known to run

        def hook(name: str) -> Callable[..., None]:
            def seen(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor))
                see(name, module, x, batch)
                if enough:
                    left[name] -= 1
                    if not any(left.values()):
                        raise _Enough

            return seen

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            with suppress(_Enough):
                self(batch)


class _Source(NamedTuple):
    """Where an argument of a block comes from.

    ``"constant"``: it is no tensor; ``"output"``: the block before; ``"pool"`` and ``"new"``: no block has a part in
    it, and an earlier block has it too or not; ``"caught"``: from anywhere.
    """

    kind: str
    value: Any


class _Link(NamedTuple):
    """How a block is fed: the tree of its arguments, their sources, if those are at hand, and if it writes to them."""

    spec: TreeSpec
    sources: list[_Source]
    follows: bool
    writes: bool


@dataclass
class _Inputs:
    """The arguments of the current block for one batch, and tensors that later ones will need."""

    leaves: list[Any]
    pool: dict[int, Tensor]


class _Seen:
    """One run of a block; what is written to in place shows in the versions of its tensors."""

    def __init__(self, inputs: list[Any], spec: TreeSpec) -> None:
        self.inputs, self.spec = inputs, spec
        self.given = _versions(inputs)
        self.writes = False

    def returns(self, outputs: list[Any]) -> None:
        self.outputs, self.returned = outputs, _versions(outputs)
        self.writes = self.given != _versions(self.inputs)


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves]


class _Enough(Exception):
    """What lies behind need not run."""


@contextmanager
def caches_off(model: nn.Module) -> Iterator[None]:
    """Let transformers' models compute without a cache of keys and values, which would grow with every run."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            configs[id(config)] = config
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


@contextmanager
def _moved(module: nn.Module, device: torch.device | str | None, home: torch.device) -> Iterator[None]:
    if device is None:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def _disturbed(x: Any) -> Any:
    return x + x.std() + 1 if isinstance(x, Tensor) and x.is_floating_point() else x
