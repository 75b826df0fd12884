"""MGRQ adds supervision from above and from below to a block reconstruction."""

from dataclasses import replace

import pytest
import torch

from lightning_quant import MGRQ, Reconstruction, RepQViT
from tests.callbacks.test_repquant import errors, quantized

QUICK = Reconstruction(iterations=60, samples=32, batch_size=8, learning_rate=0.03, inputs="quantized", keep=1.0)


def test_without_its_terms_it_is_a_plain_block_reconstruction(tmp_path):
    plain = quantized(RepQViT(reconstruct=QUICK), tmp_path).state_dict()
    same = quantized(MGRQ(reconstruct=QUICK, global_weight=0, local_weight=0), tmp_path).state_dict()
    tensors = [key for key in plain if isinstance(plain[key], torch.Tensor) and not key.startswith("lightning_quant")]
    assert any(key.endswith("codes") for key in tensors)
    assert all(torch.equal(plain[key], same[key]) for key in tensors)


@pytest.mark.parametrize("terms", [{"local_weight": 0}, {"global_weight": 0}, {"local_metric": "mse"}, {}])
def test_it_brings_the_output_nearer_to_the_float_one(tmp_path, terms):
    nearest = errors(quantized(RepQViT(), tmp_path))[1]
    longer = replace(QUICK, iterations=150)
    assert errors(quantized(MGRQ(reconstruct=longer, **terms), tmp_path))[1] < 0.9 * nearest


def test_the_global_term_learns_by_itself(tmp_path):
    """With the block's own error drowned, what is left still finds the way."""
    nearest = errors(quantized(RepQViT(), tmp_path))[1]
    alone = MGRQ(reconstruct=QUICK, global_weight=1e4, local_weight=0, global_every=1)
    assert errors(quantized(alone, tmp_path))[1] < nearest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_weight": -1.0}, "global_weight must be 0 or more"),
        ({"local_weight": -1.0}, "layer_weight must be 0 or more"),
        ({"local_metric": "kl"}, "'mse', 'moments'"),
        ({"global_every": 0}, "global_every must be at least 1"),
        ({"reconstruct": None}, "use that callback"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MGRQ(**arguments)
