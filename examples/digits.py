"""A small vision transformer and the handwritten digits of scikit-learn: plain Lightning, nothing of quantization."""

from __future__ import annotations

import lightning as L
import timm
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningDataModule):
    """8x8 grey images of digits: 1,297 for training, the other 500 for validation."""

    def setup(self, stage: str) -> None:
        """Scale the pixels to [-1, 1]; the split is the same each time."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], torch.tensor(digits.target)[order]
        self.train = TensorDataset(images[:-500], labels[:-500])
        self.val = TensorDataset(images[-500:], labels[-500:])

    def train_dataloader(self) -> DataLoader:
        """Shuffled; calibration takes it unshuffled."""
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.val, batch_size=250)

    predict_dataloader = val_dataloader


class DigitClassifier(L.LightningModule):
    """A ViT of four blocks on 2x2 patches."""

    def __init__(self, lr: float = 4e-3, weight_decay: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = timm.models.VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4
        )
        # The norms of large vision transformers have channels of very different ranges, which is what makes these
        # hard to quantize. A small one would not get there in half a minute of training, so it starts like that.
        for module in self.net.blocks.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, std=1.2)
                module.weight.data.exp_()
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits of the batch's images."""
        return self(batch[0])

    def configure_optimizers(self) -> dict:
        """AdamW with a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, weight_decay=self.hparams.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
