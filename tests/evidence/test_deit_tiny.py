"""A real DeiT-Tiny against the published implementations: the figures of the README's table."""

import statistics
from pathlib import Path

import pytest
import yaml

from lightning_quant import PostTrainingQuantization, RepQViT
from tests.real import ImageNetData, deit_tiny

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("own_cores")]
REFERENCES = yaml.safe_load((Path(__file__).parents[1] / "references.yaml").read_text())["deit_tiny"]
DRAWS = range(5)


def top1(callback=None, draw=0):
    import lightning as L

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback] if callback else [], **quiet)
    return 100 * trainer.validate(deit_tiny(), datamodule=ImageNetData(draw), verbose=False)[0]["top1"]


def show(capsys, line):
    with capsys.disabled():
        print(f"\n  {line}", flush=True)


def test_float_and_plain_quantization(capsys):
    exact = top1()
    assert exact == pytest.approx(REFERENCES["float"], abs=0.01)
    w8a8 = top1(PostTrainingQuantization(weights="int8", activations="int8"))
    w6a6 = top1(PostTrainingQuantization(weights="int6", activations="int6"))
    w4a4 = top1(PostTrainingQuantization(weights="int4", activations="int4"))
    collapsed = top1(PostTrainingQuantization(weights="int4_tensor", activations="int4", ranges="minmax"))
    show(
        capsys,
        f"float {exact:.1f}; plain mse W8A8 {w8a8:.1f}, W6A6 {w6a6:.1f}, W4A4 {w4a4:.1f}; "
        f"min-max per-tensor W4A4 {collapsed:.1f}",
    )
    assert exact - w8a8 <= 1.0
    assert collapsed < 5.0


@pytest.mark.parametrize("bits", ["W4A4", "W6A6"])
def test_repq_vit_is_level_with_its_reference(bits, capsys):
    number = f"int{bits[1]}"
    found = [top1(RepQViT(weights=number, activations=number), draw) for draw in DRAWS]
    entry = REFERENCES["RepQViT"][bits]
    reference = statistics.mean(entry["reference"])
    show(
        capsys,
        f"RepQViT {bits}: {', '.join(f'{x:.1f}' for x in found)}, mean {statistics.mean(found):.1f} "
        f"(reference {reference:.1f})",
    )
    assert statistics.mean(found) >= reference - entry["tolerance"]


def test_each_part_of_repq_vit_helps(capsys, monkeypatch):
    """The LayerNorm part and the logarithmic part each help alone (one draw; a margin of five images)."""
    from lightning_quant.quantizers import Scheme

    whole = top1(RepQViT(weights="int4", activations="int4"))
    with monkeypatch.context() as patch:  # no pair is folded
        patch.setattr("lightning_quant.callbacks.repq_vit._is_uniform", lambda layer: False)
        without_norms = top1(RepQViT(weights="int4", activations="int4"))
    without_log = RepQViT(weights="int4", activations="int4")
    without_log.formats.probabilities = str(Scheme.parse("int4_asym_tensor"))
    without_logarithm = top1(without_log)
    show(
        capsys,
        f"RepQViT W4A4 {whole:.1f}; without folding {without_norms:.1f}; without the logarithm {without_logarithm:.1f}",
    )
    assert whole > without_norms + 1.0
    assert whole > without_logarithm + 1.0
