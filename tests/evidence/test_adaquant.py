"""Reconstruction brings a convolutional network at four bits to within three points of float."""

import pytest

from lightning_quant import AdaQuant, PostTrainingQuantization
from tests.models import trainer
from tests.real import CifarData, resnet20

pytestmark = pytest.mark.evidence


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "callback", [AdaQuant("int4", "int4"), PostTrainingQuantization("int4", "int4", reconstruct="qdrop")]
)
def test_resnet20_with_every_layer_at_four_bits(callback, tmp_path, own_cores, capsys):
    def top1(*callbacks):
        run = trainer(*callbacks, default_root_dir=tmp_path)
        return 100 * run.validate(resnet20(), datamodule=CifarData(), verbose=False)[0]["top1"]

    exact, plain, found = top1(), top1(PostTrainingQuantization("int4", "int4")), top1(callback)
    with capsys.disabled():
        print(f"\n  W4A4: float {exact:.1f}, plain {plain:.1f}, {type(callback).__name__} {found:.1f}")
    assert found >= exact - 3 and found >= plain + 3
