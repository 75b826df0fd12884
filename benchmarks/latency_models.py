"""The models whose latency is compared; their weights are random, for time does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timed:
    """A model, a batch of its inputs by size, and the sizes that are timed."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batches: tuple[int, ...]


class Sentences(nn.Module):
    """MiniLM's BERT behind its embedding table: the first hidden state of (batch, 128) tokens."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state


def _image_model(name: str) -> Timed:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name).eval()

    return Timed(build, lambda batch: torch.randn(batch, 3, 224, 224), (1, 8))


def _sentences() -> nn.Module:
    torch.manual_seed(0)
    return Sentences().eval()


MODELS = {
    "ViT-S/16": _image_model("vit_small_patch16_224"),
    "DeiT-Tiny": _image_model("deit_tiny_patch16_224"),
    "MiniLM": Timed(_sentences, lambda batch: torch.randint(0, 30522, (batch, 128)), (1, 16)),
    "EfficientNet-Lite0": _image_model("tf_efficientnet_lite0"),
}
