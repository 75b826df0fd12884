"""Rectified sparse attention on trained models: DeiT-Tiny on 384 pixel images, and a diffusion transformer."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import RectifiedSparseAttention
from lightning_quant.kernels.sparse_attention import Sparsity, rectified_sparse_attention
from lightning_quant.kernels.sparse_attention import attention as method
from tests.models import trainer
from tests.real import ASSETS, Classifier, imagenet

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("assets")]
IMAGES = 500


def deit_tiny_384():
    """DeiT-Tiny with its position embedding interpolated from 14x14 to 24x24: 577 tokens."""
    import timm

    net = timm.create_model("deit_tiny_patch16_224", img_size=384)
    weights = {name: x.float() for name, x in load_file(ASSETS / "deit_tiny" / "model.safetensors").items()}
    token, grid = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:].mT.unflatten(2, (14, 14))
    grid = F.interpolate(grid, size=(24, 24), mode="bicubic", antialias=True).flatten(2).mT
    net.load_state_dict(weights | {"pos_embed": torch.cat([token, grid], 1)})
    return Classifier(net.eval())


def enlarged():
    images, labels = imagenet("evaluation")
    loader = DataLoader(TensorDataset(images[:IMAGES], labels[:IMAGES]), batch_size=25)
    for pictures, classes in loader:
        yield F.interpolate(pictures, size=(384, 384), mode="bicubic"), classes


class Enlarged:
    """A loader of 384 pixel images, made as they are needed."""

    def __iter__(self):
        return enlarged()

    def __len__(self):
        return -(-IMAGES // 25)


def top1(*callbacks):
    return 100 * trainer(*callbacks).validate(deit_tiny_384(), Enlarged(), verbose=False)[0]["top1"]


@pytest.mark.long
def test_deit_tiny_keeps_its_accuracy_with_half_the_blocks_dropped(capsys):
    dense, found = top1(), {}
    for name, parts in (("rectified", ("critical", "noncritical")), ("plain", ())):
        callback = RectifiedSparseAttention(drop_rate=0.5, block=16, p_remain=0.3, rectify=parts)
        found[name] = top1(callback)
    share = torch.stack([site.kept_share for site in callback.facts().values()]).mean()
    with capsys.disabled():
        print(
            f"\n  DeiT-Tiny at 384 px, blocks of 16, half of them dropped, {share:.1%} of the keys kept: top-1 "
            f"{found['rectified']:.1f}, plain {found['plain']:.1f}, dense {dense:.1f}"
        )
    assert dense - found["rectified"] <= 1.0
    assert found["rectified"] > found["plain"] + 1.0


class Watch:
    """The error of every sparse call to dense attention at equal masks: rectified, plain and in the variants."""

    def __init__(self, monkeypatch):
        self.errors = {}
        original = rectified_sparse_attention

        def compare(query, key, value, blocks, sparsity, mask=None, scale=None, workspace=None):
            attended = original(query, key, value, blocks, sparsity, mask, scale, workspace)
            dense = F.scaled_dot_product_attention(query, key, value, scale=scale)
            plain = Sparsity(sparsity.drop_rate, sparsity.p_remain, ())
            with pytest.MonkeyPatch.context() as patch:
                outputs = {"rectified": attended.output, "plain": original(query, key, value, blocks, plain).output}
                patch.setattr(method, "pooling_is_worth_it", lambda logits, *_: torch.ones_like(logits, dtype=bool))
                outputs["all dropped blocks pooled"] = original(query, key, value, blocks, sparsity).output
            for name, output in outputs.items():
                distance, length = (torch.linalg.vector_norm(x, dim=(0, 2, 3)) for x in (output - dense, dense))
                self.errors.setdefault(name, []).append(distance / length)
            return attended

        monkeypatch.setattr("lightning_quant.kernels.sparse_attention.site.rectified_sparse_attention", compare)

    def mean(self):
        return {name: float(torch.cat(errors).mean()) for name, errors in self.errors.items()}


def report(capsys, what, drop_rate, watch):
    errors = ", ".join(f"{name} {error:.3f}" for name, error in watch.mean().items())
    with capsys.disabled():
        print(f"\n  {what}, drop_rate={drop_rate}: relative error {errors}")


@pytest.mark.parametrize("drop_rate", [0.5, 0.8, 0.9])
def test_deit_tiny_rectified_is_nearer_to_dense_at_equal_masks(drop_rate, monkeypatch, capsys):
    watch = Watch(monkeypatch)
    callback = RectifiedSparseAttention(drop_rate=drop_rate, block=16, p_remain=0.3)
    trainer(callback, limit_predict_batches=2).predict(deit_tiny_384(), Enlarged())
    report(capsys, "DeiT-Tiny", drop_rate, watch)
    layers = [torch.stack(watch.errors[name]).unflatten(0, (2, 12)).mean((0, 2)) for name in ("rectified", "plain")]
    assert (layers[0] < layers[1]).all()  # in every layer


@pytest.mark.parametrize("drop_rate", [0.5, 0.8])
def test_a_trained_diffusion_transformer_rectified_is_nearer_to_dense(drop_rate, monkeypatch, capsys):
    import lightning as L
    import numpy as np
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    class Denoise(L.LightningModule):
        def __init__(self):
            super().__init__()
            config = json.loads((ASSETS / "dit_mnist" / "config.json").read_text())
            self.net = DiTTransformer2DModel.from_config(config)
            weights = load_file(ASSETS / "dit_mnist" / "model.safetensors")
            self.net.load_state_dict({name: x.float() for name, x in weights.items()})

        def predict_step(self, batch, batch_idx):
            x, timestep, label = batch
            return self.net(x, timestep=timestep, class_labels=label).sample

    stored = np.load(ASSETS / "mnist" / "t10k.npz")
    digits = torch.from_numpy(stored["x"][:64]).float().reshape(-1, 1, 28, 28) / 127.5 - 1
    digits = F.pad(digits, (2, 2, 2, 2), value=-1.0)
    timesteps = torch.randint(0, 1000, (64,))
    noisy = DDPMScheduler(1000).add_noise(digits, torch.randn_like(digits), timesteps)
    labels = torch.from_numpy(stored["y"][:64]).long()
    watch = Watch(monkeypatch)
    callback = RectifiedSparseAttention(drop_rate=drop_rate, block=4, p_remain=0.3)
    trainer(callback).predict(Denoise(), DataLoader(TensorDataset(noisy, timesteps, labels), batch_size=32))
    report(capsys, "DiT on MNIST", drop_rate, watch)
    assert watch.mean()["rectified"] < watch.mean()["plain"]
