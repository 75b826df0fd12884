"""Turn a float layer into its quantized twin in place, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from lightning_quant.layers.attention import AttentionSchemes, QuantAttention
from lightning_quant.layers.base import QuantizedLayer
from lightning_quant.layers.conv import QuantConv1d, QuantConv2d
from lightning_quant.layers.linear import QuantEmbedding, QuantLinear, QuantOutProjection
from lightning_quant.layers.multihead import QuantMultiheadAttention
from lightning_quant.layers.routing import AttentionSite, site_class
from lightning_quant.quantizers import Pattern, Scheme

TWINS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    NonDynamicallyQuantizableLinear: QuantOutProjection,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Embedding: QuantEmbedding,
    nn.MultiheadAttention: QuantMultiheadAttention,
}


def twin_of(layer: nn.Module) -> type[QuantizedLayer] | None:
    """The quantized class for a layer of exactly this type, its own if it is quantized; ``None`` where there is none.

    >>> twin_of(nn.Linear(2, 2)).__name__
    'QuantLinear'
    >>> twin_of(nn.LayerNorm(2)) is None
    True
    """
    if isinstance(layer, QuantizedLayer):
        return type(layer)
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and type(layer) is pytorch_utils.Conv1D:
        from lightning_quant.layers.conv1d_transformers import QuantConv1D

        return QuantConv1D
    conv2d_same = sys.modules.get("timm.layers.conv2d_same")
    if conv2d_same is not None and type(layer) is conv2d_same.Conv2dSame:
        from lightning_quant.layers.conv2d_same_timm import QuantConv2dSame

        return QuantConv2dSame
    return TWINS.get(type(layer))


def dilatable(layer: nn.Module) -> bool:
    """Whether the input channels of a layer can be divided, and the weights that read them multiplied.

    >>> dilatable(nn.Linear(2, 2)), dilatable(nn.Conv2d(4, 4, 3, groups=2)), dilatable(nn.Embedding(2, 2))
    (True, False, False)
    """
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and getattr(layer, "groups", 1) == 1


def weight_rows(layer: nn.Module) -> Tensor:
    """The weight of a float or quantized layer with output channels first: (out, ...); a view of the Parameter."""
    twin = twin_of(layer)
    weight = cast(Tensor, layer.weight)
    return weight.t() if twin is not None and twin.transposed else weight


def why_not_swappable(layer: nn.Module) -> str | None:
    """Why a layer's class must not be changed although its type is known, or ``None`` if it may.

    >>> why_not_swappable(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    'its weight is parametrized'
    """
    if is_parametrized(layer):
        return "its weight is parametrized"
    if "forward" in layer.__dict__:
        return "it has a forward of its own on the instance"
    if isinstance(layer, nn.MultiheadAttention) and type(layer.out_proj) is not NonDynamicallyQuantizableLinear:
        return f"its output projection is a {type(layer.out_proj).__name__}"
    return None


def quantize_layer(
    layer: nn.Module,
    weights: Scheme | None,
    inputs: Scheme | None,
    pruned: Pattern | None = None,
    biases: Scheme | None = None,
) -> QuantizedLayer:
    """Turn a layer into its (uncalibrated) quantized twin; the object and its Parameters stay the same.

    One that another method works on already gets what is given here beside that.

    >>> layer = nn.Linear(4, 2)
    >>> weight = layer.weight
    >>> twin = quantize_layer(layer, Scheme.parse("int8_sym_channel"), None)
    >>> twin is layer, type(twin).__name__, twin.weight is weight
    (True, 'QuantLinear', True)
    """
    twin = twin_of(layer)
    if twin is None or (reason := why_not_swappable(layer)):
        raise TypeError(f"no quantized twin for a {type(layer).__name__}" if twin is None else f"cannot swap: {reason}")
    layer.__class__ = twin
    assert isinstance(layer, QuantizedLayer)
    layer.add_quantizers(weights, inputs, pruned, biases)
    return layer


def release(layer: nn.Module, slots: Iterable[str]) -> None:
    """Empty slots of a quantized layer; it is float again when nothing is left in any.

    >>> layer = quantize_layer(nn.Linear(4, 2), Scheme.parse("int8_sym_channel"), None, Pattern.parse("2:4"))
    >>> release(layer, ["weights"])
    >>> sorted(layer.filled())
    ['pruned']
    >>> release(layer, ["pruned"])
    >>> type(layer).__name__
    'Linear'
    """
    if isinstance(layer, QuantizedLayer):
        for slot in slots:
            layer.empty(slot)
        if not layer.filled():
            restore(layer)


def quantize_attention(
    module: nn.Module,
    schemes: AttentionSchemes,
    fused: int = 1,
    spelled: Sequence[tuple[int, int, int]] = (),
    functional: Sequence[str] = (),
) -> None:
    """Route the attention calls in a module's forward to quantized attention.

    With nothing to route, torch still keeps off the fused fast paths that would pass quantized children by.

    Args:
        module: the module whose forward attends.
        schemes: the formats of the operands.
        fused: how often it calls ``scaled_dot_product_attention`` in one forward.
        spelled: positions of the matmuls and softmaxes of attention that is spelled out.
        functional: names of quantized children whose weight its forward reads.
    """
    if isinstance(module, QuantMultiheadAttention):
        if not schemes.empty:
            module.add_attention(schemes)
        return
    if not isinstance(module, AttentionSite):
        module.__class__ = site_class(type(module))
        assert isinstance(module, AttentionSite)
        module.attention_quantizers, module.spelled, module.functional, module.plans = nn.ModuleList(), [], [], 0
    module.plans += 1
    module.functional = [*module.functional, *(name for name in functional if name not in module.functional)]
    if fused or spelled:
        weight = next(module.parameters(), None)
        quantizers = nn.ModuleList(QuantAttention(schemes) for _ in range(fused + len(spelled)))
        quantizers.to(None if weight is None else weight.device).train(module.training)
        module.attention_quantizers = quantizers
        module.spelled = [(first, softmax, second) for first, softmax, second in spelled]


def release_attention(module: nn.Module, quantized: bool) -> None:
    """Take one plan out of a module that attends; it is what it was when no plan is left.

    Args:
        module: the module whose forward attends.
        quantized: whether the plan quantized the operands, or only had the calls routed.
    """
    if isinstance(module, QuantMultiheadAttention):
        if quantized:
            module.add_attention(AttentionSchemes(None, None, None, None))
    elif isinstance(module, AttentionSite):
        module.plans -= 1
        if quantized:
            module.attention_quantizers, module.spelled = nn.ModuleList(), []
        if not module.plans:
            restore(module)


def restore(module: nn.Module) -> None:
    """Give a swapped layer or attention site its float class back; its Parameters stay as they are."""
    if isinstance(module, QuantizedLayer):
        module.drop_quantizers()
    elif isinstance(module, AttentionSite):
        del module.attention_quantizers, module.spelled, module.functional, module.plans
    if isinstance(module, (QuantizedLayer, AttentionSite)):
        module.__class__ = module.float_class  # type: ignore[assignment]


def create_bias(module: nn.Module, like: Tensor) -> None:
    """Give a layer without bias one of zeros; a state dict that has none drops it again."""
    module.register_parameter("bias", nn.Parameter(like.detach().clone().zero_()))
    module.register_load_state_dict_pre_hook(_drop_bias)


def created_biases(model: nn.Module) -> list[str]:
    """Names of the modules whose bias is a created one."""
    return [
        name
        for name, module in model.named_modules()
        if any(getattr(hook, "hook", hook) is _drop_bias for hook in module._load_state_dict_pre_hooks.values())
    ]


def drop_bias(module: nn.Module) -> None:
    """Take a created bias away."""
    module.register_parameter("bias", None)
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _drop_bias]:
        del hooks[key]


def _drop_bias(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    if f"{prefix}bias" not in state_dict:
        drop_bias(module)
