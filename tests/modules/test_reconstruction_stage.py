"""Units of a quantized model are fitted to their float twins, one after another."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_quant import (
    PostTrainingQuantization,
    Reconstruction,
    ReconstructionStage,
    load_quantized,
    save_quantized,
)
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.quantizers import LearnedQuantizer, Quantizer, to_steps
from tests.models import Sequences, TinyTransformer, trainer, validate

QUICK = {"iterations": 25, "samples": 16, "batch_size": 8, "learning_rate": 0.03}


def ptq(reconstruct=None, **arguments):
    return PostTrainingQuantization(
        **{"weights": "int3", "activations": "int8", "reconstruct": reconstruct, "calibration_samples": 16, **arguments}
    )


def quantized(tmp_path, reconstruct=None, model=None, **arguments):
    model = model or TinyTransformer()
    trainer(ptq(reconstruct, **arguments), default_root_dir=tmp_path).validate(
        model, datamodule=Sequences(), verbose=False
    )
    return model.eval()


def unit_error(model, name):
    """How far a block is from its float twin, on the float twin's own input."""
    x = Sequences().train.tensors[0][:16]
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), as_float(model):
        model(x)
        handle.remove()
        want = model.get_submodule(name)(inputs[0])
    with torch.no_grad():
        return (model.get_submodule(name)(inputs[0]) - want).square().mean()


@pytest.mark.parametrize("preset", ["adaround", "brecq", "qdrop"])
def test_a_reconstructed_model_is_nearer_to_the_float_one(tmp_path, preset):
    settings = Reconstruction(**{**vars(Reconstruction.parse(preset)), **QUICK, "iterations": 60})
    nearest, learned = quantized(tmp_path), quantized(tmp_path, settings)
    assert output_error(learned) < 0.8 * output_error(nearest)


def test_the_float_weights_stay_and_every_code_is_a_neighbour(tmp_path):
    model = TinyTransformer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantized(tmp_path, Reconstruction(**QUICK), model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    flipped = 0
    for layer in (m for m in model.modules() if isinstance(m, QuantizedLayer)):
        for name, quantizer in layer.weight_quantizers().items():
            rows = layer.weight_rows(name).detach()
            place, found = to_steps(quantizer, rows), to_steps(quantizer, quantizer(rows))
            inside = (place >= quantizer.scheme.qmin) & (place <= quantizer.scheme.qmax)
            assert ((place - found).abs()[inside] < 1 + 1e-3).all()
            flipped += int(((place - found).abs()[inside] > 0.5).sum())
    assert flipped > 20


def test_nothing_is_left_behind(tmp_path):
    model = quantized(tmp_path, Reconstruction(**QUICK, cache="disk"))
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))
    assert not any(isinstance(m, LearnedQuantizer) for m in model.modules())
    assert all(m.observer is None for m in model.modules() if isinstance(m, Quantizer))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("cache", ["disk", "recompute"])
def test_where_samples_are_kept_changes_nothing(tmp_path, cache):
    want = quantized(tmp_path, Reconstruction(**QUICK)).state_dict()
    found = quantized(tmp_path, Reconstruction(**QUICK, cache=cache)).state_dict()
    codes = [key for key in want if key.endswith(".codes")]
    same = [(want[key] == found[key]).float().mean() for key in codes]
    # Recomputed in batches of another size, sums are rounded differently.
    assert codes and min(same) >= (1 if cache == "disk" else 0.95)


