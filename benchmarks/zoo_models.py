"""The zoo: models of many libraries, each a LightningModule as a newcomer would write it.

Nothing here knows of quantization. Weights are random and seeded, except where trained ones are at hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.zoo_modules import (
    CLASSES,
    Classifier,
    Distilled,
    FluxDenoiser,
    Gan,
    HuggingFaceClassifier,
    KeywordOnly,
    Keywords,
    Readers,
    TextClassifier,
)

TRAIN, VAL = 32, 8
ASSETS = Path(os.environ.get("LIGHTNING_QUANT_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))

Batch = dict[str, Tensor] | list[Tensor]


@dataclass(frozen=True)
class Specimen:
    """One model of the zoo.

    Args:
        library: where its class is from.
        build: makes the LightningModule.
        data: makes the samples of one split as stacked tensors, by keyword where the model takes keywords.
        trained: the file of trained weights below the folder of assets, if there is one.
    """

    library: str
    build: Callable[[], L.LightningModule]
    data: Callable[[int], Batch]
    trained: str | None = None

    def make(self) -> tuple[L.LightningModule, L.LightningDataModule]:
        """The module in eval mode and its data, the same ones each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module, data = self.build(), Splits(self.data(TRAIN), self.data(VAL))
            if self.trained is not None and self.at_hand():
                weights = load_file(ASSETS / self.trained)
                _, unexpected = module.net.load_state_dict({k: x.float() for k, x in weights.items()}, strict=False)
                assert not unexpected, f"{self.trained} has {unexpected}, which {type(module.net).__name__} has not"
            else:
                awaken(module)
                settle_batch_norms(module, data.first("train"))
        return module.eval(), data

    def at_hand(self) -> bool:
        """Whether the trained weights are there."""
        return self.trained is not None and (ASSETS / self.trained).is_file()


@torch.no_grad()
def awaken(module: nn.Module) -> None:
    """Let every layer of a random net matter.

    Initialisers make layers that hardly do anything, for training to start gently: layer scales near 0, weights far
    too small for a net this narrow, norms that scale nothing, biases of 0. Noise in such layers would not be seen.
    """
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    for child in module.modules():
        if isinstance(child, layers) or type(child).__name__ == "Conv1D":
            fan_in = child.weight[0].numel() if isinstance(child, layers) else len(child.weight)
            if child.weight.std() * fan_in**0.5 < 0.24:
                nn.init.normal_(child.weight, std=fan_in**-0.5)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and (parameter == parameter[0]).all():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)


@torch.no_grad()
def settle_batch_norms(module: nn.Module, batch: Any) -> None:
    """Give batch norms statistics that keep activations at unit size; with those they are born with, they die out.

    The means stay 0. A random net whose batch norms also centre is chaotic: the float EfficientNet-B0 would turn 40 dB
    of noise behind its first layer into 14 dB at its output.
    """

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]  # (B, C, ...)
        norm.running_mean.zero_()
        norm.running_var.fill_(x.square().mean())

    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    if norms:
        call(module.eval(), batch)
    for handle in handles:
        handle.remove()


def call(module: nn.Module, batch: Any) -> Any:
    """The module's output: a dict goes in as keywords, of a list the first element."""
    return module(**batch) if isinstance(batch, dict) else module(batch[0])


