"""A diffusion transformer of diffusers: look at the plan, then quantize it where it predicts noise.

The model is small and its weights are random, so that this runs anywhere in seconds; the calls are the same for trained
ones.
"""

from __future__ import annotations

import lightning as L
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import Fidelity, RepQViT


class Denoiser(L.LightningModule):
    """Learns the noise in an image, given the class and how noisy it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=3, num_layers=4, sample_size=16, patch_size=2,
            num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        )  # fmt: skip
        for parameter in self.net.parameters():  # fresh ones start with modulations of 0 and would compute nothing
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        self.scheduler = DDPMScheduler(1000)

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """The noise (B, 3, 16, 16)."""
        return self.net(noisy, timestep=time, class_labels=label).sample

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error of the noise."""
        images, noise, time, label = batch
        return torch.nn.functional.mse_loss(self(self.scheduler.add_noise(images, noise, time), time, label), noise)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the squared error."""
        self.log("noise_mse", self.training_step(batch, batch_idx))

    def calibration_step(self, batch: list[Tensor]) -> Tensor:
        """What calibration feeds the model, as its batches are not the arguments of forward."""
        images, noise, time, label = batch
        return self(self.scheduler.add_noise(images, noise, time), time, label)


def main() -> dict[str, float]:
    """Print the plan, and the error of the float and of the quantized model."""
    L.seed_everything(0, verbose=False)
    model = Denoiser()
    shape = (64, 3, 16, 16)
    data = TensorDataset(torch.rand(shape), torch.randn(shape), torch.randint(1000, (64,)), torch.randint(10, (64,)))
    loader = DataLoader(data, batch_size=16)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    exact = L.Trainer(**quiet).validate(model, loader, verbose=False)[0]["noise_mse"]

    callback = RepQViT(weights="int6", activations="int6")
    print(callback.plan(model, next(iter(loader))))
    trainer = L.Trainer(callbacks=[callback, Fidelity(metrics=["sqnr"], target=None)], **quiet)
    (logged,) = trainer.validate(model, loader, verbose=False)
    found = {"float": exact, "W6A6": logged["noise_mse"], "SQNR": logged["fidelity/sqnr"]}
    print(f"noise MSE {found['float']:.4f} in float, {found['W6A6']:.4f} in W6A6; SQNR {found['SQNR']:.1f} dB")
    return found


if __name__ == "__main__":
    main()
