"""What rotations, smoothing and small floats buy on a language model that was trained: perplexity of stories260K.

The float model has 3.55. All but the head and the embeddings is quantized.
"""

import lightning as L
import pytest

from lightning_quant import LLMFP4, PostTrainingQuantization, RotatedPTQ, SmoothQuant
from tests.real import StoriesData, stories260k

pytestmark = pytest.mark.evidence

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
HEAD = {"skip": ["*lm_head"], "attention": False}


def perplexity(*callbacks):
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **QUIET)
    (got,) = trainer.validate(stories260k(), datamodule=StoriesData(), verbose=False)
    return got["perplexity"]


def told(capsys, **figures):
    with capsys.disabled():
        print("\n  stories260K: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))


def test_rotated_four_bits_are_nearer_to_float(assets, capsys):
    formats = {"weights": "int4", "activations": "int4_token_dynamic"}
    nearest = perplexity(PostTrainingQuantization(**formats, **HEAD))
    rotated = perplexity(RotatedPTQ(**formats, **HEAD))
    online = perplexity(RotatedPTQ(**formats, **HEAD, residual=False, heads=False))
    told(capsys, nearest=nearest, rotated=rotated, online=online)
    assert rotated < 0.96 * nearest and online < 0.9 * nearest


def test_rotating_alone_changes_nothing(assets):
    assert perplexity(RotatedPTQ(None, None)) == pytest.approx(3.5482, abs=1e-4)


def test_smoothed_eight_bits_per_tensor_are_nearer_to_float(assets, capsys):
    formats = {"weights": "int8_tensor", "activations": "int8", "ranges": "minmax"}
    plain = perplexity(PostTrainingQuantization(**formats, **HEAD))
    smooth = perplexity(SmoothQuant(**formats, **HEAD))
    told(capsys, plain=plain, smooth=smooth)
    assert 3.5482 < smooth < plain < 3.7


def test_searched_floats_of_four_bits_are_far_below_plain_ones(assets, capsys):
    plain = perplexity(PostTrainingQuantization("fp4_e2m1", "fp4_e2m1", "minmax", **HEAD))
    searched = perplexity(LLMFP4(**HEAD))
    told(capsys, plain=plain, searched=searched)
    assert searched < 0.25 * plain
