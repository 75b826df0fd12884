"""The zoo: models of many libraries, each a LightningModule as a newcomer would write it.

Nothing here knows of quantization. Configurations are small, so that the whole zoo runs in minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.zoo_data import (
    CLASSES,
    Batch,
    Splits,
    captions_with_images,
    images,
    noisy,
    packed_latents,
    random_classes,
    random_vectors,
    smooth,
    text,
    tokens,
)
from benchmarks.zoo_modules import (
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
from benchmarks.zoo_weights import ASSETS, awaken, load, settle_batch_norms

TRAIN, VAL = 32, 8


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

    @property
    def weights(self) -> str:
        """Whether it is ``"trained"``, because the file is at hand, or ``"random"``."""
        return "trained" if self.trained is not None and (ASSETS / self.trained).is_file() else "random"

    def make(self) -> tuple[L.LightningModule, Splits]:
        """The module in eval mode and its data, the same ones each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module, data = self.build(), Splits(self.data(TRAIN), self.data(VAL))
            if self.weights == "trained":
                load(module.net, ASSETS / self.trained)
            else:
                awaken(module)
                settle_batch_norms(module, data.first("train"))
        return module.eval(), data


def timm_model(name: str, size: int, trained: str | None = None, **config: Any) -> Specimen:
    """A classifier of timm for images of a size."""

    def build() -> L.LightningModule:
        from timm import create_model

        return Classifier(create_model(name, **{"num_classes": CLASSES, **config}))

    return Specimen("timm", build, images(size), trained)


def transformers_model(
    name: str,
    data: Callable[[int], Batch],
    trained: str | None = None,
    module: type[L.LightningModule] = Keywords,
    part: str = "",
    **config: Any,
) -> Specimen:
    """A model of transformers by the name of its class, or a part of it."""

    def build() -> L.LightningModule:
        import transformers

        cls = getattr(transformers, name)
        net: nn.Module = cls(cls.config_class(**config))
        return module(net.get_submodule(part))

    return Specimen("transformers", build, data, trained)


def diffusers_model(
    name: str,
    data: Callable[[int], Batch],
    trained: str | None = None,
    module: type[L.LightningModule] = Keywords,
    **config: Any,
) -> Specimen:
    """A denoiser of diffusers by the name of its class."""

    def build() -> L.LightningModule:
        import diffusers

        return module(getattr(diffusers, name)(**config))

    return Specimen("diffusers", build, data, trained)


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
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TOWER = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 8,
    "sample_size": 32,
    "patch_size": 4,
    "num_embeds_ada_norm": CLASSES,
    "norm_num_groups": 1,
}
UNET = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
UNET_CONDITION = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 48,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SMALL_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
PIXART = {**SMALL_HEADS, "num_layers": 3, "sample_size": 16, "cross_attention_dim": 64, "caption_channels": 48}
SD3 = {
    **SMALL_HEADS,
    "num_layers": 3,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}
FLUX = {
    **SMALL_HEADS,
    "num_layers": 2,
    "num_single_layers": 3,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": False,
}

