"""How many bytes a model is, before and after quantization, as `save_quantized` stores it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_quant.layers import QuantizedLayer, created_biases
from lightning_quant.quantizers import Quantizer


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
    quantizers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Quantizer))
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
        if isinstance(module, QuantizedLayer) and module.weight_quantizers():
            weights = {getattr(module, weight): q for weight, q in module.weight_quantizers().items()}
            state = sum(buffer.nbytes for quantizer in weights.values() for buffer in quantizer.state_dict().values())
            now = sum(codes.get(id(weight), weight.nbytes) for weight in weights)
            sizes.layers[name] = (sum(weight.nbytes for weight in weights), now + state)
    return sizes


def _packed_bytes(model: nn.Module) -> dict[int, int]:
    """Bytes of the codes of each weight that has codes, by id; one that a float layer reads as well stays float."""
    found = {}
    readers = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            for name, quantizer in module.weight_quantizers().items():
                weight = getattr(module, name)
                if readers[id(weight)] <= 1:
                    found[id(weight)] = -(-weight.numel() * quantizer.scheme.bits // 8)
    return found
