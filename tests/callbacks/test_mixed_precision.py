"""Mixed precision: what it chooses stays within what was asked, and what cannot be done is said before it is begun."""

import copy
import itertools
import json

import pytest
import torch

from lightning_quant import (
    MixedPrecision,
    PostTrainingQuantization,
    QuantReport,
    RepQViT,
    load_quantized,
    save_quantized,
)
from lightning_quant.callbacks import kernel_latency
from lightning_quant.callbacks.inner_method import with_bits
from lightning_quant.checkpoint import record_of
from lightning_quant.quantizers import Scheme
from lightning_quant.reports import model_sizes
from lightning_quant.solvers import Point
from lightning_quant.solvers.products import Slot, formats_of
from tests.callbacks.unchanged import refused
from tests.models import Sequences, TinyTransformer, trainer, validate


def bits_in(model):
    (plan,) = record_of(model).plans.values()
    return {slot: Scheme.parse(text).bits for slot, text in formats_of(plan).items()}


def chosen(**arguments):
    model, callback = TinyTransformer(), MixedPrecision(**arguments)
    validate(model, callback)
    assert bits_in(model) == callback.choice.bits
    return model, callback.choice


@pytest.mark.parametrize("sensitivity", ["hessian", "patch", "snip", "snr", "lrp"])
def test_every_producer_leads_to_a_model_within_the_budget(sensitivity):
    _, choice = chosen(budget="4.0bit", sensitivity=sensitivity)
    costs = choice.point.costs
    assert costs["weight bits"] <= 4.0 + 1e-6 and costs["activation bits"] <= 4.0 + 1e-6
    assert costs["BitOps"] <= 16 * sum(product.macs for product in choice.allocation.products) * (1 + 1e-6)
    assert len(set(choice.bits.values())) > 1


@pytest.mark.parametrize("search", ["integer_program", "pareto", "greedy", "trade_off"])
def test_every_search_leads_to_a_model_within_the_budget(search):
    _, choice = chosen(budget="4.5bit", search=search, weight_bits=[3, 4, 6], activation_bits=[4, 6])
    assert choice.point.costs["activation bits"] <= 4.5 + 1e-6
    assert all(bits in (3, 4, 6) if slot.is_weight else bits in (4, 6) for slot, bits in choice.bits.items())


def test_the_integer_program_of_a_small_net_is_brute_force():
    _, choice = chosen(budget="5bit", target="blocks.0", weight_bits=[4, 8], attention=False)
    decisions = choice.allocation.decisions
    limits = dict.fromkeys(("weight bits", "activation bits"), 5.0)
    limits["BitOps"] = 25 * sum(product.macs for product in choice.allocation.products)
    every = (Point.of(decisions, some) for some in itertools.product(*(range(len(d.losses)) for d in decisions)))
    best = min((point for point in every if point.within(limits)), key=lambda point: point.loss)
    assert len(decisions) == 5 and choice.point.loss == pytest.approx(best.loss, rel=1e-6)


def test_a_budget_of_bytes_is_the_size_of_the_saved_model():
    model, choice = chosen(budget=["7.8kB", "12bit"])
    assert model_sizes(model).after == choice.point.costs["bytes"] <= 7800


def test_costs_are_those_of_a_direct_count():
    model, choice = chosen(budget="4bit")
    bits = choice.bits
    weights = {name: model.get_submodule(name).weight.numel() for name, part in bits if part == "weights"}
    mean = sum(count * bits[Slot(name, "weights")] for name, count in weights.items()) / sum(weights.values())
    assert choice.point.costs["weight bits"] == pytest.approx(mean)
    tokens, width = 5, 16
    elements = {"embed": 80, "head": 16} | {f"blocks.{i}.{n}": 80 for i in (0, 1) for n in ("qkv", "proj", "fc1")}
    elements |= {f"blocks.{i}.fc2": 320 for i in (0, 1)}
    held = {Slot(name, "inputs"): count for name, count in elements.items()}
    held |= {Slot(f"blocks.{i}", part): tokens * width for i in (0, 1) for part in ("query", "key", "value")}
    held |= {Slot(f"blocks.{i}", "probabilities"): 2 * tokens * tokens for i in (0, 1)}
    mean = sum(count * bits[slot] for slot, count in held.items()) / sum(held.values())
    assert choice.point.costs["activation bits"] == pytest.approx(mean)
    macs = {Slot(name, "weights"): count * (1 if name == "head" else tokens) for name, count in weights.items()}
    bitops = sum(count * bits[slot] * bits[slot._replace(part="inputs")] for slot, count in macs.items())
    for i in (0, 1):
        q, k, v, p = (bits[Slot(f"blocks.{i}", part)] for part in ("query", "key", "value", "probabilities"))
        bitops += tokens * tokens * width * (q * k + p * v)
    assert choice.point.costs["BitOps"] == pytest.approx(bitops)


