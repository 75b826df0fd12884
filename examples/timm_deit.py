"""RepQ-ViT on a timm DeiT.

``python timm_deit.py --weights deit_tiny.safetensors --images imagenet``. The folder has the subfolders ``train``, from
which calibration draws, and ``val``, and in each of them one subfolder per class, named by its index. Without arguments
it runs on random weights and images, which shows the calls and nothing else. ``deit.yaml`` does the same on the command
line.
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

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Logits of the batch's images."""
        return self(batch[0])


class ImageFolder(Dataset):
    """Images in subfolders that are named by their class index, in the evaluation transform of a timm model."""

    def __init__(self, folder: Path, model: str) -> None:
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
        settings = timm.data.resolve_data_config(timm.get_pretrained_cfg(model).to_dict())
        self.transform = timm.data.create_transform(**settings)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files[index]
        return self.transform(Image.open(path).convert("RGB")), int(path.parent.name)


class Images(L.LightningDataModule):
    """The folder's images, or random ones where there is no folder."""

    def __init__(self, folder: Path | None = None, model: str = "deit_tiny_patch16_224", batch_size: int = 20) -> None:
        super().__init__()
        self.folder, self.model, self.batch_size = folder, model, batch_size

    def loader(self, split: str) -> DataLoader:
        """In order: calibration takes the first images of the train split."""
        if self.folder is None:
            data: Dataset = TensorDataset(torch.randn(40, 3, 224, 224), torch.zeros(40, dtype=torch.long))
        else:
            data = ImageFolder(Path(self.folder) / split, self.model)
        return DataLoader(data, batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train")

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    predict_dataloader = val_dataloader


def main(args: list[str] | None = None) -> dict[str, float]:
    """Validate the float and the quantized model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=Path)
    options = parser.parse_args(args)
    model, data = Classifier(weights=options.weights), Images(options.images)
    found = {}
    for name, callbacks in {"float": [], "RepQ-ViT W4A4": [RepQViT(weights="int4", activations="int4")]}.items():
        trainer = L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, enable_model_summary=False)
        found[name] = trainer.validate(model, data, verbose=False)[0]["top1"]
        print(f"{name:15s} top-1 {100 * found[name]:.1f} %")
    return found


if __name__ == "__main__":
    main()