class Stacked(Dataset):
    """Samples out of stacked tensors by keyword."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class Splits(L.LightningDataModule):
    """A train and a validation set in batches of 8."""

    def __init__(self, train: Batch, val: Batch) -> None:
        super().__init__()
        self.sets = {
            name: Stacked(data) if isinstance(data, dict) else TensorDataset(*data)
            for name, data in {"train": train, "val": val}.items()
        }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["train"], batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets["val"], batch_size=8)

    def first(self, split: str) -> Any:
        """The first batch of a split."""
        return next(iter(DataLoader(self.sets[split], batch_size=8)))


# ---------------------------------------------------------------- data


def smooth(n: int, size: int, channels: int = 3) -> Tensor:
    """Images (n, channels, size, size): shapes of several sizes, edges and a little noise, about standardised."""
    image = sum(
        F.interpolate(torch.randn(n, channels, cells, cells), size, mode=mode)
        for cells, mode in ((2, "bicubic"), (5, "bicubic"), (7, "nearest"))
    )
    return image / 1.5 + 0.1 * torch.randn(n, channels, size, size)


def tokens(n: int, length: int, vocabulary: int) -> Tensor:
    """Token ids (n, length), frequent ones far more often than rare ones, as in text."""
    return (vocabulary * torch.rand(n, length) ** 3).long()


def padding(n: int, length: int) -> Tensor:
    """An attention mask (n, length): 1 for a token, 0 for padding behind the last one; the first row is full."""
    lengths = torch.randint(length // 2, length + 1, (n, 1))
    lengths[0] = length
    return (torch.arange(length) < lengths).long()


def images(size: int) -> Callable[[int], Batch]:
    """Images with labels."""
    return lambda n: [smooth(n, size), torch.randint(CLASSES, (n,))]


def text(length: int = 19, vocabulary: int = 500) -> Callable[[int], Batch]:
    """Padded token ids by keyword."""
    return lambda n: {"input_ids": tokens(n, length, vocabulary), "attention_mask": padding(n, length)}


def latents(channels: int, size: int, **more: Callable[[int], Tensor]) -> Callable[[int], Batch]:
    """Noisy images with the time at which they are so noisy, by keyword; ``sample`` where nothing else is said."""
    name = "hidden_states" if more.pop("transformer", None) else "sample"

    def make(n: int) -> Batch:
        time = torch.randint(1000, (n,))
        clean = (1 - time / 1000).sqrt().view(-1, 1, 1, 1)
        noisy = clean * smooth(n, size, channels) + (1 - clean**2).sqrt() * torch.randn(n, channels, size, size)
        return {name: noisy, "timestep": time, **{key: value(n) for key, value in more.items()}}

    return make


# ---------------------------------------------------------------- builders


def timm_net(name: str, **config: Any) -> Callable[[], L.LightningModule]:
    """A classifier of timm."""

    def build() -> L.LightningModule:
        import timm

        return Classifier(timm.create_model(name, **{"num_classes": CLASSES, **config}))

    return build


def transformers_net(
    name: str, config: str, module: type[L.LightningModule] = Keywords, **arguments: Any
) -> Callable[[], L.LightningModule]:
    """A model of transformers by the names of its class and of its configuration."""

    def build() -> L.LightningModule:
        import transformers

        return module(getattr(transformers, name)(getattr(transformers, config)(**arguments)))

    return build


def diffusers_net(
    name: str, module: type[L.LightningModule] = Keywords, **config: Any
) -> Callable[[], L.LightningModule]:
    """A denoiser of diffusers by the name of its class."""

    def build() -> L.LightningModule:
        import diffusers

        return module(getattr(diffusers, name)(**config))

    return build


# ---------------------------------------------------------------- the zoo

SWIN = {"img_size": 112, "depths": (2, 2, 2, 2), "embed_dim": 48}
BEIT = {"img_size": 64, "depth": 6, "embed_dim": 192, "num_heads": 3, "init_values": 0.1}
ENCODER = {
    "vocab_size": 500,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
DECODER = {**ENCODER, "intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 64}
STORIES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
}
TOWER = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
DIT = {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 1, "out_channels": 1, "num_layers": 8}
UNET_BLOCKS = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
UNET = {"sample_size": 32, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, **UNET_BLOCKS}


def random_classes(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,))


def random_text(length: int, width: int) -> Callable[[int], Tensor]:
    """What a text encoder would give: (n, length, width)."""
    return lambda n: torch.randn(n, length, width)


def captions_with_images(n: int) -> Batch:
    return {**text(12)(n), "pixel_values": smooth(n, 48)}


def packed_latents(n: int) -> Batch:
    """What Flux takes: patches as tokens (n, 64, 16), two embeddings of the text, the time in 0..1."""
    return {
        "hidden_states": F.unfold(smooth(n, 16, 4), 2, stride=2).transpose(1, 2),
        "encoder_hidden_states": torch.randn(n, 11, 32),
        "pooled_projections": torch.randn(n, 24),
        "timestep": torch.rand(n),
    }


ZOO: dict[str, Specimen] = {
    "ViT": Specimen("timm", timm_net("vit_tiny_patch16_224", img_size=64), images(64)),
    "DeiT": Specimen(
        "timm", timm_net("deit_tiny_patch16_224", num_classes=1000), images(224), "deit_tiny/model.safetensors"
    ),
    "Swin": Specimen("timm", timm_net("swin_tiny_patch4_window7_224", **SWIN), images(112)),
    "ConvNeXt": Specimen("timm", timm_net("convnext_atto"), images(64)),
    "EfficientNet": Specimen("timm", timm_net("efficientnet_b0"), images(64)),
    "MobileNetV4": Specimen("timm", timm_net("mobilenetv4_conv_small"), images(64)),
    "MobileNetV4 hybrid": Specimen("timm", timm_net("mobilenetv4_hybrid_medium"), images(64)),
    "ResNet": Specimen("timm", timm_net("resnet18"), images(64)),
    "MaxViT": Specimen("timm", timm_net("test_maxvit"), images(160)),
    "BEiT": Specimen("timm", timm_net("beit_base_patch16_224", **BEIT), images(64)),
    "EVA": Specimen("timm", timm_net("eva02_tiny_patch14_224", img_size=56), images(56)),
    "BERT": Specimen("transformers", transformers_net("BertModel", "BertConfig", **ENCODER), text()),
    "RoBERTa": Specimen("transformers", transformers_net("RobertaForMaskedLM", "RobertaConfig", **ENCODER), text()),
    "GPT-2": Specimen(
        "transformers",
        transformers_net("GPT2LMHeadModel", "GPT2Config", vocab_size=500, n_embd=96, n_layer=4, n_head=4),
        text(),
    ),
    "LLaMA": Specimen(
        "transformers",
        transformers_net(
            "LlamaForCausalLM",
            "LlamaConfig",
            **STORIES,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            max_position_embeddings=512,
        ),
        text(vocabulary=512),
        "stories260k/model.safetensors",
    ),  # fmt: skip
    "Mistral": Specimen(
        "transformers", transformers_net("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=8), text()
    ),
    "Qwen2": Specimen("transformers", transformers_net("Qwen2ForCausalLM", "Qwen2Config", **DECODER), text()),
    "Qwen3": Specimen(
        "transformers", transformers_net("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=24), text()
    ),
    "T5": Specimen(
        "transformers",
        transformers_net(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=500,
            d_model=64,
            d_kv=16,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        lambda n: {**text()(n), "decoder_input_ids": tokens(n, 9, 500)},
    ),  # fmt: skip
    "ViT (transformers)": Specimen(
        "transformers",
        transformers_net(
            "ViTForImageClassification",
            "ViTConfig",
            HuggingFaceClassifier,
            **TOWER,
            image_size=64,
            patch_size=8,
            num_labels=CLASSES,
        ),
        images(64),
    ),  # fmt: skip
    "CLIP": Specimen(
        "transformers",
        transformers_net(
            "CLIPModel",
            "CLIPConfig",
            projection_dim=48,
            text_config={**TOWER, "vocab_size": 500, "max_position_embeddings": 16, "eos_token_id": 499},
            vision_config={**TOWER, "image_size": 48, "patch_size": 8},
        ),
        captions_with_images,
    ),  # fmt: skip
    "Whisper encoder": Specimen(
        "transformers",
        lambda: Keywords(_whisper_encoder()),
        lambda n: {"input_features": smooth(n, 80, 1)[:, 0]},
    ),
    "DiT": Specimen(
        "diffusers",
        diffusers_net(
            "DiTTransformer2DModel", **DIT, sample_size=32, patch_size=4, num_embeds_ada_norm=CLASSES, norm_num_groups=1
        ),
        latents(1, 32, transformer=True, class_labels=random_classes),
        "dit_mnist/model.safetensors",
    ),
    "UNet2D": Specimen(
        "diffusers",
        diffusers_net("UNet2DModel", **UNET, attention_head_dim=16, norm_num_groups=8),
        latents(1, 32),
        "unet_mnist/model.safetensors",
    ),
    "UNet2DCondition": Specimen(
        "diffusers",
        diffusers_net(
            "UNet2DConditionModel",
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=48,
            attention_head_dim=8,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        latents(4, 16, encoder_hidden_states=random_text(7, 48)),
    ),  # fmt: skip
    "PixArt": Specimen(
        "diffusers",
        diffusers_net(
            "PixArtTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            num_layers=3,
            sample_size=16,
            caption_channels=48,
        ),
        latents(4, 16, transformer=True, encoder_hidden_states=random_text(9, 48)),
    ),  # fmt: skip
    "SD3": Specimen(
        "diffusers",
        diffusers_net(
            "SD3Transformer2DModel",
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=48,
            caption_projection_dim=64,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        latents(
            4,
            16,
            transformer=True,
            encoder_hidden_states=random_text(9, 48),
            pooled_projections=lambda n: torch.randn(n, 32),
        ),
    ),  # fmt: skip
    "Flux": Specimen(
        "diffusers",
        diffusers_net(
            "FluxTransformer2DModel",
            FluxDenoiser,
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=False,
        ),
        packed_latents,
    ),  # fmt: skip
    "nn.TransformerEncoder": Specimen("torch", lambda: TextClassifier(batch_first=True), text()),
    "nn.TransformerEncoder, length first": Specimen("torch", lambda: TextClassifier(batch_first=False), text()),
    "nn.MultiheadAttention": Specimen("torch", Readers, lambda n: [torch.randn(n, 21, 40), random_classes(n)]),
    "keyword-only": Specimen(
        "by hand", KeywordOnly, lambda n: {"words": tokens(n, 13, 300), "numbers": torch.randn(n, 6)}
    ),
    "GAN": Specimen("by hand", Gan, lambda n: [torch.randn(n, 32)]),
    "student and teacher": Specimen("by hand", Distilled, images(48)),
}


def _whisper_encoder() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(
        WhisperConfig(
            d_model=64, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=256, max_source_positions=40
        )
    )