def test_it_ends_as_the_method_alone_with_these_bits():
    model, choice = chosen(budget="5bit", method="ptq", attention=False, weight_bits=[5], activation_bits=[5])
    plain = TinyTransformer()
    validate(plain, PostTrainingQuantization("int5", "int5", attention=False))
    mine, theirs = ({k: v for k, v in m.state_dict().items() if "lightning_quant" not in k} for m in (model, plain))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert set(choice.bits.values()) == {5}


def test_what_is_exempt_keeps_its_bits_and_counts():
    _, choice = chosen(budget="6bit", overrides={"fc1": "int8"}, skip=["head"], weight_bits=[3, 4, 5, 6, 7])
    assert choice.bits[Slot("blocks.0.fc1", "weights")] == choice.bits[Slot("blocks.1.fc1", "inputs")] == 8
    assert Slot("head", "weights") not in choice.bits and choice.point.costs["weight bits"] <= 6.0 + 1e-6


def test_a_method_of_ones_own_says_all_but_the_bits():
    method = PostTrainingQuantization("int8_sym_g8", "int8_token_dynamic", ranges="minmax")
    model, choice = chosen(budget="4bit", method=method)
    (plan,) = record_of(model).plans.values()
    layer = plan.layers["blocks.0.fc1"]
    assert layer.weights == f"int{choice.bits[Slot('blocks.0.fc1', 'weights')]}_sym_g8"
    assert layer.inputs == f"int{choice.bits[Slot('blocks.0.fc1', 'inputs')]}_asym_token_dynamic"


def test_blocks_are_reconstructed_with_the_bits_that_were_chosen(tmp_path):
    model = TinyTransformer()
    callback = MixedPrecision(budget="4bit", reconstruct={"iterations": 3, "samples": 16, "batch_size": 4})
    validate(model, callback, default_root_dir=tmp_path)
    layer = model.blocks[0].fc1
    assert layer.weight_quantizer.codes is not None
    assert layer.weight_quantizer.scheme.bits == callback.choice.bits[Slot("blocks.0.fc1", "weights")]


def test_weights_alone():
    _, choice = chosen(budget="3.5bit", method=PostTrainingQuantization("int8", None))
    assert all(slot.is_weight for slot in choice.bits) and choice.point.costs["weight bits"] <= 3.5 + 1e-6


# ---------------------------------------------------------------- a metric of the user's own


def test_a_drop_is_kept_with_the_fewest_bits_tried():
    exact = validate(TinyTransformer())["loss"]
    callback = MixedPrecision(budget="drop<=0.5%", monitor="loss", mode="min", trials=4)
    after = validate(TinyTransformer(), callback)["loss"]
    choice = callback.choice
    assert choice.exact == pytest.approx(exact) and after <= exact * 1.005
    good = [bits for bits, value in choice.trials if value <= exact * 1.005]
    assert (min(good), after) in [(bits, pytest.approx(value)) for bits, value in choice.trials]


def test_a_drop_that_cannot_be_kept_leaves_the_model_as_it_was():
    model = TinyTransformer()
    callback = MixedPrecision(budget="drop<=0%", monitor="loss", mode="min", weight_bits=[2], trials=2)
    with refused(model, "with as many bits as there may be; allow a larger drop"):
        validate(model, callback)


