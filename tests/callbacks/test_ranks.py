"""Two processes over the same samples freeze the very scales that one process freezes."""

import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_quant import PostTrainingQuantization, RepQViT
from lightning_quant.quantizers import Quantizer
from tests.models import Sequences, TinyTransformer, trainer

METHODS = {
    "mse": lambda **kw: PostTrainingQuantization(weights="int4", activations="int8", ranges="mse", **kw),
    "minmax": lambda **kw: PostTrainingQuantization(weights="int4", activations="int8", ranges="minmax", **kw),
    "percentile": lambda **kw: PostTrainingQuantization(weights="int4", activations="int8", ranges="percentile", **kw),
    "repq": lambda **kw: RepQViT(weights="int4", activations="int4", **kw),
}


class SavesState(L.Callback):
    """Each rank writes down what it holds once its validation has begun."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_epoch_start(self, trainer, pl_module):
        modules = pl_module.named_modules()
        scales = {name: dict(module.named_buffers()) for name, module in modules if isinstance(module, Quantizer)}
        weights = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        torch.save((scales, weights), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


class SavesError(PostTrainingQuantization):
    """Each rank writes down what stopped its calibration, and waits for the other, which would be ended with it."""

    folder: Path

    def calibrate(self, trainer, pl_module):
        try:
            super().calibrate(trainer, pl_module)
        except ValueError as error:
            (self.folder / f"{trainer.global_rank}.txt").write_text(str(error))
            deadline = time.monotonic() + 20
            while len(list(self.folder.iterdir())) < trainer.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
            raise


def run(*callbacks, ranks, model=TinyTransformer, data=None):
    options = {"devices": 2, "strategy": "ddp_fork"} if ranks == 2 else {"devices": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking, and about validating on more than one device
        quick = trainer(*callbacks, limit_val_batches=1, **options)
        quick.validate(model(), datamodule=data or Sequences(), verbose=False)


def states_after(callbacks, folder, **options):
    """The scales and weights on one process, and on either of two."""
    run(*callbacks(), SavesState(folder), ranks=1, **options)
    run(*callbacks(), SavesState(folder), ranks=2, **options)
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_equal(value, other[name])
        else:
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("method", "samples", "batch_size"),
    [*((method, 64, 8) for method in METHODS), ("mse", 13, 3), ("repq", 13, 3)],
)
def test_two_ranks_freeze_the_scales_of_one(method, samples, batch_size, tmp_path):
    data = Sequences(batch_size)
    one, *two = states_after(lambda: [METHODS[method](calibration_samples=samples)], tmp_path, data=data)
    scales, _ = one
    assert len(scales) == 28 and all(tensor.numel() for state in scales.values() for tensor in state.values())
    for rank in two:
        assert_equal(scales, rank[0])
        assert_equal(one[1], rank[1])  # folded weights too


class Branching(TinyTransformer):
    """The blocks run for samples that are large in one place; with seven samples of eight they do not."""

    def forward(self, x):
        return super().forward(x) if x[0, 0, 0] > 1e3 else self.head(x.mean(1))


@pytest.mark.parametrize("sample", [0, 1, 2, 3])
def test_a_layer_that_only_one_rank_reaches_is_calibrated_on_all(sample, tmp_path):
    """Rank 0 draws samples 0, 2, ..., and rank 1 draws 1, 3, ..."""
    data = Sequences(batch_size=1)
    data.train.tensors[0][sample, 0, 0] = 2e3
    one, *two = states_after(
        lambda: [PostTrainingQuantization(calibration_samples=8, first_last="int4")],
        tmp_path,
        model=Branching,
        data=data,
    )
    assert any(name.startswith("blocks.1.fc2") for name in one[0])
    for rank in two:
        assert_equal(one[0], rank[0])


@pytest.mark.timeout(60)
def test_fewer_samples_than_ranks_is_refused_on_all_ranks(tmp_path):
    callback = SavesError(calibration_samples=1)
    callback.folder = tmp_path
    with pytest.raises(Exception, match="fewer calibration batches than ranks: raise calibration_samples"):
        run(callback, ranks=2)
    errors = [path.read_text() for path in tmp_path.iterdir()]
    assert len(errors) == 2 and errors[0] == errors[1] and errors[0].startswith("fewer calibration batches")


@pytest.mark.timeout(60)
def test_fewer_samples_than_ranks_do_for_one_merged_batch(tmp_path):
    one, *two = states_after(lambda: [METHODS["repq"](calibration_samples=1)], tmp_path)
    for rank in two:
        assert_equal(one[0], rank[0])


class Spoilt(Sequences):
    def setup(self, stage):
        self.train.tensors[0][1, 0, 0] = float("nan")  # sample 1: rank 1 draws it


@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", [METHODS["minmax"], METHODS["repq"]], ids=["minmax", "repq"])
def test_nan_on_one_rank_ends_all_without_hanging(method, tmp_path):
    with pytest.raises(Exception, match=r"(?i)embed.*nan"):
        run(method(calibration_samples=8), ranks=2, data=Spoilt())
