"""Two grids behind GELU and softmax carry a vision transformer to four bits."""

import pytest

from lightning_quant import MPTQViT, PostTrainingQuantization
from tests.models import trainer
from tests.real import ImageNetData, deit_tiny

pytestmark = pytest.mark.evidence


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_four_bits_on_deit_tiny(own_cores, capsys):
    def top1(callback):
        return 100 * trainer(callback).validate(deit_tiny(), datamodule=ImageNetData(), verbose=False)[0]["top1"]

    plain, found = top1(PostTrainingQuantization("int4", "int4")), top1(MPTQViT("int4", "int4"))
    with capsys.disabled():
        print(f"\n  W4A4: plain {plain:.1f}, MPTQ-ViT {found:.1f}")
    assert found >= plain + 35
