"""How fast a U-Net like Stable Diffusion's samples with a feature cache and integer kernels, beside its float self.

``python benchmarks/cached_predict.py --threads 2`` times whole calls of ``trainer.predict``, in turns, round after
round, so that a busy moment slows all of them; what a callback does before and after sampling is in it. Weights are
random, for time does not depend on them: four levels of ``--width``, twice and four times as many channels, attention
to the image and to 77 tokens of text at three of them, an image of ``--size`` by ``--size`` in latent space. Attention
is computed in float, which is the faster way with so few channels a head.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import lightning as L
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.utils.data import DataLoader, Dataset

from lightning_quant import CacheQuant, DiffusionModule, FeatureCache, KernelSwap, PostTrainingQuantization
from lightning_quant.kernels.cpu import integer_instructions

TEXT = 77, 256  # tokens of a prompt and their channels


class Prompts(Dataset[dict[str, torch.Tensor]]):
    """Seeds, each with a text of random numbers."""

    def __init__(self, count: int) -> None:
        self.text = torch.randn(count, *TEXT, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, seed: int) -> dict[str, torch.Tensor]:
        return {"seed": torch.tensor(seed), "encoder_hidden_states": self.text[seed]}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "diffusers"))
    print(f"{integer_instructions()}; {arguments.threads} threads; {packages}", flush=True)
    prompts = DataLoader(Prompts(arguments.samples), batch_size=2)
    plain, quantized = sampler(arguments), sampler(arguments)
    ptq = PostTrainingQuantization("int8", "int8", attention=False, calibration_samples=4, calibration_loader=prompts)
    trainer(ptq).validate(quantized, prompts, verbose=False)
    stepwise = sampler(arguments)
    cachequant = CacheQuant(
        interval=arguments.interval,
        correct=False,  # finding it takes longer, and applying it no time
        attention=False,
        calibration_samples=2,
        calibration_loader=prompts,
    )
    trainer(cachequant).validate(stepwise, prompts, verbose=False)

    def cache() -> FeatureCache:
        return FeatureCache(arguments.interval, schedule="uniform", correct=False)

    every = f"every {arguments.interval}th step"
    contenders: dict[str, Callable[[], tuple[DiffusionModule, list[L.Callback]]]] = {
        "float32": lambda: (plain, []),
        f"float32, deep {every}": lambda: (plain, [cache()]),
        "int8 kernels": lambda: (quantized, [ptq, KernelSwap("torch")]),
        f"int8 kernels, deep {every}": lambda: (quantized, [ptq, KernelSwap("torch"), cache()]),
        f"CacheQuant on int8 kernels, {every}": lambda: (stepwise, [cachequant, KernelSwap("torch")]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, make in contenders.items():  # not timed: what is only done once
        model, callbacks = make()
        trainer(*callbacks).predict(model, prompts)
        told = [str(found.runs) for found in callbacks if isinstance(found, FeatureCache)]
        print(f"  {name} {' '.join(told)}", flush=True)
    for _ in range(arguments.rounds):
        for name, make in contenders.items():
            model, callbacks = make()
            run = trainer(*callbacks)
            began = time.perf_counter()
            run.predict(model, prompts)
            seconds[name].append(time.perf_counter() - began)
    print(f"\n{'trainer.predict':44} {'seconds':>8} {'an image':>9} {'of float':>9}")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(first / own for first, own in zip(seconds["float32"], times, strict=True))
        print(f"{name:44} {median:8.2f} {median / arguments.samples:9.2f} {ratio:8.2f}x")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    return parser.parse_args()


def sampler(arguments: argparse.Namespace) -> DiffusionModule:
    """A U-Net with the levels of Stable Diffusion's, and DDIM."""
    torch.manual_seed(0)
    width = arguments.width
    denoiser = UNet2DConditionModel(
        sample_size=arguments.size,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=TEXT[1],
        attention_head_dim=8,
    )
    return DiffusionModule(denoiser, DDIMScheduler(), arguments.steps, validation_samples=0)


def trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


if __name__ == "__main__":
    main()
