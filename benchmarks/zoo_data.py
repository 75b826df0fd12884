"""Random but sensible inputs for the models of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

CLASSES = 10

Batch = dict[str, Tensor] | list[Tensor]


class Stacked(Dataset):
    """Samples out of stacked tensors by keyword."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class Splits(L.LightningDataModule):
    """A train and a validation set in batches of 8."""

    def __init__(self, train: Batch, val: Batch) -> None:
        super().__init__()
        self.sets = {
            name: Stacked(data) if isinstance(data, dict) else TensorDataset(*data)
            for name, data in {"train": train, "val": val}.items()
        }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["train"], batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["val"], batch_size=8)

    def first(self, split: str) -> Any:
        """The first batch of a split."""
        return next(iter(DataLoader(self.sets[split], batch_size=8)))


def smooth(n: int, size: int, channels: int = 3) -> Tensor:
    """Images (n, channels, size, size): shapes of several sizes, edges and a little noise, standardised."""
    image = sum(
        F.interpolate(torch.randn(n, channels, cells, cells), size, mode=mode)
        for cells, mode in ((2, "bicubic"), (5, "bicubic"), (7, "nearest"))
    )
    image = image + 0.1 * torch.randn(n, channels, size, size)
    return (image - image.mean((1, 2, 3), keepdim=True)) / image.std((1, 2, 3), keepdim=True)


def tokens(n: int, length: int, vocabulary: int) -> Tensor:
    """Token ids (n, length), frequent ones far more often than rare ones, as in text."""
    return (vocabulary * torch.rand(n, length) ** 3).long()


def padding(n: int, length: int) -> Tensor:
    """An attention mask (n, length): 1 for a token, 0 for padding behind the last one; the first row is full."""
    lengths = torch.randint(length // 2, length + 1, (n, 1))
    lengths[0] = length
    return (torch.arange(length) < lengths).long()


def images(size: int) -> Callable[[int], Batch]:
    """Images with labels."""
    return lambda n: [smooth(n, size), random_classes(n)]


def text(length: int = 19, vocabulary: int = 500) -> Callable[[int], Batch]:
    """Padded token ids by keyword."""
    return lambda n: {"input_ids": tokens(n, length, vocabulary), "attention_mask": padding(n, length)}


def noisy(name: str, channels: int, size: int, **more: Callable[[int], Tensor]) -> Callable[[int], Batch]:
    """Images under noise, the time that says how much of it, and whatever else the model takes, by keyword."""

    def make(n: int) -> Batch:
        time = torch.randint(1000, (n,))
        signal = (1 - time / 1000).sqrt().view(-1, 1, 1, 1)
        image = signal * smooth(n, size, channels) + (1 - signal**2).sqrt() * torch.randn(n, channels, size, size)
        return {name: image, "timestep": time, **{key: value(n) for key, value in more.items()}}

    return make


def random_classes(n: int) -> Tensor:
    """Class indices (n,)."""
    return torch.randint(CLASSES, (n,))


def random_vectors(*shape: int) -> Callable[[int], Tensor]:
    """What another network would give: (n, *shape)."""
    return lambda n: torch.randn(n, *shape)


def captions_with_images(n: int) -> Batch:
    """What CLIP takes."""
    return {**text(12)(n), "pixel_values": smooth(n, 48)}


def packed_latents(n: int) -> Batch:
    """What Flux takes: patches as tokens (n, 64, 16), two embeddings of the text, the time in 0..1."""
    return {
        "hidden_states": F.unfold(smooth(n, 16, 4), 2, stride=2).transpose(1, 2),
        "encoder_hidden_states": torch.randn(n, 11, 32),
        "pooled_projections": torch.randn(n, 24),
        "timestep": torch.rand(n),
    }
