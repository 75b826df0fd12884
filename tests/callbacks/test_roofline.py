"""Roofline in a Trainer: the bits of the plan, the totals that it logs, and what the report shows."""

import json

import lightning as L
import pytest
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, QuantReport, Roofline, TokenWindows
from lightning_quant.callbacks.roofline import bits_of
from lightning_quant.graph import Bits, Machine
from lightning_quant.layers import AttentionPlan, LayerPlan, Plan
from tests.language import TOKENS, WIDTH, llama, tokens

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
SLOW_MEMORY = Machine("slow memory", bandwidth=1.0, peak=1e12)


def data():
    return DataLoader(TokenWindows(tokens(), TOKENS), batch_size=4)


def validate(model, *callbacks):
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **QUIET)
    (got,) = trainer.validate(model, data(), verbose=False)
    return got


def test_the_bits_are_those_of_the_plans_that_work_on_a_layer():
    rounded = Plan("A", {}, {"a": LayerPlan("int4_asym_g128", None), "b": LayerPlan("int8_sym_channel", "int8_asym")})
    pruned = Plan("B", {}, {"a": LayerPlan(None, None, pruned="2:4")})
    attention = Plan("C", {}, attention={"c": AttentionPlan("int8", "int8", "int4", "uint8")})
    bits = bits_of([rounded, pruned, attention])
    assert bits == {"a": Bits((4 + 16 / 128) / 2 + 1, 16, 16), "b": Bits(8, 8, 8), "c": Bits(0, 8, 4)}


def test_decoding_gains_what_the_weights_lose_and_a_float_model_nothing():
    quantize = PostTrainingQuantization("int4_channel", None, attention=False, calibration_loader=data())
    roofline = Roofline(SLOW_MEMORY, batch=1, tokens=1)
    plain = validate(llama(), roofline)
    assert plain["roofline/decode_speedup"] == plain["roofline/prefill_speedup"] == 1
    got = validate(llama(), quantize, roofline)
    assert got["roofline/decode_speedup"] == pytest.approx(roofline.comparisons["decode"].speedup, rel=1e-6)
    linear = {w.name: w for w in roofline.comparisons["decode"].before if w.kind == "linear"}
    after = {w.name: w for w in roofline.comparisons["decode"].after}
    moved = 2 * WIDTH * 2  # activations in 16 bits
    name = "net.layers.0.q"
    assert (linear[name].bytes - moved) / (after[name].bytes - moved) == pytest.approx(4)


def test_the_report_has_a_table_and_a_plot_for_each_stage(tmp_path):
    roofline = Roofline("H100-SXM", tokens=128)
    validate(
        llama(),
        PostTrainingQuantization("int8", "int8", attention=False, calibration_loader=data()),
        roofline,
        QuantReport(tmp_path / "report"),
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("roofline of ") == 2 and "H100-SXM" in page and "net.layers.1.down" in page
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    told = facts["roofline"] if "roofline" in facts else facts["sections"]["roofline"]
    assert told["decode"]["speedup"] > 1.1 and len(told["prefill"]["operators"]) == len(told["decode"]["operators"])
    (section,) = roofline.report_sections(None, None)
    assert len(section.figure().axes) == 2


def test_unknown_machines_and_stages_are_refused():
    with pytest.raises(ValueError, match="A100-80G"):
        Roofline("abacus")
    with pytest.raises(ValueError, match="'prefill', 'decode' and 'forward'"):
        Roofline(stages=["train"])
