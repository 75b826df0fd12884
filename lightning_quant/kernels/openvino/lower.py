"""One call of a module, traced into a graph and compiled by OpenVINO.

Shapes, dtypes and all arguments that are no tensors are those of the call. Tracing runs the module on tensors that have
no values, so a module whose Python asks for one is refused rather than frozen in the way that it took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant.kernels.openvino.grids import LEVELS, as_fake_quantize
from lightning_quant.layers import QuantAttention, QuantizedLayer

FAKE_QUANTIZE = torch.ops.lightning_quant.fake_quantize.default
# What may stand between a rounded operand and its product.
_LAYOUT = {"t", "transpose", "permute", "view", "expand", "clone", "slice", "unsqueeze", "squeeze", "_unsafe_view"}
_PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "convolution"}
PRODUCTS_OF_BYTES = ("u8", "i8")
DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
# How far the answer may be from the simulated one, relative to its norm: roundings that fell on the other side.
TOLERANCE = 0.2


class NotLowered(Exception):
    """Why OpenVINO does not answer for a module."""


@dataclass(frozen=True)
class Call:
    """The arguments of a call, taken apart.

    Args:
        tensors: those among the arguments.
        key: all else that there is to know: structure, shapes, dtypes and plain values.
        leaves: the arguments in order.
        structure: how they were nested.
    """

    tensors: tuple[Tensor, ...]
    key: tuple[Any, ...]
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Take arguments apart.

        Raises:
            NotLowered: if there is something other than tensors and plain values.
        """
        leaves, structure = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
                raise NotLowered(f"it is given a {type(leaf).__name__}")
            if isinstance(leaf, Tensor) and (leaf.dtype not in DTYPES or leaf.device.type != "cpu"):
                raise NotLowered(f"it is given {leaf.dtype} on {leaf.device}")
        described = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        if not tensors:
            raise NotLowered("it is given no tensor")
        return cls(tensors, (str(structure), described), tuple(leaves), structure)

    def with_other(self, tensors: tuple[Tensor, ...]) -> Call:
        """The same call of other tensors."""
        return replace(self, tensors=tensors)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments again, with other tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs


class Lowered:
    """A call of a module as OpenVINO answers it.

    Args:
        compiled: OpenVINO's model.
        inputs: which of the call's tensors are its inputs, in order.
        answer: the simulated answer, taken apart.
        structure: how that was nested.
        on_bytes: by the name of a layer or attention, whether its products are of bytes.
    """

    def __init__(
        self,
        compiled: Any,
        inputs: list[int],
        answer: list[Any],
        structure: pytree.TreeSpec,
        on_bytes: dict[str, bool],
    ) -> None:
        self.compiled, self.inputs, self.structure, self.on_bytes = compiled, inputs, structure, on_bytes
        self._answer = [None if isinstance(leaf, Tensor) else leaf for leaf in answer]
        self._tensors = [place for place, leaf in enumerate(answer) if isinstance(leaf, Tensor)]

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        """Answer the call for these tensors."""
        arrays = [tensors[place].detach().contiguous().numpy() for place in self.inputs]
        results = self.compiled(arrays, share_inputs=True)
        leaves = list(self._answer)
        for port, place in enumerate(self._tensors):
            leaves[place] = torch.from_numpy(results[port])
        return pytree.tree_unflatten(leaves, self.structure)


def lower(
    module: nn.Module,
    forward: Callable[..., Any],
    call: Call,
    simulated: Any,
    places: Mapping[str, QuantizedLayer | QuantAttention],
) -> Lowered:
    """Compile a call of a module.

    Args:
        module: whose call this is.
        forward: computes it, with simulated layers.
        call: the arguments.
        simulated: what ``forward`` answers; OpenVINO has to come close to it.
        places: the quantized layers and attentions inside, by name.

    Raises:
        NotLowered: saying why it cannot be done.
    """
    answer, structure = pytree.tree_flatten(simulated)
    for leaf in answer:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise NotLowered(f"it returns a {type(leaf).__name__}")
        if isinstance(leaf, Tensor) and leaf.dtype not in DTYPES:
            raise NotLowered(f"it returns {leaf.dtype}")
    try:
        graph = _trace(module, forward, call, places)
        compiled, inputs = _compile(graph, call)
    except NotLowered:
        raise
    except Exception as error:  # whatever the tracer or the converter cannot do
        raise NotLowered(_in_short(error)) from error
    lowered = Lowered(compiled, inputs, answer, structure, _on_bytes(graph, compiled))
    if len(compiled.outputs) != len(lowered._tensors):
        raise NotLowered("some of what it returns is one and the same")
    _require_the_same(lowered(call.tensors), simulated)
    return lowered


