"""Learn the structure of a model by running it once.

One real batch goes through the model while module hooks keep track of where we are and a torch function mode sees
every call. Tensors that come out of a norm are followed through views, so that we know who reads them: a norm whose
every reader is a linear layer can be folded into it. Nothing is traced symbolically, so control flow in Python is no
obstacle.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class NormPair:
    """A norm and the linear layers that are its only readers."""

    norm: str
    linears: tuple[str, ...]


@dataclass
class ModelGraph:
    """What one forward told about a model. Names are relative to the traced module.

    Args:
        order: names of the modules that ran, in the order of their first call.
        pairs: norms that can be folded into the linears behind them.
        unfoldable: why a norm cannot be folded, by its name.
        attention: how often a module calls ``scaled_dot_product_attention`` in one forward, by its name.
        blocks: names of the repeated blocks, in the order of their first call.
    """

    order: list[str] = field(default_factory=list)
    pairs: list[NormPair] = field(default_factory=list)
    unfoldable: dict[str, str] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)


def trace(module: nn.Module, run: Callable[[], Any]) -> ModelGraph:
    """Run a model once and tell its structure.

    Args:
        module: the module whose names are used.
        run: runs one forward of the module, or of something that contains it.

    >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    >>> graph = trace(net, lambda: net(torch.ones(2, 4)))
    >>> graph.order
    ['', '0', '1', '2', '3']
    >>> graph.pairs
    [NormPair(norm='0', linears=('1',))]
    """
    recorder = _Recorder(module)
    # A compiled model would run without its hooks.
    with torch.compiler.set_stance("force_eager"), recorder.watching(), recorder, torch.no_grad():
        recorder.read_by_caller(run())
    return recorder.graph()


class _Recorder(TorchFunctionMode):
    """Sees every torch function and keeps what the graph is made of."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names = {child: name for name, child in module.named_modules()}
        self.owners = {id(p): name for name, child in module.named_modules() for p in child.parameters(recurse=False)}
        owned = Counter(id(p) for child in module.modules() for p in child.parameters(recurse=False))
        self.tied = {key for key, count in owned.items() if count > 1}
        self.stack: list[str] = []
        self.order: dict[str, None] = {}
        self.attention_calls: dict[str, Counter[str]] = {}  # by site: calls in each of its forwards
        self.followed: dict[int, tuple[Tensor, str]] = {}  # id -> (kept alive, since ids are reused; its norm)
        self.readers: dict[str, list[str]] = {}  # norm -> linears
        self.obstacles: dict[str, str] = {}  # norm -> why it cannot be folded
        self.foreign: dict[str, str] = {}  # linear -> what else it reads
        self.attention: dict[str, int] = {}
        self.current_calls: list[int] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module, for as long as this lasts."""
        handles = []
        for child, name in self.names.items():
            handles.append(child.register_forward_pre_hook(self._enter(name)))
            handles.append(child.register_forward_hook(self._leave(name), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.stack.append(name)
            self.current_calls.append(0)
            self.order.setdefault(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            calls = self.current_calls.pop()
            if calls:
                self.attention[name] = max(calls, self.attention.get(name, 0))

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.current_calls:
            self.current_calls[-1] += 1
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not tensors:  # shapes, dtypes and the like are asked, not read
            return out
        read = {norm for x in tree_leaves((args, kwargs)) if (norm := self._norm_of(x)) is not None}
        if func is F.layer_norm:
            self._saw_norm(args, kwargs, out)
        if func is F.linear:
            self._saw_linear(args, kwargs, read)
        elif len(read) == 1 and _keeps_channels(func, args, kwargs, out):
            self._follow(tensors, *read)
        else:
            self._obstruct(read, f"it is also read by `{getattr(func, '__name__', func)}`")
        return out

    def _norm_of(self, x: Any) -> str | None:
        found = self.followed.get(id(x))
        return None if found is None else found[1]

    def _follow(self, tensors: list[Tensor], norm: str) -> None:
        for x in tensors:
            self.followed[id(x)] = (x, norm)

    def _obstruct(self, norms: set[str], why: str) -> None:
        for norm in norms:
            self.obstacles.setdefault(norm, why)

    def _saw_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        norm = self.owners.get(id(weight))
        if norm is None or weight is None:
            return  # without an affine there is nothing to fold into
        self.readers.setdefault(norm, [])
        self._follow([out], norm)
        if id(weight) in self.tied:
            self._obstruct({norm}, "its weight is shared with another layer")
        if weight.dim() != 1:
            self._obstruct({norm}, "it normalises more than the last axis")

    def _saw_linear(self, args: tuple[Any, ...], kwargs: dict[str, Any], read: set[str]) -> None:
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        linear, norm = self.owners.get(id(weight)), self._norm_of(x)
        if linear is None or len(read) > 1 or (read and norm is None):
            self._obstruct(read, "it is also read by a linear function whose weight belongs to no layer")
            return
        if id(weight) in self.tied:
            self.foreign.setdefault(linear, "its weight is shared")
        if norm is None:
            self.foreign.setdefault(linear, "another tensor")
        elif linear not in self.readers[norm]:
            self.readers[norm].append(linear)

    def read_by_caller(self, output: Any) -> None:
        """Whatever the model returns is read by somebody we cannot see."""
        self._obstruct(
            {norm for x in tree_leaves(output) if (norm := self._norm_of(x))}, "it is an output of the model"
        )

    def graph(self) -> ModelGraph:
        """Put together what was seen."""
        norms_of = Counter(linear for linears in self.readers.values() for linear in linears)
        pairs, unfoldable = [], dict(self.obstacles)
        for norm, linears in self.readers.items():
            shared = [name for name in linears if name in self.foreign or norms_of[name] > 1]
            if shared:
                unfoldable.setdefault(norm, f"`{shared[0]}` also reads something else, or shares its weight")
            elif not linears:
                unfoldable.setdefault(norm, "no linear layer reads it")
            if norm not in unfoldable:
                pairs.append(NormPair(norm, tuple(linears)))
        return ModelGraph(list(self.order), pairs, unfoldable, dict(self.attention), self._blocks())

    def _blocks(self) -> list[str]:
        """Members of lists or sequences that hold two or more of one class, outermost only."""
        blocks: list[str] = []
        for name in self.order:
            parent, _, _ = name.rpartition(".")
            siblings = Counter(type(m) for m in self.module.get_submodule(parent).children()) if name else Counter()
            container = isinstance(self.module.get_submodule(parent), (nn.ModuleList, nn.Sequential)) if name else False
            child = self.module.get_submodule(name)
            repeated = container and siblings[type(child)] > 1 and next(child.children(), None) is not None
            if repeated and not any(name.startswith(f"{block}.") for block in blocks):
                blocks.append(name)
        return blocks


_VIEWS = {
    "reshape",
    "view",
    "flatten",
    "unflatten",
    "contiguous",
    "unsqueeze",
    "squeeze",
    "clone",
    "detach",
    "expand",
    "expand_as",
}
_DTYPE = {"to", "float", "half", "bfloat16", "double", "type_as", "type"}


def _keeps_channels(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """Whether a call only moves whole channel vectors (the last axis) around."""
    name = getattr(func, "__name__", "")
    x = args[0] if args else None
    if not isinstance(x, Tensor):
        return False
    if name == "dropout":
        return not (args[2] if len(args) > 2 else kwargs.get("training", True))
    if name in _DTYPE:
        return True
    outs = [o for o in tree_leaves(out) if isinstance(o, Tensor)]
    if any(o.dim() == 0 or o.shape[-1] != x.shape[-1] for o in outs):
        return False
    last = {-1, x.dim() - 1}
    if name in _VIEWS:
        return True
    if name == "pad":
        return all(o.shape == x.shape for o in outs)
    if name in {"transpose", "swapaxes"}:
        return not last & set(args[1:3])
    if name == "permute":
        dims = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        return dims[-1] in last
    if name in {"chunk", "split", "unbind", "roll", "flip", "select", "narrow", "index_select"}:
        dims = kwargs.get(
            "dim", kwargs.get("dims", args[1] if name in {"unbind", "select", "narrow", "index_select"} else args[-1])
        )
        return not last & set(dims if isinstance(dims, (tuple, list)) else [dims])
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
            return (
                bool(index[-1] == slice(None))
                if not isinstance(index[-1], Tensor) and index[-1] is not Ellipsis
                else True
            )
        taken = sum(1 for i in index if i is not None)
        return taken < x.dim() or index[-1] == slice(None)
    return False