ZOO: dict[str, Specimen] = {
    "ViT": timm_model("vit_tiny_patch16_224", 64, img_size=64),
    "DeiT": timm_model("deit_tiny_patch16_224", 224, "deit_tiny/model.safetensors", num_classes=1000),
    "Swin": timm_model("swin_tiny_patch4_window7_224", 112, img_size=112, depths=(2, 2, 2, 2), embed_dim=48),
    "ConvNeXt": timm_model("convnext_atto", 64),
    "EfficientNet-B0": timm_model("efficientnet_b0", 128),
    "EfficientNet-Lite0": timm_model("tf_efficientnet_lite0", 64),
    "MobileNetV4": timm_model("mobilenetv4_conv_small", 64),
    "MobileNetV4 hybrid": timm_model("mobilenetv4_hybrid_medium", 64),
    "ResNet": timm_model("resnet18", 64),
    "MaxViT": timm_model("test_maxvit", 160),
    "BEiT": timm_model("beit_base_patch16_224", 64, img_size=64, depth=6, embed_dim=192, num_heads=3, init_values=0.1),
    "EVA": timm_model("eva02_tiny_patch14_224", 56, img_size=56),
    "BERT": transformers_model("BertModel", text(), **ENCODER),
    "RoBERTa": transformers_model("RobertaForMaskedLM", text(), **ENCODER),
    "GPT-2": transformers_model(
        "GPT2LMHeadModel", text(), vocab_size=500, n_embd=96, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "LLaMA": transformers_model("LlamaForCausalLM", text(vocabulary=512), "stories260k/model.safetensors", **STORIES),
    "Mistral": transformers_model("MistralForCausalLM", text(), sliding_window=8, **DECODER),
    "Qwen2": transformers_model("Qwen2ForCausalLM", text(), **DECODER),
    "Qwen3": transformers_model("Qwen3ForCausalLM", text(), head_dim=24, **DECODER),
    "T5": transformers_model(
        "T5ForConditionalGeneration",
        lambda n: {**text()(n), "decoder_input_ids": tokens(n, 9, 500)},
        **{"vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 3, "num_heads": 4},
        decoder_start_token_id=0,
    ),
    "ViT (transformers)": transformers_model(
        "ViTForImageClassification",
        images(64),
        None,
        HuggingFaceClassifier,
        **TOWER,
        image_size=64,
        patch_size=8,
        num_labels=10,
    ),
    "CLIP": transformers_model(
        "CLIPModel",
        captions_with_images,
        projection_dim=48,
        text_config={**TOWER, "vocab_size": 500, "max_position_embeddings": 16, "eos_token_id": 499},
        vision_config={**TOWER, "image_size": 48, "patch_size": 8},
    ),
    "Whisper encoder": transformers_model(
        "WhisperModel",
        lambda n: {"input_features": smooth(n, 80, 1)[:, 0]},
        part="encoder",
        **{"d_model": 64, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 256},
        **{"decoder_layers": 1, "decoder_attention_heads": 4},
        max_source_positions=40,
    ),
    "DiT": diffusers_model(
        "DiTTransformer2DModel",
        noisy("hidden_states", 1, 32, class_labels=random_classes),
        "dit_mnist/model.safetensors",
        **DIT,
    ),
    "UNet2D": diffusers_model("UNet2DModel", noisy("sample", 1, 32), "unet_mnist/model.safetensors", **UNET),
    "UNet2DCondition": diffusers_model(
        "UNet2DConditionModel", noisy("sample", 4, 16, encoder_hidden_states=random_vectors(7, 48)), **UNET_CONDITION
    ),
    "PixArt": diffusers_model(
        "PixArtTransformer2DModel", noisy("hidden_states", 4, 16, encoder_hidden_states=random_vectors(9, 48)), **PIXART
    ),
    "SD3": diffusers_model(
        "SD3Transformer2DModel",
        noisy(
            "hidden_states",
            4,
            16,
            encoder_hidden_states=random_vectors(9, 48),
            pooled_projections=random_vectors(32),
        ),
        **SD3,
    ),
    "Flux": diffusers_model("FluxTransformer2DModel", packed_latents, None, FluxDenoiser, **FLUX),
    "nn.TransformerEncoder": Specimen("torch", lambda: TextClassifier(batch_first=True), text()),
    "nn.TransformerEncoder, length first": Specimen("torch", lambda: TextClassifier(batch_first=False), text()),
    "nn.MultiheadAttention": Specimen("torch", Readers, lambda n: [torch.randn(n, 21, 40), random_classes(n)]),
    "keyword-only": Specimen(
        "by hand", KeywordOnly, lambda n: {"words": tokens(n, 13, 300), "numbers": torch.randn(n, 6)}
    ),
    "GAN": Specimen("by hand", Gan, lambda n: [torch.randn(n, 32)]),
    "student and teacher": Specimen("by hand", Distilled, images(48)),
}
