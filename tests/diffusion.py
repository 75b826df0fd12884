"""Small samplers with random weights that the tests of diffusion share."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import DiffusionModule


def unet(**more: Any) -> nn.Module:
    torch.manual_seed(1)
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8, 12),
            "norm_num_groups": 4, "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **more,
        }
    ).eval()  # fmt: skip


def dit(layers: int = 3) -> nn.Module:
    torch.manual_seed(1)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=layers, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    for parameter in net.parameters():  # fresh ones start with modulations of 0 and would compute nothing
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return net.eval()


class Own(nn.Module):
    """A user's own denoiser, called ``(x, t)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
        self.time = nn.Linear(1, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last((self.first(x) + self.time(t[:, None] / 1000)[:, :, None, None]).relu())


def ddim() -> Any:
    return diffusers.DDIMScheduler(1000, clip_sample=False)


def sampler(denoiser: nn.Module | None = None, scheduler: Any = None, steps: int = 4, **more: Any) -> DiffusionModule:
    """A small U-Net with 4 DDIM steps, unless something else is asked for."""
    return DiffusionModule(denoiser or unet(), scheduler or ddim(), num_inference_steps=steps, **more)


def labelled(**more: Any) -> DiffusionModule:
    """A small DiT that takes labels."""
    return sampler(dit(), conditions=["class_labels"], **more)


def pictures(count: int = 8) -> DataLoader:
    """Images and labels."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=4)


def seeds(count: int = 5, batch_size: int = 5) -> DataLoader:
    """Seeds and labels."""
    return DataLoader(TensorDataset(torch.arange(count), torch.arange(count) % 10), batch_size=batch_size)
