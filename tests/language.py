"""Small causal language models that the tests share, each with what rotations have to cope with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant import LanguageModule

WORDS, WIDTH, HEADS, KV_HEADS, HIDDEN, TOKENS = 29, 24, 4, 2, 40, 9


def rotary(x: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, T, d)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(half, dtype=x.dtype)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class LlamaBlock(nn.Module):
    """Grouped queries, a rotary embedding and a gated MLP."""

    def __init__(self, norm: type[nn.Module], bias: bool):
        super().__init__()
        size = WIDTH // HEADS
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * size, bias=bias) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=bias) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (rotary(k), v))
        attended = F.scaled_dot_product_attention(rotary(q), k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Two such blocks; the head may share its table with the embedding, and outliers may be planted in channels."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, bias: bool = False, tied: bool = True, outlier: float = 1.0):
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock(norm, bias) for _ in range(2))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.table.weight
        for module in self.modules():
            if isinstance(module, norm):
                nn.init.uniform_(module.weight, 0.2, 2.0)
                module.weight.data[3] *= outlier
                if getattr(module, "bias", None) is not None:
                    nn.init.normal_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def llama(**arguments: object) -> LanguageModule:
    return LanguageModule(Llama(**arguments)).eval()


def gpt2() -> LanguageModule:
    """GPT-2 of transformers: one Conv1D for q, k and v, learned positions, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=96, bos_token_id=0, eos_token_id=0
    )
    net = GPT2LMHeadModel(config)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.2, 2.0)
            nn.init.normal_(module.bias)
    return LanguageModule(net).eval()


def tokens(count: int = 8 * TOKENS) -> Tensor:
    return torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(1))
