"""NoisyQuant on a real DeiT-Tiny, on the linear layers that it is meant for: stem, head and attention stay float."""

import pytest

from lightning_quant import NoisyQuant, PostTrainingQuantization
from tests.models import trainer
from tests.real import ImageNetData, deit_tiny

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("own_cores")]
LINEAR_LAYERS = {"attention": False, "skip": ["net.patch_embed.*", "net.head"]}


def top1(method, bits, **arguments):
    callback = method(f"int{bits}", f"int{bits}", **LINEAR_LAYERS, **arguments)
    return 100 * trainer(callback).validate(deit_tiny(), datamodule=ImageNetData(), verbose=False)[0]["top1"]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("bits", "margin"), [(6, 1.0), (4, 10.0)])
def test_it_beats_ranges_of_least_squared_error(bits, margin, capsys):
    plain, noisy = top1(PostTrainingQuantization, bits), top1(NoisyQuant, bits)
    with capsys.disabled():
        print(f"\n  linear layers W{bits}A{bits}: PostTrainingQuantization {plain:.1f}, NoisyQuant {noisy:.1f}")
    assert noisy >= plain + margin