def test_losses_by_the_metric_itself():
    _, choice = chosen(
        budget="6bit", sensitivity="metric", monitor="loss", mode="min", weight_bits=[4, 8], target="blocks.1"
    )
    for options in choice.allocation.options:
        assert all(option.left == option.right for option in options)
    assert min(loss for d in choice.allocation.decisions for loss in d.losses) == 0
    assert choice.point.costs["weight bits"] <= 6.0 + 1e-6


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sensitivity": "guess"}, "sensitivity='guess' is none of 'hessian', 'patch'"),
        ({"search": "luck"}, "search='luck' is none of 'integer_program'"),
        ({"budget": "4 apples"}, "budget='4 apples' is none"),
        ({"budget": None}, "search='integer_program' needs a budget="),
        ({"budget": "2bit"}, "below the fewest bits"),
        ({"weight_bits": [1, 4]}, "numbers of bits are 2 to 8"),
        ({"method": "magic"}, "method='magic' is none of 'repq', 'ptq'"),
        ({"method": MixedPrecision()}, "chooses bits itself"),
        ({"method": RepQViT(), "skip": ["head"]}, "skip: give this to the RepQViT"),
        ({"method": PostTrainingQuantization("fp8_e4m3", "int8")}, "'fp8_e4m3.*' is a float format"),
        ({"budget": "drop<=1", "during_fit": True}, "leave during_fit=False"),
    ],
)
def test_arguments_that_make_no_sense(arguments, words):
    with pytest.raises(ValueError, match=words):
        MixedPrecision(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": "1kB"}, "budget='1kB' cannot be met: even the fewest bits .* above 1000; raise the budget"),
        ({"budget": "0.000001ms"}, "budget='0.000001ms' cannot be met: .* milliseconds, above 1e-06"),
        ({"budget": "drop<=1", "monitor": "top1"}, "'top1': the metric is not logged; .* logs 'loss', 'accuracy'"),
        ({"budget": "drop<=1"}, "has to be named; .* logs 'loss', 'accuracy'"),
    ],
)
def test_what_cannot_be_done_leaves_the_model_as_it_was(arguments, words):
    model = TinyTransformer()
    with refused(model, words):
        validate(model, MixedPrecision(**arguments))


def test_milliseconds_are_measured_and_kept_within(monkeypatch):
    measured = []

    def as_bits(layer, spec, x):
        assert tuple(x.shape)[-1] == layer.in_features and type(layer).__name__ == "QuantLinear"
        measured.append((spec.weights.bits, spec.inputs.bits))
        return 1e-3 * spec.weights.bits * spec.inputs.bits

    def budgeted(milliseconds):
        callback = MixedPrecision(budget=f"{milliseconds}ms", weight_bits=[4, 8], method="ptq")
        validate(TinyTransformer(), callback)
        return callback.choice

    real = MixedPrecision(budget="60000ms", weight_bits=[4, 8], method="ptq")
    validate(TinyTransformer(), real)
    assert 0 < real.choice.point.costs["milliseconds"] < 60000
    monkeypatch.setattr(kernel_latency, "_fastest", as_bits)
    widest = budgeted(60000)
    assert set(measured) == {(4, 4), (4, 8), (8, 4), (8, 8)} and set(widest.bits.values()) == {8}
    half = widest.point.costs["milliseconds"] / 2
    assert half / 2 < budgeted(half).point.costs["milliseconds"] <= half


class NoGradient(TinyTransformer):
    def predict_step(self, batch, batch_idx):
        return super().predict_step(batch, batch_idx).argmax(-1)


def test_a_model_without_gradients_is_told_what_to_do():
    model = NoGradient()
    with refused(model, r"needs gradients.*calibration_step.*sensitivity='snr'"):
        validate(model, MixedPrecision())
    validate(model, MixedPrecision(sensitivity="snr"))


# ---------------------------------------------------------------- afterwards


def test_a_saved_model_has_the_bits_that_were_chosen(tmp_path):
    model, choice = chosen(budget="4bit")
    save_quantized(model, tmp_path)
    again = TinyTransformer()
    load_quantized(again, tmp_path)
    assert bits_in(again) == choice.bits and validate(again) == validate(model)


def test_the_dry_run_has_bits_within_the_budget_and_changes_nothing():
    model, callback = TinyTransformer(), MixedPrecision(budget="4bit")
    before = copy.deepcopy(model.state_dict())
    planned = callback.plan(model, next(iter(Sequences().val_dataloader())))
    assert callback.choice is None and record_of(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = [(row, Scheme.parse(row.weights).bits) for row in planned.layers]
    assert (
        sum(row.float_bytes * bits for row, bits in weights) / sum(row.float_bytes for row, _ in weights) <= 4.0 + 1e-6
    )


def test_the_report_shows_the_front(tmp_path):
    model, callback = TinyTransformer(), MixedPrecision(budget="4bit")
    validate(model, callback, QuantReport(tmp_path))
    told = json.loads((tmp_path / "report.json").read_text())["mixed_precision"]
    assert told["bits"]["blocks.0.fc1 weights"] == callback.choice.bits[Slot("blocks.0.fc1", "weights")]
    costs, losses = ([point[name] for point in told["front"]] for name in ("BitOps", "loss"))
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True) and len(costs) > 5
    page = (tmp_path / "report.html").read_text()
    assert "Pareto front" in page and "<title>uniform 4: loss" in page
    (section,) = callback.report_sections(trainer(), model)
    assert len(section.figure().axes[0].collections) == 2
    assert callback.report_sections(trainer(), TinyTransformer()) == []


def test_formats_with_other_bits():
    assert with_bits("logsqrt2_4", 6) == "logsqrt2_6" and with_bits(None, 3) is None
