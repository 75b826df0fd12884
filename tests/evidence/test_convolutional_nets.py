"""Convolutional nets on real kernels, which take norms and activations into the convolutions, answer as simulated."""

import lightning as L
import pytest
import torch
from torch import nn

from benchmarks.accuracy_models import InceptionImages, efficientnet_lite0
from lightning_quant import KernelSwap, PostTrainingQuantization
from lightning_quant.kernels.layer_door import KernelLayer
from lightning_quant.kernels.pending import PatientKernel, Pending
from tests.real import CifarData, resnet20

pytestmark = [pytest.mark.evidence, pytest.mark.timeout(1200), pytest.mark.usefixtures("own_cores")]


def run(model: L.LightningModule, data: L.LightningDataModule, *callbacks: L.Callback) -> torch.Tensor:
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if not any(isinstance(callback, KernelSwap) for callback in callbacks):
        trainer.validate(model, datamodule=data, verbose=False)
    return torch.cat(trainer.predict(model, data.val_dataloader()))


class CountsCodes(L.Callback):
    """Whose codes are not those of one step after the other, in the second batch."""

    def __init__(self) -> None:
        self.codes = self.different = self.by_more = 0

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            layers = [layer for layer in pl_module.modules() if isinstance(layer, KernelLayer)]
            self.hooks = [layer.register_forward_pre_hook(self.look) for layer in layers]

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            for hook in self.hooks:
                hook.remove()

    def look(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, kernel = args[0], layer.kernel
        if isinstance(x, Pending) and isinstance(kernel, PatientKernel):
            apart = (x.codes_on(kernel.grid).int() - kernel.grid.unsigned(x.one_by_one(x.codes)).int()).abs()
            self.codes += apart.numel()
            self.different += int((apart > 0).sum())
            self.by_more += int((apart > 1).sum())


@pytest.mark.parametrize(
    ("make", "data"),
    [(efficientnet_lite0, InceptionImages), (resnet20, CifarData)],
    ids=["EfficientNet-Lite0", "ResNet-20"],
)
def test_convolutional_nets_answer_on_kernels_as_simulated(make, data, capsys):
    try:
        model, images = make(), data()
    except FileNotFoundError as error:  # the weights of EfficientNet-Lite0 are a package that CI does not install
        pytest.skip(str(error))
    ptq = PostTrainingQuantization(ranges="minmax", attention=False)
    labels = torch.cat([y for _, y in images.val_dataloader()])
    simulated = run(model, images, ptq)
    swap, counts = KernelSwap(backend="torch"), CountsCodes()
    answers = run(model, images, ptq, swap, counts)
    agreement = int((answers.argmax(1) == simulated.argmax(1)).sum()) / len(labels)
    top1 = [100 * float((x.argmax(1) == labels).float().mean()) for x in (simulated, answers)]
    fused = [row for row in swap.table.rows if " + BatchNorm" in row.kernel]
    with capsys.disabled():
        print(
            f"\n  {100 * agreement:.2f} % of {len(labels)} answers the same; simulated {top1[0]:.2f} %, on kernels "
            f"{top1[1]:.2f} %; {counts.different} of {counts.codes} codes handed on differ "
            f"({counts.different / max(counts.codes, 1):.1e}), {counts.by_more} by more than one; {len(fused)} of "
            f"{len(swap.table.rows)} layers with their norm"
        )
    assert agreement >= 0.996
    assert abs(top1[0] - top1[1]) <= 0.4
    assert counts.by_more == 0 and counts.different <= 1e-4 * counts.codes
    assert len(fused) == len(swap.table.rows) - 1  # all but the classifier
    assert torch.equal(run(model, images, ptq), simulated)
