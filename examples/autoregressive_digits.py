"""A small transformer that paints digits pixel by pixel, and what six bits do to it with and without PTQ4ARVG.

Class-conditional, in raster order, modulated by the class and by where the next pixel is; it paints with a cache of
keys and values, one token in each call.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import PTQ4ARVG, PostTrainingQuantization
from lightning_quant.layers import as_float
from lightning_quant.metrics import sqnr

PIXELS, LEVELS, CLASSES = 64, 9, 10
BEGIN, NOBODY = LEVELS, CLASSES  # the token in front of the first pixel, and the label of no class
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each block


class Block(nn.Module):
    """Attention and MLP, shifted, scaled and gated by a condition that each token has."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The tokens (B, T, C), and the keys and values of all tokens so far."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)  # of a cache, one token sees everything
        x = x + gate1 * self.proj(seen.transpose(1, 2).flatten(2))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(h))), k, v


class Transformer(nn.Module):
    """What comes next, for each token (B, T) of a digit of some class."""

    def __init__(self, width: int = 64, blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.classes = nn.Embedding(LEVELS + 1, width), nn.Embedding(CLASSES + 1, width)
        self.places = nn.Parameter(0.1 * torch.randn(PIXELS, width))  # where the token stands
        self.targets = nn.Parameter(0.1 * torch.randn(PIXELS, width))  # where the next one will
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.modulation = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, LEVELS)

    def forward(self, tokens: Tensor, labels: Tensor, start: int = 0, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, levels) of tokens from position ``start`` on; a cache is read, and extended in place."""
        here = slice(start, start + tokens.shape[1])
        x = self.tokens(tokens) + self.places[here]
        condition = self.classes(labels)[:, None] + self.targets[here]
        for number, block in enumerate(self.blocks):
            x, k, v = block(x, condition, cache[number] if cache and start else None)
            if cache is not None:
                cache[number : number + 1] = [(k, v)]
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class Painter(L.LightningModule):
    """Learns to paint digits (B, 64) of levels 0 to 8, given their classes (B,)."""

    def __init__(self, width: int = 64, blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.net = Transformer(width, blocks, heads)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Logits of all pixels at once (B, 64, levels), each from those before it."""
        begin = torch.full_like(pixels[:, :1], BEGIN)
        return self.net(torch.cat([begin, pixels[:, :-1]], dim=1), labels)

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Nats for each pixel."""
        pixels, labels = batch
        return F.cross_entropy(self(pixels, labels).flatten(0, 1), pixels.flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """One in ten digits is painted without its class."""
        pixels, labels = batch
        nobody = torch.rand(len(labels), device=labels.device) < 0.1
        return self.loss([pixels, labels.masked_fill(nobody, NOBODY)])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the nats of each pixel."""
        self.log("nats", self.loss(batch), batch_size=len(batch[0]))

    def calibration_step(self, batch: list[Tensor]) -> Tensor:
        """Whole digits at once are what calibration looks at."""
        return self(*batch)

    def unconditional_batch(self, batch: list[Tensor]) -> list[Tensor]:
        """The same digits of no class."""
        return [batch[0], torch.full_like(batch[1], NOBODY)]

    def paint(self, labels: Tensor, seeds: Tensor) -> Tensor:
        """Digits (B, 64) of these classes, drawn pixel by pixel."""
        dice = torch.stack([torch.rand(PIXELS, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
        tokens, cache = [torch.full_like(labels, BEGIN)], Cache()
        for place in range(PIXELS):
            logits = self.net(tokens[-1][:, None], labels, start=place, cache=cache)[:, 0]
            below = logits.double().softmax(-1).cumsum(-1)
            tokens.append((below < dice[:, place : place + 1].to(below)).sum(-1).clamp(max=LEVELS - 1))
        return torch.stack(tokens[1:], dim=1)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Digits for labels and seeds."""
        return self.paint(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with a rate that falls."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,500 of scikit-learn's digits to train on, and the others, as levels from 0 to 8."""
    stored = load_digits()
    order = torch.randperm(len(stored.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(stored.images).flatten(1)[order].long() // 2
    labels = torch.from_numpy(stored.target)[order].long()
    return TensorDataset(pixels[:1500], labels[:1500]), TensorDataset(pixels[1500:], labels[1500:])


def main(epochs: int = 12, width: int = 64, picture: str = "autoregressive_digits.png") -> dict[str, float]:
    """Train, quantize in two ways, paint; the nats of a pixel, and how near the logits are to the float ones in dB."""
    L.seed_everything(0, verbose=False)
    train, val = digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    calm = {**quiet, "enable_progress_bar": False}
    model, held_out = Painter(width), DataLoader(val, batch_size=99)
    L.Trainer(max_epochs=epochs, **quiet).fit(model, DataLoader(train, batch_size=50, shuffle=True))
    wanted = DataLoader(TensorDataset(torch.arange(20) % 10, torch.arange(20)), batch_size=20)
    found = {"float nats": L.Trainer(**calm).validate(model, held_out, verbose=False)[0]["nats"]}
    painted = {"float": torch.cat(L.Trainer(**calm).predict(model, wanted))}
    some = DataLoader(train, batch_size=128)
    for name, callback in {
        "plain": PostTrainingQuantization("int6", "int6", calibration_samples=128, calibration_loader=some),
        "PTQ4ARVG": PTQ4ARVG("int6", "int6", ranges="mse", calibration_loader=some),
    }.items():
        trainer = L.Trainer(callbacks=[callback], **calm)
        found[f"{name} nats"] = trainer.validate(model, held_out, verbose=False)[0]["nats"]
        with torch.no_grad():
            quantized = model(*val.tensors)
            with as_float(model):
                exact = model(*val.tensors)
        found[f"{name} dB"] = float(sqnr(quantized, exact))
        painted[name] = torch.cat(trainer.predict(model, wanted))
        callback.remove(model)
    figure, axes = plt.subplots(len(painted), 1, figsize=(10, 4))
    for axis, (name, pixels) in zip(axes, painted.items(), strict=True):
        axis.imshow(torch.cat(list(pixels.view(-1, 8, 8)), dim=1), cmap="gray")
        axis.set_title(name)
        axis.axis("off")
    figure.savefig(Path(picture), bbox_inches="tight")
    for name, value in found.items():
        print(f"{name:14} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
