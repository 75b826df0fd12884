"""Small LightningModules and data that the tests share; nothing in them knows of quantization."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, TOKENS, WIDTH, CLASSES = 64, 5, 16, 3


class Block(nn.Module):
    """A pre-norm transformer block as many people write it."""

    def __init__(self, width: int = WIDTH, heads: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width, bias=bias),
            nn.Linear(width, width),
        )
        self.norm2, self.fc1, self.fc2 = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=bias),
            nn.Linear(4 * width, width),
        )
        nn.init.uniform_(self.norm1.weight, 0.2, 3.0)  # channels of different ranges, as in trained models
        nn.init.normal_(self.norm1.bias)
        nn.init.uniform_(self.norm2.weight, 0.2, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TinyTransformer(L.LightningModule):
    """Two blocks and a head; classifies sequences (B, TOKENS, WIDTH)."""

    def __init__(self, bias: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        generator = torch.get_rng_state()
        torch.manual_seed(1)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(bias=bias) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)
        torch.set_rng_state(generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x).mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("loss", F.cross_entropy(logits.float(), batch[1]), batch_size=len(logits))
        self.log("accuracy", self.accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]).float(), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class NoBias(TinyTransformer):
    """Folding has to create biases in it."""

    def __init__(self) -> None:
        super().__init__(bias=False)


class NoDropout(TinyTransformer):
    """What a fit makes of it depends on the data alone."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)


class Small(L.LightningModule):
    """One block, for the compiler takes its time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(Block(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean(1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note(F.cross_entropy(self(batch[0]), batch[1]))

    @torch.compiler.disable  # or the compiler goes through all of Lightning's logging
    def note(self, loss: Tensor) -> None:
        self.log("loss", loss)


class Sequences(L.LightningDataModule):
    """Random sequences with labels; the training part calibrates."""

    def __init__(self, batch_size: int = 8, samples: int = SAMPLES, shuffle: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.batch_size, self.shuffle = batch_size, shuffle
        self.train, self.val = (
            TensorDataset(
                torch.randn(samples, TOKENS, WIDTH, generator=generator),
                torch.randint(CLASSES, (samples,), generator=generator),
            )
            for _ in range(2)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def trainer(*callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


def validate(
    model: L.LightningModule, *callbacks: L.Callback, data: L.LightningDataModule | None = None, **kwargs: Any
) -> dict[str, float]:
    """The metrics of one ``trainer.validate``."""
    run = {key: kwargs.pop(key) for key in ("ckpt_path",) if key in kwargs}
    return trainer(*callbacks, **kwargs).validate(model, datamodule=data or Sequences(), verbose=False, **run)[0]