def _trace(
    module: nn.Module,
    forward: Callable[..., Any],
    call: Call,
    places: Mapping[str, QuantizedLayer | QuantAttention],
) -> torch.fx.GraphModule:
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import get_export_decomposition_list
    from torch._decomp import get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    def tensors_of(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = call.with_tensors(tensors)
        return [leaf for leaf in pytree.tree_leaves(forward(*args, **kwargs)) if isinstance(leaf, Tensor)]

    with torch.inference_mode(False), torch.no_grad(), as_fake_quantize(places):
        before = {part: (dict(vars(part)), dict(part._buffers)) for part in module.modules()}
        tensors = tuple(tensor.clone() for tensor in call.tensors)
        table: Any = get_decompositions(get_export_decomposition_list())
        try:
            function = torch.func.functionalize(tensors_of)  # OpenVINO knows few operators that work in place
            graph = make_fx(function, table, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        finally:
            changed = [part for part, state in before.items() if _changed(part, *state)]
            for part in changed:
                vars(part).clear()
                vars(part).update(before[part][0])
                part._buffers.clear()
                part._buffers.update(before[part][1])
    if changed:
        kind = getattr(changed[0], "own_class", type(changed[0])).__name__
        raise NotLowered(f"its forward changes what a {kind} holds")
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.args[0].op in ("get_attr", "placeholder"):
            raise NotLowered(f"its forward changes a tensor in place that is not its own, by {node.target}")
    return graph


def _changed(part: nn.Module, attributes: dict[str, Any], buffers: dict[str, Any]) -> bool:
    return any(
        now.keys() != before.keys() or any(now[name] is not before[name] for name in now)
        for now, before in ((vars(part), attributes), (part._buffers, buffers))
    )


def _compile(graph: torch.fx.GraphModule, call: Call) -> tuple[Any, list[int]]:
    """OpenVINO's model of a graph, and which tensors of the call are its inputs."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch import ConversionExtension
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.opset14 import constant, fake_quantize, power

    def convert(context: Any) -> Any:
        x, lowest, highest = (context.get_input(place) for place in range(3))
        return fake_quantize(x, lowest, highest, lowest, highest, LEVELS).outputs()

    def power_of_two(context: Any) -> Any:
        return power(constant(numpy.float32(2)), context.get_input(0)).outputs()

    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    shapes = [tensor.shape for tensor in call.tensors]
    dtypes = [tensor.dtype for tensor in call.tensors]
    frontend = FrontEndManager().load_by_framework("pytorch")
    frontend.add_extension(ConversionExtension("lightning_quant.fake_quantize.default", convert))
    frontend.add_extension(ConversionExtension("aten.exp2.default", power_of_two))
    decoder = TorchFXPythonDecoder(graph, input_shapes=shapes, input_types=dtypes)  # has to outlive the conversion
    model = frontend.convert(frontend.load(decoder))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    if len(compiled.inputs) == len(names):
        return compiled, list(range(len(names)))
    read = [port.get_names() for port in compiled.inputs]  # what the module does not look at is no input
    return compiled, [next(place for place, name in enumerate(names) if name in found) for found in read]


def _on_bytes(graph: torch.fx.GraphModule, compiled: Any) -> dict[str, bool]:
    """Whether the products of every layer and attention are of bytes in what OpenVINO runs."""
    ran: dict[str, bool] = {}
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        on_bytes = facts["runtimePrecision"].astype(str) in PRODUCTS_OF_BYTES
        for original in facts["originalLayersNames"].astype(str).split(","):
            name = original.split("/")[0]
            ran[name] = ran.get(name, False) or on_bytes
    found: dict[str, bool] = {}
    for node in graph.graph.nodes:
        if node.target is FAKE_QUANTIZE:
            owner = node.args[3]
            for product in _products(node):
                found[owner] = found.get(owner, True) and ran.get(product.name, False)
    return found


def _products(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The products that an operand goes into."""
    found = []
    for user in node.users:
        name = getattr(user.target, "__name__", str(user.target)).split(".")[0]
        if name in _PRODUCTS:
            found.append(user)
        elif name in _LAYOUT:
            found += _products(user)
    return found


def _require_the_same(answer: Any, simulated: Any) -> None:
    for found, wanted in zip(pytree.tree_leaves(answer), pytree.tree_leaves(simulated), strict=True):
        if not isinstance(wanted, Tensor):
            continue
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise NotLowered(f"OpenVINO answers {found.dtype} {tuple(found.shape)} instead of {wanted.dtype} "
                             f"{tuple(wanted.shape)}")  # fmt: skip
        if wanted.is_floating_point():
            known = wanted.isfinite()
            far = (found - wanted)[known].norm() > TOLERANCE * wanted[known].norm() + 1e-6
            if bool(far) or not torch.equal(known, found.isfinite()):
                raise NotLowered("OpenVINO answers something else than what was simulated")


def _in_short(error: Exception) -> str:
    """The line of an error that tells most."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Check ", "Exception ", "FrontEnd API", "Converting input"))]
    telling = [line for line in lines if "No conversion rule" in line]
    return f"{type(error).__name__}: {(telling or told or lines or [''])[0]}"
