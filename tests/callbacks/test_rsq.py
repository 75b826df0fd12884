"""RSQ is GPTQ with weights on tokens."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import GPTQ, RSQ
from tests.callbacks.test_gptq import W3, LanguageModel, codes, validated
from tests.models import Sequences, TinyTransformer


def equal(one, other):
    return all(map(torch.equal, codes(one).values(), codes(other).values()))


def test_tokens_that_all_weigh_alike_are_gptq_bit_for_bit():
    plain = validated(GPTQ(**W3, ranges="lp"))
    assert equal(validated(RSQ(**W3, power=0.0)), plain) and equal(validated(RSQ(**W3, r_min=1.0)), plain)
    assert not equal(validated(RSQ(**W3)), plain)


@pytest.mark.parametrize("importance", ["attention", "norm", "change"])
def test_its_weights_are_of_the_block_as_it_is_before_it_is_solved(importance):
    seen = {}

    class Watching(RSQ):
        def token_weights(self, block):
            weights = super().token_weights(block)
            seen[block.name] = (weights, [type(m) for m in block.module.modules()], codes(block.module))
            return weights

    callback = Watching(**W3, importance=importance)
    validated(callback)
    assert list(seen) == ["blocks.0", "blocks.1"]
    for weights, _, found in seen.values():
        assert torch.cat(weights).shape == (64, 5) and all(code is None for code in found.values())
        torch.testing.assert_close(torch.cat(weights).sum(1), torch.full((64,), 5.0))


def test_a_language_model_and_its_padding():
    class Padded(LanguageModel):
        def forward(self, ids):
            return self.net(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=False).logits

    ids = torch.randint(1, 17, (32, 12), generator=torch.Generator().manual_seed(0))
    ids[::2, 8:] = 0
    tokens = DataLoader(ids, batch_size=8)
    weights = []

    class Watching(RSQ):
        def token_weights(self, block):
            weights.append(torch.cat(super().token_weights(block)))
            return list(weights[-1].split(8))

    callback = Watching("int3_channel", calibration_loader=tokens)
    validated(callback, Padded(), _Tokens(tokens))
    assert callback.solved["net.model.layers.0.mlp.down_proj"]["tokens"] == int((ids > 0).sum())
    assert not weights[0][ids == 0].any()


class _Tokens(Sequences):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def val_dataloader(self):
        return self.loader


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.fc(x)


def test_a_block_that_does_not_attend_is_refused_by_name():
    model = TinyTransformer().eval()
    model.blocks = nn.ModuleList(Mixer() for _ in range(2))
    with pytest.raises(ValueError, match=r"`blocks\.0` does not attend.*importance='norm'"):
        validated(RSQ(**W3), model)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="importance='luck'"):
        RSQ(importance="luck")
    with pytest.raises(ValueError, match="r_min=0"):
        RSQ(r_min=0)
