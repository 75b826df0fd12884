"""What the two halves of DopQ-ViT do on a real DeiT-Tiny."""

import pytest
import torch
import torch.nn.functional as F

from lightning_quant import DopQViT, RepQViT
from lightning_quant.solvers import fit_attention_levels
from tests.models import trainer
from tests.real import ImageNetData, deit_tiny, imagenet

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("own_cores")]


@torch.no_grad()
def maps_and_values(images, monkeypatch):
    """What attention multiplies in each block of the float model: probabilities and values."""
    seen = []

    def attend(query, key, value, **how):
        probabilities = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        seen.append((probabilities, value))
        return probabilities @ value

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        deit_tiny()(images)
    return seen


@pytest.mark.timeout(300)
def test_tangent_levels_on_images_not_seen(monkeypatch, capsys):
    """A tangent has a finer grid where a logarithm cannot have one; at four bits the two are level."""
    fitted_on, judged_on = (
        maps_and_values(imagenet(name)[0][:8], monkeypatch) for name in ("calibration", "evaluation")
    )
    for bits, times in ((3, 5.0), (4, 0.9), (6, 3.0), (8, 30.0)):
        errors = dict.fromkeys([f"tan_{bits}", f"atan_{bits}", f"logsqrt2_{bits}", f"uint{bits}_asym"], 0.0)
        for here, (maps, values) in zip(fitted_on, judged_on, strict=True):
            for text, (_, quantizer) in fit_attention_levels(*here, list(errors), queries=8).items():
                errors[text] += float(((quantizer(maps) - maps) @ values).square().sum())
        with capsys.disabled():
            print("\n  |(A - A^) V|^2: " + ", ".join(f"{text} {error:.0f}" for text, error in errors.items()))
        tangent, mirrored, logarithm, uniform = errors.values()
        assert tangent * times < logarithm
        assert tangent * 5 < min(mirrored, uniform)


def top1(callback):
    return 100 * trainer(callback).validate(deit_tiny(), datamodule=ImageNetData(), verbose=False)[0]["top1"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_at_four_bits_it_is_level_with_repq_vit(capsys):
    """Neither half makes it better there: the levels are as good, and the common scale has no influence."""
    plain, tangent = top1(RepQViT()), top1(DopQViT())
    with capsys.disabled():
        print(f"\n  W4A4: RepQViT {plain:.1f}, DopQViT {tangent:.1f}")
    assert abs(tangent - plain) <= 2.5
