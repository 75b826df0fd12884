"""How many bytes a model is, before and after quantization, as `save_quantized` stores it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_quant.layers import QuantizedLayer, created_biases
from lightning_quant.quantizers import Mask, Quantizer


@dataclass
class Sizes:
    """Bytes before and after.

    Args:
        before: of all parameters and buffers of the float model.
        after: of packed codes, scales, and what stays float.
        parameters: how many numbers the parameters are, shared ones counted once.
        layers: ``(before, after)`` of the weights of each quantized layer and their scales, by name.
    """

    before: int = 0
    after: int = 0
    parameters: int = 0
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times smaller the model has become."""
        return self.before / max(1, self.after)

    @property
    def bits(self) -> float:
        """Stored bits per parameter."""
        return 8 * self.after / max(1, self.parameters)


def model_sizes(model: nn.Module) -> Sizes:
    """Count the bytes of a quantized model, and those of the float model that it was.

    Example:
        >>> from lightning_quant.layers import quantize_layer
        >>> from lightning_quant.quantizers import Scheme
        >>> net = nn.Sequential(nn.Linear(16, 8))
        >>> twin = quantize_layer(net[0], Scheme.parse("int4_sym_tensor"), None)
        >>> twin.weight_quantizer.fit(twin.weight)
        >>> sizes = model_sizes(net)
        >>> sizes.before, sizes.after  # 8 biases; 128 codes of half a byte, a scale, a zero point, a flag
        (544, 105)
        >>> sizes.layers
        {'0': (512, 72)}
    """
    sizes = Sizes()
    codes = _packed_bytes(model)
    added = {f"{name}.bias" for name in created_biases(model)}
    added |= {f"{name}.folded" for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    quantizers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, (Quantizer, Mask)))
    parameters = {id(parameter) for parameter in model.parameters()}
    seen: set[tuple[int, object, object]] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or key.startswith("lightning_quant: "):
            continue
        place = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and place in seen:  # shared with another layer
            continue
        seen.add(place)
        sizes.after += codes.get(id(value), value.nbytes)
        if key not in added and not key.startswith(quantizers):
            sizes.before += value.nbytes
            sizes.parameters += value.numel() if id(value) in parameters else 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and (module.weight_quantizers() or module.masks()):
            states = [*module.weight_quantizers().values(), *module.masks().values()]
            weights = [getattr(module, name) for name in {**module.weight_quantizers(), **module.masks()}]
            buffers = [buffer for state in states for buffer in state.state_dict(keep_vars=True).values()]
            state = sum(codes.get(id(buffer), buffer.nbytes) for buffer in buffers)
            now = sum(codes.get(id(weight), weight.nbytes) for weight in weights)
            sizes.layers[name] = (sum(weight.nbytes for weight in weights), now + state)
    return sizes


def _packed_bytes(model: nn.Module) -> dict[int, int]:
    """Bytes of what is stored packed, by id: codes, kept weights and masks.

    A weight that a float layer reads as well stays float.
    """
    found = {}
    readers = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if not isinstance(module, QuantizedLayer):
            continue
        quantizers, masks = module.weight_quantizers(), module.masks()
        for name in {**quantizers, **masks}:
            weight = getattr(module, name)
            if readers[id(weight)] > 1:
                continue
            if name in quantizers:
                found[id(weight)] = -(-weight.numel() * quantizers[name].scheme.bits // 8)
                if quantizers[name].codes is not None:
                    found[id(quantizers[name].codes)] = 0  # those are they
            if name in masks:
                mask = masks[name]
                found[id(mask.keep)] = -(-mask.keep.numel() // 8)
                found |= {id(part): 0 for part in (mask.offset, mask.before) if part is not None}
                if name not in quantizers:
                    found[id(weight)] = int(mask.keep.sum()) * weight.element_size()
    return found
