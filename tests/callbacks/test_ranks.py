"""Two processes over the same samples freeze the very scales that one process freezes."""

import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_quant import CalibrationMixin, PostTrainingQuantization
from lightning_quant.quantizers import Mask, Quantizer
from tests.cases import ptq, repq
from tests.models import Sequences, TinyTransformer, trainer


def mse(**more):
    return ptq(weights="int4", ranges="mse", **more)


def percentile(**more):
    return ptq(weights="int4", ranges="percentile", **more)


class SavesState(L.Callback):
    """Each rank writes down what it holds once its validation, or its training, has begun."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        self.on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_start(self, trainer, pl_module):
        modules = pl_module.named_modules()
        scales = {
            name: dict(module.named_buffers()) for name, module in modules if isinstance(module, (Mask, Quantizer))
        }
        weights = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        path = self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt"
        if not path.exists():  # after a training step the ranks' weights are no longer those of one rank
            torch.save((scales, weights), path)


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


def run(*callbacks, ranks, model=TinyTransformer, data=None, stage="validate"):
    options = {"devices": 2, "strategy": "ddp_fork"} if ranks == 2 else {"devices": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking, and about validating on more than one device
        quick = trainer(*callbacks, limit_train_batches=1, limit_val_batches=1, max_epochs=1, **options)
        getattr(quick, stage)(model(), datamodule=data or Sequences())


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


def test_two_ranks_freeze_the_scales_of_one(case, tmp_path):
    # a trained model can be handed back by the forked processes only if it loads a quantized state dict
    model = type("Net", (CalibrationMixin, case.model), {})
    one, *two = states_after(lambda: [case(calibration_samples=64)], tmp_path, model=model, stage=case.stage)
    scales, weights = one
    assert any(tensor.numel() for state in scales.values() for tensor in state.values())
    if case.learns:
        scales, weights = two[0]
    for rank in two:
        assert_equal(scales, rank[0])
        assert_equal(weights, rank[1])  # folded weights too


@pytest.mark.parametrize(
    ("method", "samples", "batch_size"),
    [(mse, 64, 8), (mse, 13, 3), (repq, 13, 3), (percentile, 64, 8)],
    ids=["mse", "mse of odd batches", "repq of odd batches", "percentile"],
)
def test_whatever_the_rule_and_the_batches(method, samples, batch_size, tmp_path):
    data = Sequences(batch_size)
    one, *two = states_after(lambda: [method(calibration_samples=samples)], tmp_path, data=data)
    assert len(one[0]) == 28
    for rank in two:
        assert_equal(one[0], rank[0])
        assert_equal(one[1], rank[1])


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
    one, *two = states_after(lambda: [repq(calibration_samples=1)], tmp_path)
    for rank in two:
        assert_equal(one[0], rank[0])


class Spoilt(Sequences):
    def setup(self, stage):
        self.train.tensors[0][1, 0, 0] = float("nan")  # sample 1: rank 1 draws it


@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", [ptq, repq], ids=["ptq", "repq"])
def test_nan_on_one_rank_ends_all_without_hanging(method, tmp_path):
    with pytest.raises(Exception, match=r"(?i)embed.*nan"):
        run(method(calibration_samples=8), ranks=2, data=Spoilt())
