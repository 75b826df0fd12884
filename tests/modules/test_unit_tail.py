"""A unit's output is sent through the float model behind it, and judged by what comes out there."""

import pytest
import torch

from lightning_quant import PostTrainingQuantization, Reconstruction
from lightning_quant.calibration import record, signature
from lightning_quant.layers import as_float
from lightning_quant.modules.unit_tail import FloatTail
from lightning_quant.solvers import output_distance
from tests.models import Sequences, TinyTransformer, trainer


@pytest.fixture
def model(tmp_path):
    model = TinyTransformer().eval()
    callback = PostTrainingQuantization("int3", "int4", calibration_samples=16)
    trainer(callback, default_root_dir=tmp_path).validate(model, datamodule=Sequences(), verbose=False)
    return model.eval().requires_grad_(False)


def images():
    return Sequences().train.tensors[0][:12]


def tail_of(model, unit):
    """The tail behind a unit, over batches of 5, 4 and 3 samples."""
    x, module = images(), model.get_submodule(unit)
    with torch.no_grad(), as_float(model):
        found = signature(unit, record(module, lambda: model(x[:2])), record(module, lambda: model(x[:1])))
    return FloatTail(model, unit, [x[:5], x[5:9], x[9:]], model, found)


@pytest.mark.parametrize("unit", ["embed", "blocks.0", "blocks.0.qkv", "blocks.1", "head"])
def test_the_float_unit_gives_the_float_output(model, unit):
    tail, x, rows = tail_of(model, unit), images(), torch.tensor([1, 4, 5, 11])
    with torch.no_grad(), as_float(model):
        want = model(x)
        own = record(model.get_submodule(unit), lambda: model(x[rows]))[0].outputs
    found, exact = tail(rows, own)
    assert torch.allclose(found, want[rows], atol=1e-5) and torch.allclose(exact, want[rows], atol=1e-5)
    assert output_distance(found, exact) < 1e-6


def test_loss_and_gradient_are_those_of_the_blocks_behind_written_out(model):
    tail, rows = tail_of(model, "blocks.0"), torch.tensor([0, 3, 7, 9])
    x = images()[rows]
    with torch.no_grad(), as_float(model):
        exact = model(x)
    out = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = output_distance(*tail(rows, [out]))

    naive = out.detach().clone().requires_grad_()
    with as_float(model):
        logits = model.head(model.blocks[1](naive).mean(1))
    p, q = exact.softmax(-1), logits.softmax(-1)
    want = sum((p[i, c] * (p[i, c] / q[i, c]).log() for i in range(4) for c in range(3)), torch.zeros(())) / 4

    assert torch.allclose(loss, want, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(loss, out)[0], torch.autograd.grad(want, naive)[0], atol=1e-6)


def test_nothing_is_left_behind(model):
    tail, x = tail_of(model, "blocks.0"), images()
    want = model(x)
    with pytest.raises(RuntimeError):
        tail(torch.arange(4), [torch.zeros(4, 5, 7)])
    assert torch.equal(model(x), want) and not model.blocks[0]._forward_hooks


class Twice(TinyTransformer):
    def forward(self, x):
        return self.head(self.blocks[1](self.blocks[0](self.blocks[0](self.embed(x)))).mean(1))


class Scalar(TinyTransformer):
    def calibration_step(self, batch):
        return self(batch[0]).mean()


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Twice, r"`blocks.0` runs 2 times in one forward.*global_weight=0"), (Scalar, "Scalar.*no entry for each of")],
)
def test_what_has_no_tail_is_refused_by_name(tmp_path, kind, message):
    model = kind()
    settings = Reconstruction(iterations=2, samples=8, batch_size=4, global_weight=0.5)
    callback = PostTrainingQuantization("int4", "int4", reconstruct=settings, calibration_samples=8)
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        trainer(callback, default_root_dir=tmp_path).validate(model, datamodule=Sequences(), verbose=False)
    assert [type(module) for module in model.modules()] == types


def test_frozen_parameters_stay_without_gradient(model):
    out = torch.randn(4, 5, 16).requires_grad_()
    output_distance(*tail_of(model, "blocks.0")(torch.arange(4), [out])).backward()
    assert out.grad is not None and all(p.grad is None for p in model.parameters())
