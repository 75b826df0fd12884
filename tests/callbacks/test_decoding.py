"""A quantized decoder that generates token by token computes what it computes for the whole text at once.

With static scales for whole tensors every element is rounded alone, so it does not matter in which call it comes.
"""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant.layers import AttentionSite
from lightning_quant.quantizers import Quantizer
from tests.callbacks.unchanged import scales
from tests.cases import ptq, quantized
from tests.models import trainer

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, PROMPT = 50, 12, 5
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "attn_implementation": "sdpa"}


def gpt2(**options):
    config = transformers.GPT2Config(n_embd=32, bos_token_id=0, eos_token_id=VOCABULARY + 1, **{**SIZES, **options})
    return transformers.GPT2LMHeadModel(config)


def llama(**options):  # four queries share the keys of two heads
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "eos_token_id": VOCABULARY + 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes, **options}))


DECODERS = {
    "GPT-2": gpt2,
    "GPT-2, spelled out": lambda: gpt2(attn_implementation="eager"),
    "LLaMA": llama,
    "LLaMA, spelled out": lambda: llama(attn_implementation="eager"),
}


class Language(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids):
        return self.net(input_ids=input_ids).logits

    def validation_step(self, batch, batch_idx):
        self.log("power", self(**batch).square().mean())


def texts(seed=0, count=8):
    return torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def decoder(build, **arguments):
    """A quantized decoder in double precision, where nothing but a bug can move a value over the edge of a code."""
    torch.manual_seed(0)
    net = build().eval()
    for parameter in net.parameters():  # logits that tell the tokens apart
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model = Language(net)
    data = DataLoader([{"input_ids": text} for text in texts()], batch_size=4)
    quantize = trainer(ptq(calibration_loader="val", **arguments), precision="64-true")
    quantize.validate(model, data, verbose=False)
    return model


def assert_close(a, b):
    assert torch.allclose(a, b, atol=1e-9 * b.abs().max().item()), (a - b).abs().max()


@pytest.mark.parametrize("build", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_whole_text(build):
    net = decoder(build).net
    sites = [module for module in net.modules() if isinstance(module, AttentionSite)]
    assert len(sites) == 2 and all(
        quantizer.calibrated for quantizer in net.modules() if isinstance(quantizer, Quantizer)
    )
    ids = texts(seed=1)
    whole = net(input_ids=ids, use_cache=False).logits
    out = net(input_ids=ids[:, :PROMPT], use_cache=True)
    assert_close(out.logits, whole[:, :PROMPT])
    for position in range(PROMPT, LENGTH):
        token = ids[:, position : position + 1]
        out = net(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        assert_close(out.logits[:, 0], whole[:, position])
    chunk = net(input_ids=ids[:, :PROMPT], use_cache=True)
    chunk = net(input_ids=ids[:, PROMPT:], past_key_values=chunk.past_key_values, use_cache=True)
    assert_close(chunk.logits, whole[:, PROMPT:])


@pytest.mark.parametrize("build", [gpt2, llama])
@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(build):
    net, options = decoder(build).net, {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = texts(seed=2)[:, :PROMPT]
    with_cache, without = (net.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert with_cache.shape == (8, PROMPT + 6) and torch.equal(with_cache, without)
    assert with_cache[:, PROMPT:].unique().numel() > 3  # it does not say one thing all the time


@pytest.mark.parametrize("build", [gpt2, llama])
@torch.no_grad()
def test_the_fused_and_the_spelled_out_door_find_the_same_scales(build):
    """Grouped keys come as they are to the fused call, and repeated for every query to the one that is spelled out."""
    fused, spelled = (decoder(lambda how=how: build(attn_implementation=how)) for how in ("sdpa", "eager"))
    for model, positions in ((fused, 0), (spelled, 1)):
        assert [len(module.spelled) for module in model.modules() if isinstance(module, AttentionSite)] == [
            positions
        ] * 2
    assert quantized(fused) == quantized(spelled)
    assert scales(fused).keys() == scales(spelled).keys()
    for one, other in zip(fused.modules(), spelled.modules(), strict=True):
        if isinstance(one, Quantizer):
            assert torch.allclose(one.scale, other.scale, rtol=1e-5) and torch.equal(one.zero_point, other.zero_point)
    ids = texts(seed=3)
    exact = fused(ids)
    assert (exact - spelled(ids)).abs().max() < 0.1 * exact.std()


@torch.no_grad()
def test_what_comes_later_in_a_text_changes_nothing_before():
    model = decoder(llama)
    ids = texts(seed=4)
    other = ids.clone()
    other[:, PROMPT:] = (other[:, PROMPT:] + 1) % VOCABULARY
    assert_close(model(other)[:, :PROMPT], model(ids)[:, :PROMPT])
    assert (model(other)[:, PROMPT:] - model(ids)[:, PROMPT:]).abs().max() > 1e-3
