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


def test_repairs_alone_bring_most_of_it_back(tmp_path, capsys):
    """The light pipeline: nothing is fitted, but the layers make up for BatchNorm statistics."""

    def top1(**repairs):
        callback = AdaQuant("int4", "int4", reconstruct=None, **repairs)
        run = trainer(callback, default_root_dir=tmp_path)
        return 100 * run.validate(resnet20(), datamodule=CifarData(), verbose=False)[0]["top1"]

    plain, norms, biases = (
        top1(**repairs)
        for repairs in ({"tune_norms": False, "bias_steps": 0}, {"bias_steps": 0}, {"tune_norms": False})
    )
    with capsys.disabled():
        print(f"\n  W4A4: to the nearest {plain:.1f}, with norms {norms:.1f}, with biases {biases:.1f}")
    assert norms >= plain + 2 and biases >= plain + 1
