"""The LightningModules of the zoo, written as a newcomer would; nothing here knows of quantization."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo_data import CLASSES


class Classifier(L.LightningModule):
    """An image classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("loss", F.cross_entropy(self(images), labels))


class Keywords(L.LightningModule):
    """A model that is called by keywords, as those of transformers and diffusers are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("power", first_tensor(self(**batch)).square().mean())


class HuggingFaceClassifier(Classifier):
    """The image classifiers of transformers give an output object."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(pixel_values=images).logits


class FluxDenoiser(Keywords):
    """Flux wants the position of every token beside it."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **inputs: Tensor) -> Tensor:
        side = int(hidden_states.shape[1] ** 0.5)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = torch.stack([torch.zeros(side, side), rows, columns], -1).view(-1, 3)
        return self.net(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            img_ids=positions.to(hidden_states),
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
            **inputs,
        ).sample


class TextClassifier(L.LightningModule):
    """torch's own encoder, with padding; its fused fast path runs in eval mode."""

    def __init__(self, batch_first: bool, width: int = 96) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(500, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.batch_first:
            x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        else:
            x = self.encoder(x.transpose(0, 1), src_key_padding_mask=attention_mask == 0).transpose(0, 1)
        mask = attention_mask[..., None]
        return self.head((x * mask).sum(1) / mask.sum(1))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("power", self(**batch).square().mean())


class Readers(L.LightningModule):
    """nn.MultiheadAttention twice: self attention, then queries that read a memory of another width."""

    def __init__(self, width: int = 64, memory: int = 40) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, width))
        self.read = nn.MultiheadAttention(width, 4, kdim=memory, vdim=memory, batch_first=True)
        self.think = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, memory: Tensor) -> Tensor:
        x, _ = self.read(self.queries.expand(len(memory), -1, -1), memory, memory)
        x = self.norm(x)
        thought, _ = self.think(x, x, x, need_weights=False)
        return self.head(x + thought).mean(1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        memory, labels = batch
        self.log("loss", F.cross_entropy(self(memory), labels))


class KeywordOnly(L.LightningModule):
    """Written by hand: keywords only, one block run three times, an output layer that shares the embedding's weight."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, width)
        self.numbers = nn.Linear(6, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.block = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, *, words: Tensor, numbers: Tensor, repeats: int = 3) -> dict[str, Tensor]:
        x = self.embed(words) + self.numbers(numbers)[:, None]
        for _ in range(repeats):
            x = x + self.block(self.norm(x))
            x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return {"logits": self.head(self.norm(x)), "hidden": x}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(words=batch["words"], numbers=batch["numbers"])["logits"]
        self.log("loss", F.cross_entropy(logits.flatten(0, 1), batch["words"].flatten()))


class Gan(L.LightningModule):
    """Two networks side by side; ``forward`` generates, and the validation step asks the discriminator."""

    def __init__(self, noise: int = 32) -> None:
        super().__init__()
        self.automatic_optimization = False

        def grow(channels: int, out: int) -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]

        self.generator = nn.Sequential(
            nn.Linear(noise, 64 * 16), nn.Unflatten(1, (64, 4, 4)), *grow(64, 64), *grow(64, 32), *grow(32, 16),
            nn.Conv2d(16, 3, 3, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(64 * 64, 1),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("fooled", self.discriminator(self(batch[0])).sigmoid().mean())


class Distilled(L.LightningModule):
    """A student beside its frozen teacher, judged by a metric network; only the student is what ``forward`` runs."""

    def __init__(self) -> None:
        super().__init__()

        def net(width: int) -> nn.Sequential:
            convs = [nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
            return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))

        self.student, self.teacher = net(32), net(64).requires_grad_(False)
        self.perceptual = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, _ = batch
        with torch.no_grad():
            wanted, weight = self.teacher(images).softmax(-1), self.perceptual(images).square().mean()
        self.log("loss", weight * F.cross_entropy(self(images), wanted))


def first_tensor(output: Any) -> Tensor:
    """The first tensor of whatever a model returns."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    return next(found for part in parts if (found := first_tensor_or_none(part)) is not None)


def first_tensor_or_none(part: Any) -> Tensor | None:
    return first_tensor(part) if isinstance(part, (Tensor, dict, tuple, list)) and len(part) else None