def test_checkpoints_hold_what_was_learned(tmp_path):
    model, settings = TinyTransformer(), Reconstruction(**QUICK)
    callback = ptq(settings)
    run = trainer(callback, default_root_dir=tmp_path)
    want = run.validate(model, datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    assert validate(TinyTransformer(), ptq(settings), ckpt_path=tmp_path / "q.ckpt") == want[0]
    fresh = TinyTransformer()
    load_quantized(fresh, tmp_path / "folder")
    assert validate(fresh) == want[0]


def test_remove_gives_the_very_float_model_back(tmp_path):
    model, callback = TinyTransformer(), ptq(Reconstruction(**QUICK))
    want = validate(model)
    trainer(callback, default_root_dir=tmp_path).validate(model, datamodule=Sequences(), verbose=False)
    callback.remove(model)
    assert validate(model) == want


def test_it_is_a_stage_of_its_own(tmp_path):
    model = quantized(tmp_path)
    before = unit_error(model, "blocks.1")
    stage = ReconstructionStage(model, Reconstruction(**QUICK, penalty=1e-4))
    logger = CSVLogger(tmp_path, name="curves")
    run = L.Trainer(
        accelerator="cpu", logger=logger, log_every_n_steps=5, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(stage, torch.utils.data.DataLoader(Sequences().train, batch_size=8))
    assert run.global_step == 4 * 25 and unit_error(model, "blocks.1") < before
    assert set(stage.losses) == {"embed", "blocks.0", "blocks.1", "head"}
    text = (tmp_path / "curves" / "version_0" / "metrics.csv").read_text()
    assert "reconstruction/blocks.0" in text


def output_error(model):
    x = Sequences().train.tensors[0][:16]
    with torch.no_grad(), as_float(model):
        want = model(x)
    with torch.no_grad():
        return (model(x) - want).square().mean()


def test_a_state_from_before_the_stage_loads_again(tmp_path):
    model = quantized(tmp_path)
    before, want = {key: value.clone() for key, value in model.state_dict().items()}, validate(model)
    stage = ReconstructionStage(model, Reconstruction(**QUICK))
    trainer(default_root_dir=tmp_path).fit(stage, torch.utils.data.DataLoader(Sequences().train, batch_size=8))
    assert validate(model) != want
    model.load_state_dict(before)
    assert validate(model) == want


class Killed(BaseException):
    pass


def killed(tmp_path, monkeypatch, step):
    """Start a reconstruction that dies at a step."""

    class Dying(ReconstructionStage):
        def training_step(self, rows, batch_idx):
            if self.trainer.global_step == step:
                raise Killed
            return super().training_step(rows, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr("lightning_quant.callbacks.reconstructing.ReconstructionStage", Dying)
        with pytest.raises(Killed):
            quantized(tmp_path, Reconstruction(**QUICK))


@pytest.mark.parametrize("step", [3, 31, 60])
def test_a_killed_run_goes_on_in_its_unit_and_ends_with_the_same_weights(tmp_path, monkeypatch, step):
    want = quantized(tmp_path, Reconstruction(**QUICK)).state_dict()
    killed(tmp_path, monkeypatch, step)
    steps, on_train_batch_end = [], ReconstructionStage.on_train_batch_end

    def counted(self, *args):
        steps.append(1)
        on_train_batch_end(self, *args)

    monkeypatch.setattr(ReconstructionStage, "on_train_batch_end", counted)
    found = quantized(tmp_path, Reconstruction(**QUICK)).state_dict()
    assert len(steps) == 100 - step // 25 * 25
    assert all(torch.equal(want[key], found[key]) for key in want if isinstance(want[key], torch.Tensor))


def test_another_run_does_not_resume_from_it(tmp_path, monkeypatch):
    killed(tmp_path, monkeypatch, step=30)
    other = {**QUICK, "learning_rate": 0.02}
    found = quantized(tmp_path, Reconstruction(**other)).state_dict()
    want = quantized(tmp_path / "clean", Reconstruction(**other)).state_dict()
    assert all(torch.equal(want[key], found[key]) for key in want if isinstance(want[key], torch.Tensor))


def test_an_error_in_the_middle_leaves_the_float_model(tmp_path, monkeypatch):
    model = TinyTransformer()
    types, keys = [type(m) for m in model.modules()], list(model.state_dict())
    monkeypatch.setattr("lightning_quant.calibration.cache.os.posix_fallocate", _full_disk)
    with pytest.raises(OSError, match="no room for"):
        quantized(tmp_path, Reconstruction(**QUICK, cache="disk"), model)
    assert [type(m) for m in model.modules()] == types and list(model.state_dict()) == keys


def test_an_error_in_the_middle_of_a_stage_leaves_the_quantized_model(tmp_path, monkeypatch):
    model, x = quantized(tmp_path), Sequences().val.tensors[0]
    want = model(x)
    stage = ReconstructionStage(model, Reconstruction(**{**QUICK, "phases": ["weights"]}, cache="disk"))
    monkeypatch.setattr("lightning_quant.calibration.cache.os.posix_fallocate", _full_disk)
    with pytest.raises(OSError, match="no room for"):
        trainer(default_root_dir=tmp_path).fit(stage, torch.utils.data.DataLoader(Sequences().train, batch_size=8))
    assert torch.equal(model(x), want)
    assert all(m.observer is None for m in model.modules() if isinstance(m, Quantizer))


def _full_disk(*args):
    raise OSError(28, "No space left on device")


def test_an_uncalibrated_model_is_refused():
    with pytest.raises(ValueError, match=r"run trainer\.validate"):
        ReconstructionStage(TinyTransformer())


def test_fit_without_a_loader_is_refused(tmp_path):
    model = quantized(tmp_path)
    with pytest.raises(ValueError, match=r"trainer.fit\(stage, loader\)"):
        trainer().fit(ReconstructionStage(model))


def test_training_a_weight_whose_codes_are_solved_is_refused(tmp_path):
    model = quantized(tmp_path, Reconstruction(**QUICK)).train()
    with pytest.raises(RuntimeError, match="call remove"):
        model(Sequences().train.tensors[0][:2])


class Strange(TinyTransformer):
    """BatchNorm, dropout, a layer that is called twice, a block whose output is constant."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.shared = nn.Linear(16, 16)
        self.dead = nn.Linear(16, 16)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.shared(self.dropout(self.shared(x))) + self.dead(x)
        return self.head(self.norm(x.mean(1)))


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_strange_units_come_through(tmp_path, granularity):
    model = Strange()
    statistics = copy.deepcopy(model.norm.state_dict())
    quantized(tmp_path, Reconstruction(**QUICK, granularity=granularity), model)
    assert all(torch.equal(value, statistics[key]) for key, value in model.norm.state_dict().items())
    assert torch.cat(trainer().predict(model, datamodule=Sequences())).isfinite().all()


def test_patterns_name_the_units(tmp_path):
    model = quantized(tmp_path, Reconstruction(**QUICK, granularity=["blocks.1"]))
    assert all(q.codes is not None for q in _weight_quantizers(model.blocks[1]))
    assert all(q.codes is None for q in _weight_quantizers(model.blocks[0]))


def test_it_learns_in_bf16(tmp_path):
    model = TinyTransformer()
    run = trainer(ptq(Reconstruction(**QUICK, penalty=1e-4)), default_root_dir=tmp_path, precision="bf16-mixed")
    run.validate(model, datamodule=Sequences(), verbose=False)
    assert unit_error(model.eval(), "blocks.1") < unit_error(quantized(tmp_path), "blocks.1")


def test_patience_ends_a_unit_early(tmp_path):
    model = quantized(tmp_path)
    stage = ReconstructionStage(model, Reconstruction(**{**QUICK, "iterations": 400}, patience=10))
    run = trainer(default_root_dir=tmp_path)
    run.fit(stage, torch.utils.data.DataLoader(Sequences().train, batch_size=8))
    assert run.global_step < 4 * 400 and len(stage.losses) == 4


@pytest.mark.parametrize(
    "settings", [{"loss": "fisher"}, {"layer_weight": 0.5}, {"granularity": "stage"}, {"rounding": "joint"},
                 {"rounding": "weights"}, {"norm": 2.4}]
)  # fmt: skip
def test_every_setting_learns(tmp_path, settings):
    rate = {"learning_rate": 1e-3} if settings.get("rounding") == "weights" else {}
    model = quantized(tmp_path, Reconstruction(**{**QUICK, **settings, **rate, "penalty": 1e-4}))
    assert unit_error(model, "blocks.1") < unit_error(quantized(tmp_path), "blocks.1")


def _weight_quantizers(module):
    return [q for m in module.modules() if isinstance(m, QuantizedLayer) for q in m.weight_quantizers().values()]
