"""How the samples of a quantized denoiser are judged: against those of the float model, from the same seeds."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import DiffusionModule
from lightning_quant.layers import is_altered
from lightning_quant.metrics import sqnr
from tests.real import diffuser, digits

PAIRED, MANY = 64, 640  # samples that decide, and samples for a Frechet distance
FIRST = 1_000_000  # seed of the first one; calibration has the first few of all seeds
BATCH = 32


class Digits(L.LightningDataModule):
    """Handwritten digits as a denoiser has seen them, half of them to calibrate and half to validate; and seeds.

    Args:
        net: name of the denoiser.
        samples: how many seeds there are to predict from.
        first: the first of them.
    """

    def __init__(self, net: str, samples: int = PAIRED, first: int = FIRST) -> None:
        super().__init__()
        self.net, self.samples, self.first = net, samples, first

    def images(self, count: int = 512) -> tuple[Tensor, Tensor]:
        images, labels = digits(count)
        return (images[:, :, 2:-2, 2:-2] / 2 if self.net == "ddpm_mnist" else images), labels

    def train_dataloader(self) -> DataLoader:
        images, labels = self.images()
        return DataLoader(TensorDataset(images[:256], labels[:256]), batch_size=BATCH)

    def val_dataloader(self) -> DataLoader:
        images, labels = self.images()
        return DataLoader(TensorDataset(images[256:], labels[256:]), batch_size=BATCH)

    def predict_dataloader(self) -> DataLoader:
        numbers = torch.arange(self.samples)
        return DataLoader(TensorDataset(self.first + numbers, numbers % 10), batch_size=BATCH)


def sampler(net: str) -> DiffusionModule:
    """A trained denoiser that takes 50 DDIM steps; it is judged by its samples, not while it validates."""
    return diffuser(net, validation_samples=0)


def judged(trainer: L.Trainer, model: DiffusionModule, data: Digits, folder: Path, frechet: bool) -> dict[str, float]:
    """What the final samples of a model are like; those of the float one are compared with others of its own.

    Args:
        trainer: which has validated, and so calibrated, it.
        model: float or quantized.
        data: whose seeds are sampled.
        folder: where the samples of the float model are kept.
        frechet: whether to give a Frechet distance, too.
    """
    exact, found = float_samples(data, folder), {}
    if is_altered(model):
        drawn = torch.cat([batch.cpu() for batch in trainer.predict(model, datamodule=data) or []])
        pair = drawn[:PAIRED], exact[:PAIRED]
        found = {"sqnr": round(float(sqnr(*pair)), 3), "mse": float(f"{F.mse_loss(*pair):.4g}")}
    elif frechet:
        drawn = float_samples(Digits(data.net, data.samples, FIRST + data.samples), folder)
    return found | ({"frechet": round(frechet_distance(drawn, exact, data), 4)} if frechet else {})


def float_samples(data: Digits, folder: Path) -> Tensor:
    """The samples of the float model from the same seeds; they are drawn once."""
    file = folder / f"{data.net}_{data.first}_{data.samples}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        model, drawn = sampler(data.net), []
        for seeds, labels in data.predict_dataloader():
            drawn.append(model.sample(seeds, **({"class_labels": labels} if model.conditions else {})))
        torch.save(torch.cat(drawn), file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
    samples: Tensor = torch.load(file)
    return samples


def frechet_distance(drawn: Tensor, exact: Tensor, data: Digits) -> float:
    """Between two sets of samples, in the features of a small classifier of the digits."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(classifier_features(data), normalize=True)
    distance.update(exact, real=True)
    distance.update(drawn, real=False)
    return float(distance.compute())


def classifier_features(data: Digits, epochs: int = 3) -> nn.Module:
    """The 64 features before the last layer of a small classifier, trained on the spot."""
    torch.manual_seed(0)
    images, labels = data.images(10_000)
    features = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.LazyLinear(64), nn.ReLU()),
    )
    head = nn.Linear(64, 10)
    features(images[:1])
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(head(features(images[rows])), labels[rows]).backward()
            optimizer.step()
    features.num_features = 64  # type: ignore[assignment]
    return features.eval().requires_grad_(False)
