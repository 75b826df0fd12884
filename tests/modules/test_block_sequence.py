"""Each block is fed with exactly what the model, as it is by then, would feed it with."""

import weakref
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_quant.calibration import record
from lightning_quant.modules.block_sequence import BlockSequence, caches_off
from tests.models import TinyTransformer


class Residual(nn.Module):
    """Reads a mask and a table beside its input, as decoder layers do."""

    def __init__(self, in_place=False):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.in_place = in_place

    def forward(self, x, mask, *, table=None, scale=1.0):
        change = self.out((self.q(x) * self.k(x)).relu() * mask + table) * scale
        if self.in_place:
            x += change
            return x
        return (x + change,)


class Stack(nn.Module):
    def __init__(self, between=None, in_place=False, blocks=3):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Residual(in_place) for _ in range(blocks))
        self.between, self.entered = between, 0

    def forward(self, x):
        self.entered += 1
        mask, table, start = x > 0, torch.linspace(0, 1, 4), self.embed(x)
        x = start
        for number, block in enumerate(self.blocks):
            x = block(x, mask, table=table if number < 2 else table * 2, scale=0.5)
            x = x[0] if isinstance(x, tuple) else x
            if self.between:
                x = self.between(x, start)
        return x


def in_place(x, start):
    return x.mul_(0.5)


def anew(x, start):
    return x + 1


def skip(x, start):
    return x + start


BATCHES = [torch.randn(size, 5, 4, generator=torch.Generator().manual_seed(size)) for size in (3, 3, 2)]


def sequence(model, names=("blocks.0", "blocks.1", "blocks.2"), batches=BATCHES):
    return BlockSequence(model, names, batches, model, batches[0][:2])


@torch.no_grad()
@pytest.mark.parametrize(
    "model",
    [Stack(), Stack(in_place=True), Stack(in_place), Stack(anew), Stack(skip)],
    ids=["chain", "writes to its input", "written to between", "computed between", "skip"],
)
def test_every_block_gets_what_the_changed_model_gives_it(model):
    for block in sequence(model.eval()):
        for group in block.groups({"q": block.module.q, "out": block.module.out}):
            block.observe({name: getattr(block.module, name) for name in group}, lambda *_: None)
        block.module.q.weight.mul_(0.5)  # solved
        for number, batch in enumerate(BATCHES):
            args, kwargs = block._sequence._arguments(block.number, block._sequence._inputs[number], "cpu")
            call = record(block.module, lambda batch=batch: model(batch.clone()))[0]
            found = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            expected = [x for x in call.inputs if isinstance(x, torch.Tensor)]
            assert len(found) == 3 and all(map(torch.equal, found, expected))
            assert kwargs["scale"] == 0.5
            out = block(number)
            assert torch.equal(out if model.blocks[0].in_place else out[0], call.outputs[0])


@torch.no_grad()
def test_a_chain_of_blocks_needs_the_rest_of_the_model_only_for_what_is_new():
    """The third block reads another table, so the model runs up to it once more."""
    model = Stack().eval()
    for _ in sequence(model):
        pass
    assert model.entered == 2 + 2 * len(BATCHES)
    model = TinyTransformer().eval()
    links = BlockSequence(model, ["blocks.0", "blocks.1"], [torch.randn(2, 5, 16)], model, torch.randn(2, 5, 16)).links
    assert [link.follows for link in links] == [False, True]


@torch.no_grad()
def test_what_is_kept_are_the_inputs_of_one_block_and_one_table_for_all_batches():
    entered, tables, model = [], [], Stack(blocks=2).eval()
    blocks = sequence(model, ["blocks.0", "blocks.1"])
    model.blocks[0].register_forward_pre_hook(lambda block, args: entered.append(weakref.ref(args[0])))
    for block in blocks:
        for number in range(len(block)):
            block(number)
            tables.append(blocks._inputs[number].leaves[2].data_ptr())
        if block.number == 1:
            assert entered and all(x() is None for x in entered)
    assert len(tables) == 2 * len(BATCHES) and len(set(tables)) == 1


@torch.no_grad()
def test_layers_that_read_one_tensor_are_a_group_and_groups_come_as_they_run():
    block = next(iter(sequence(Stack().eval())))
    layers = {"out": block.module.out, "idle": nn.Linear(2, 2), "q": block.module.q, "k": block.module.k}
    assert block.groups(layers) == [["q", "k"], ["out"], ["idle"]]


class Twice(nn.Module):
    """Its first layer reads two tensors, its second only the first of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.a(x) + self.b(x))


@torch.no_grad()
def test_a_layer_that_runs_twice_shares_with_nobody_and_shows_both_inputs():
    model = nn.Sequential(Twice(), Twice()).eval()
    block = next(iter(BlockSequence(model, ["0", "1"], BATCHES, model, BATCHES[0][:2])))
    layers, seen = {"a": block.module.a, "b": block.module.b}, []
    assert block.groups(layers) == [["a"], ["b"]]
    block.observe({"a": block.module.a}, lambda name, layer, x, batch: seen.append(batch))
    assert seen == [0, 0, 1, 1, 2, 2]


@torch.no_grad()
def test_what_lies_behind_a_group_does_not_run():
    model, ran = Stack().eval(), []
    block = next(iter(sequence(model)))
    layers = {"q": block.module.q, "k": block.module.k}
    block.groups(layers)
    block.module.out.register_forward_hook(lambda *_: ran.append(1))
    block.observe(layers, lambda *_: None)
    assert not ran


def test_blocks_that_run_twice_or_keep_a_cache_are_refused():
    class Again(Stack):
        def forward(self, x):
            return super().forward(super().forward(x))

    with pytest.raises(ValueError, match=r"`blocks.0` runs 2 times in one forward.*blocks=\["):
        sequence(Again().eval())

    class DynamicCache:
        pass

    class Caching(Stack):
        def forward(self, x):
            return self.blocks[0](x, x > 0, table=x, scale=DynamicCache())

    Caching.__call__ = nn.Module.__call__
    model = Caching(blocks=1)
    model.blocks[0].forward = lambda x, mask, table, scale: x
    with pytest.raises(ValueError, match=r"a DynamicCache, which would grow.*use_cache=False"):
        sequence(model.eval(), ["blocks.0"])


@torch.no_grad()
def test_llama_runs_without_its_cache_and_has_it_back():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [torch.randint(11, (2, 6)) for _ in range(2)]
    exact = model(batches[1]).logits
    blocks = BlockSequence(model, ["model.layers.0", "model.layers.1"], batches, model, batches[0])
    for block in blocks:
        last = block(1)
        last = last[0] if isinstance(last, tuple) else last
    assert [link.follows for link in blocks.links] == [False, True]
    assert torch.equal(model.lm_head(model.model.norm(last)), exact)
    assert config.use_cache


def test_caches_are_back_after_an_exception():
    config = SimpleNamespace(use_cache=True)
    model = nn.Linear(2, 2)
    model.config = config
    with suppress(KeyboardInterrupt), caches_off(model):
        assert not config.use_cache
        raise KeyboardInterrupt
    assert config.use_cache
