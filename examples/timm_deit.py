"""RepQ-ViT on a timm DeiT.

``python examples/timm_deit.py --weights deit_tiny.safetensors --images folder``, with one subfolder per class index.
Without arguments it runs on random weights and images, which shows the calls and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import timm
import torch
import torchmetrics
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_quant import RepQViT


class Folder(Dataset):
    """Images in subfolders that are named by their class index, in the evaluation transform of the model."""

    def __init__(self, folder: Path, model: torch.nn.Module) -> None:
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
        self.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files[index]
        return self.transform(Image.open(path).convert("RGB")), int(path.parent.name)


class Classifier(L.LightningModule):
    """Any timm classifier as a LightningModule."""

    def __init__(self, name: str = "deit_tiny_patch16_224", weights: Path | None = None) -> None:
        super().__init__()
        self.net = timm.create_model(name, checkpoint_path=str(weights or ""))
        self.top1 = torchmetrics.Accuracy(task="multiclass", num_classes=1000)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1000)."""
        return self.net(images)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log top-1 accuracy."""
        images, labels = batch
        self.top1(self(images), labels)
        self.log("top1", self.top1)


def main(args: list[str] | None = None) -> dict[str, float]:
    """Validate the float and the quantized model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args(args)
    model = Classifier(weights=options.weights)
    if options.images:
        data: Dataset = Folder(options.images, model.net)
    else:
        data = TensorDataset(torch.randn(40, 3, 224, 224), torch.zeros(40, dtype=torch.long))
    loader = DataLoader(data, batch_size=20)
    found = {}
    for name, callbacks in {"float": [], "RepQ-ViT W4A4": [RepQViT(weights="int4", activations="int4")]}.items():
        trainer = L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, enable_model_summary=False)
        found[name] = trainer.validate(model, loader, verbose=False)[0]["top1"]
        print(f"{name:15s} top-1 {100 * found[name]:.1f} %")
    return found


if __name__ == "__main__":
    main()
