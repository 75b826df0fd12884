"""How far the samples of a model are from those of its float twin, and from real images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_quant.calibration import Moment
from lightning_quant.layers import as_float, is_altered
from lightning_quant.metrics import SQNR

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance


class TrajectoryJudge:
    """Samples with a model and with its float twin, from equal seeds, and compares: closed loop, step by step.

    Args:
        features: a network that gives (N, d) features, for the Frechet distances; ``None`` for none.
        device: of the model.

    Attributes:
        steps: the signal to noise ratio of what each step leaves behind.
        shown: the first samples of the model and of its float twin.
    """

    def __init__(self, features: nn.Module | None, device: torch.device) -> None:
        self.features, self.device = features, device
        self.steps: list[SQNR] = []
        self.shown: tuple[Tensor, Tensor] | None = None
        self.distances: dict[str, FrechetInceptionDistance] = {}

    def see(self, module: nn.Module, trajectory: Callable[[], Iterable[Moment]], images: Tensor | None) -> None:
        """Sample.

        Args:
            module: the model.
            trajectory: samples with it, from the same seeds each time.
            images: real ones.
        """
        own = [moment.after for moment in trajectory()]
        if images is not None:
            self._measure("frechet", images, own[-1])
        if not is_altered(module):
            return
        with as_float(module):
            twin = [moment.after for moment in trajectory()]
        self.steps = self.steps or [SQNR().to(self.device) for _ in own]
        for metric, quantized, exact in zip(self.steps, own, twin, strict=True):
            metric.update(quantized, exact)
        self._measure("frechet_to_float", twin[-1], own[-1])
        self.shown = self.shown or (own[-1].float().cpu(), twin[-1].float().cpu())

    def compute(self) -> dict[str, Tensor]:
        """The final samples' ratio, and the distances."""
        found = {"trajectory_sqnr": self.steps[-1].compute()} if self.steps else {}
        return found | {name: distance.compute() for name, distance in self.distances.items()}

    def _measure(self, name: str, real: Tensor, drawn: Tensor) -> None:
        if self.features is None:
            return
        from torchmetrics.image.fid import FrechetInceptionDistance

        if name not in self.distances:
            width = self.features.to(self.device)(drawn[:1]).shape[-1]
            features = _Features(self.features, width)
            self.distances[name] = FrechetInceptionDistance(features, normalize=True).to(self.device)
        self.distances[name].update(real, real=True)
        self.distances[name].update(drawn, real=False)


class _Features(nn.Module):
    """A network that says beforehand how many features it gives, or torchmetrics shows it an image to find out."""

    def __init__(self, network: nn.Module, num_features: int) -> None:
        super().__init__()
        self.network = network.eval()
        self.num_features = num_features

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features
