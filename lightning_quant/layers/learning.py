"""Let the scales of a quantized model be learned, and let them rest again."""

from __future__ import annotations

from torch import nn

from lightning_quant.layers.plan import Plan
from lightning_quant.quantizers import (
    LearnedQuantizer,
    LearnedStepQuantizer,
    Quantizer,
    StepQuantizer,
    UniformQuantizer,
)

Learned = LearnedQuantizer | LearnedStepQuantizer


def learn_scales(model: nn.Module, plan: Plan, offsets: bool = False) -> None:
    """Put learned quantizers, with the same state, in the place of a plan's static uniform ones.

    Dynamic formats have no scale to learn; float and logarithmic ones keep theirs.

    Args:
        model: a calibrated model.
        plan: what was done to it.
        offsets: whether the zero points of asymmetric activations are learned too. Those of weights are not: they
            have to be integers for the weights to have codes.

    >>> from lightning_quant.layers import LayerPlan
    >>> net = nn.Sequential(nn.Linear(4, 2))
    >>> plan = Plan("Demo", {}, layers={"0": LayerPlan("int8_sym_channel", None)})
    >>> plan.apply(net)
    >>> net[0].weight_quantizer.fit(net[0].weight)
    >>> learn_scales(net, plan)
    >>> [name for name, _ in net.named_parameters()]
    ['0.weight', '0.bias', '0.weight_quantizer.scale']
    >>> settle_scales(net, plan)
    >>> [name for name, _ in net.named_parameters()]
    ['0.weight', '0.bias']
    """
    for name, quantizer in plan.quantizers(model).items():
        learn_scale(model, name, offsets and quantizer.axis != 0)


def has_scale_to_learn(quantizer: nn.Module) -> bool:
    """Whether this is a static uniform quantizer, or a table of them, that does not learn yet and may.

    >>> has_scale_to_learn(UniformQuantizer("int8_sym_channel", axis=0)), has_scale_to_learn(nn.Identity())
    (True, False)
    """
    if type(quantizer) not in (UniformQuantizer, StepQuantizer):
        return False
    assert isinstance(quantizer, UniformQuantizer)
    return not quantizer.scheme.dynamic and not quantizer.keeps_range


def learn_scale(model: nn.Module, name: str, offset: bool = False) -> Learned | None:
    """Put a learned quantizer in the place of one of this name; ``None`` if its format has nothing to learn."""
    quantizer = model.get_submodule(name)
    if not has_scale_to_learn(quantizer):
        return None
    assert isinstance(quantizer, UniformQuantizer)
    learned: Learned
    if isinstance(quantizer, StepQuantizer):
        learned = LearnedStepQuantizer(quantizer, offset)
    else:
        learned = LearnedQuantizer.of(quantizer, offset and not quantizer.scheme.symmetric)
    _replace(model, name, learned)
    return learned


def settle_scales(model: nn.Module, plan: Plan) -> None:
    """Put plain quantizers, with the same state, in the place of learned ones."""
    for name in learned_quantizers(model, plan):
        settle_scale(model, name)


def settle_scale(model: nn.Module, name: str) -> None:
    """Put a plain quantizer in the place of a learned one of this name."""
    quantizer = model.get_submodule(name)
    assert isinstance(quantizer, (LearnedQuantizer, LearnedStepQuantizer))
    _replace(model, name, quantizer.settled())


def learned_quantizers(model: nn.Module, plan: Plan) -> dict[str, LearnedQuantizer]:
    """The learned quantizers of a plan, by full name."""
    return {name: q for name, q in plan.quantizers(model).items() if isinstance(q, LearnedQuantizer)}


def learned_parameters(model: nn.Module, plan: Plan) -> dict[str, tuple[nn.Parameter, nn.Parameter | None]]:
    """The learned scales and zero points by full name, each with a weight that it is trained together with.

    That is the nearest Parameter above it in the tree of modules, if there is one.
    """
    learned = learned_quantizers(model, plan)
    own = {id(parameter) for quantizer in learned.values() for parameter in quantizer.parameters()}
    found: dict[str, tuple[nn.Parameter, nn.Parameter | None]] = {}
    for name, quantizer in learned.items():
        weight, owner = None, name
        while weight is None and owner:
            owner = owner.rpartition(".")[0]
            weight = next((p for p in model.get_submodule(owner).parameters() if id(p) not in own), None)
        found |= {f"{name}.{key}": (parameter, weight) for key, parameter in quantizer.named_parameters()}
    return found


def _replace(model: nn.Module, name: str, quantizer: Quantizer) -> None:
    owner, _, child = name.rpartition(".")
    model.get_submodule(owner).add_module(child, quantizer)
