"""Quantization-aware training: what Lightning's own callback of that name never did."""

import copy
import json

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import (
    CalibrationMixin,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    load_quantized,
    save_quantized,
)
from lightning_quant.checkpoint import record_of
from lightning_quant.layers import QuantizedLayer
from lightning_quant.quantizers import LearnedQuantizer, Quantizer, UniformQuantizer
from tests.callbacks.unchanged import bits, left_as_it_was, refused
from tests.models import TOKENS, Sequences, TinyTransformer, trainer, validate


class Net(TinyTransformer):
    """No dropout, so that a run depends on its data alone."""

    def __init__(self, lr=0.05, **optimizer):
        super().__init__(dropout=0.0)
        self.options = {"lr": lr, **optimizer}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.options)


class NetWithMixin(CalibrationMixin, Net):
    pass


class WithBatchNorm(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(TOKENS)

    def forward(self, x):
        return super().forward(self.norm(x))


class InOrder(Sequences):
    """Deterministic: four batches, in order."""

    def __init__(self):
        super().__init__(batch_size=16)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size)


def qat(weights="int3", activations="int4", ranges="minmax", **kwargs):
    return QuantizationAwareTraining(weights, activations, ranges, **kwargs)


def fit(model, *callbacks, epochs=2, data=None, **options):
    run = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
    running = trainer(*callbacks, max_epochs=epochs, **options)
    running.fit(model, datamodule=data or InOrder(), **run)
    return running


def weights_of(model):
    return {name: bits(value) for name, value in model.state_dict().items()}


def quantizers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def training_loss(model):
    x, y = Sequences().train.tensors
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y).item()


class Look(L.Callback):
    """Calls functions at the hooks they are named after, with the model, and keeps what they return."""

    def __init__(self, **functions):
        self.seen = {name: [] for name in functions}
        for name, function in functions.items():
            setattr(self, name, lambda t, m, *rest, n=name, f=function: self.seen[n].append(f(m)))


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize("weights", ["int2", "int3"])
def test_training_is_better_than_post_training_quantization(weights):
    float_model = Net()
    fit(float_model, epochs=15)
    after_training = copy.deepcopy(float_model)
    validate(after_training, PostTrainingQuantization(weights, "int4", first_last="int8"))
    trained = copy.deepcopy(float_model)
    fit(trained, qat(weights, ranges="mse"), epochs=8)
    assert training_loss(trained) < training_loss(after_training) - 0.05
    assert trained.blocks[0].fc1.quantized().unique().numel() <= 2 ** int(weights[-1]) * 64


def test_learning_the_scales_alone_is_better_too():
    model = Net()
    fit(model, epochs=15)
    start = copy.deepcopy(model)
    validate(start, qat("int2"))
    model.options["lr"] = 1e-9
    fit(model, qat("int2", scale_lr=0.02), epochs=8)
    assert training_loss(model) < training_loss(start) - 0.05


# ---------------------------------------------------------------- the life of the scales


def test_scales_exist_before_the_optimizer_and_are_trained_by_it():
    class Watching(Net):
        def configure_optimizers(self):
            self.then = dict(self.named_parameters())
            return super().configure_optimizers()

    model = Watching()
    look = Look(
        on_train_start=lambda m: {n: p.detach().clone() for n, p in m.named_parameters()},
        on_train_end=lambda m: dict(m.named_parameters()),
    )
    fit(model, qat(), look)
    (before,), (after,) = look.seen.values()
    scales = {name for name in before if "quantizer.scale" in name}
    assert len(scales) == 28  # weights and inputs of 10 layers, and 4 operands of 2 attention sites
    assert all(after[name] is model.then[name] for name in scales)
    assert all(not torch.equal(after[name], before[name]) for name in scales)
    assert not any("quantizer" in name for name, _ in model.named_parameters())  # afterwards they rest


def test_the_start_is_post_training_quantization():
    want = validate(Net(), PostTrainingQuantization("int3", "int4", "minmax", first_last="int8"))
    model = Net()
    fit(model, qat(), limit_train_batches=0)
    assert validate(model) == want and validate(Net(), qat()) == want


def test_validate_before_the_fit_reports_the_start_and_the_fit_takes_it_over():
    model, callback = Net(), qat(calibration_samples=16)
    validate(model, callback)
    found = weights_of(model)
    fit(model, qat(calibration_samples=8), limit_train_batches=0)
    assert weights_of(model) == found
    fit(model, callback)
    assert weights_of(model) != found


def test_validation_within_the_fit_and_the_sanity_check_report_the_quantized_model():
    class Showing(Net):
        def validation_step(self, batch, batch_idx):
            self.shown[self.trainer.sanity_checking].append(self(batch[0]).clone())
            super().validation_step(batch, batch_idx)

    model, start = Showing(), Net()
    model.shown = {True: [], False: []}
    fit(model, qat(), epochs=1, num_sanity_val_steps=-1)
    validate(start, qat())
    x = Sequences().val.tensors[0]
    with torch.no_grad():
        assert torch.equal(torch.cat(model.shown[True]), start.eval()(x))
        assert torch.allclose(torch.cat(model.shown[False]), model.eval()(x), atol=1e-5)


def test_scales_are_positive_after_every_step():
    def signs(model):
        return min(module.scale.min().item() for module in quantizers(model).values())

    look = Look(on_train_batch_end=signs)
    fit(Net(), qat(scale_lr=1000.0), look, limit_val_batches=0)
    assert len(look.seen["on_train_batch_end"]) == 8 and min(look.seen["on_train_batch_end"]) > 0


def test_validation_moves_nothing():
    def look(model):
        return weights_of(model)

    seen = Look(on_validation_start=look, on_validation_end=look)
    fit(Net(), qat(), seen, val_check_interval=2)
    before, after = seen.seen.values()
    assert len(before) == 5 and before == after


def test_after_the_fit_the_model_is_like_any_quantized_one(tmp_path):
    model, callback = Net(), qat()
    running = fit(model, callback, enable_checkpointing=False)
    want = {name: value.item() for name, value in running.callback_metrics.items()}
    assert validate(model) == pytest.approx(want) and validate(model, callback) == validate(model)
    assert {type(quantizer) for quantizer in quantizers(model).values()} == {UniformQuantizer}
    running.save_checkpoint(tmp_path / "q.ckpt")
    save_quantized(model, tmp_path / "folder")
    want, logits = validate(model), torch.cat(running.predict(model, datamodule=Sequences()))
    running.test(model, datamodule=Sequences(), verbose=False)

    torch.load(tmp_path / "q.ckpt", weights_only=True)
    assert validate(Net(), qat(), ckpt_path=tmp_path / "q.ckpt") == want
    assert validate(NetWithMixin.load_from_checkpoint(tmp_path / "q.ckpt")) == want
    for path in ("q.ckpt", "folder"):
        fresh = Net()
        load_quantized(fresh, tmp_path / path)
        assert torch.equal(torch.cat(trainer(qat()).predict(fresh, datamodule=Sequences())), logits)
    codes = sum(f.stat().st_size for f in (tmp_path / "folder").glob("*.safetensors"))
    assert codes < 0.6 * sum(p.numel() * 4 for p in model.parameters())

    latent = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback.remove(model)
    assert not quantizers(model) and record_of(model) is None
    assert all(torch.equal(p, latent[name]) for name, p in model.named_parameters())


def test_a_second_fit_goes_on_from_the_scales_of_the_first():
    model = Net()
    fit(model, qat())
    found = weights_of(model)
    fit(model, qat(), limit_train_batches=0)
    assert weights_of(model) == found
    fit(model, qat(scale_lr=1e-9, calibration_samples=1), epochs=1)
    other = {name for name, value in weights_of(model).items() if value != found[name] and "scale" not in name}
    assert "head.weight" in other


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_end"])
def test_an_exception_leaves_an_ordinary_model(hook):
    def fail(model):
        raise ZeroDivisionError

    model = Net()
    with pytest.raises(ZeroDivisionError):
        fit(model, qat(delay_epochs=1 if hook == "on_train_start" else 0), Look(**{hook: fail}), num_sanity_val_steps=0)
    if hook == "on_train_start":  # nothing was calibrated yet
        assert not quantizers(model) and record_of(model) is None
    else:
        assert {type(q) for q in quantizers(model).values()} == {UniformQuantizer}
        assert not any("quantizer" in name for name, _ in model.named_parameters())
        validate(model)


# ---------------------------------------------------------------- resume


class Killed(Exception):
    pass


class Kill(L.Callback):
    def __init__(self, epoch, batch):
        self.when = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.when:
            raise Killed


def killed_and_resumed(build, callbacks, folder, epochs=4, kill=(2, 1), **options):
    """The weights of an undisturbed run, and of one that was killed and resumed in a new model with new callbacks."""
    options = {"enable_checkpointing": True, "epochs": epochs, **options}
    undisturbed = build()
    fit(undisturbed, *callbacks(), ModelCheckpoint(folder / "undisturbed"), **options)
    last = ModelCheckpoint(folder / "killed", save_last=True)
    with pytest.raises(Killed):
        fit(build(), *callbacks(), last, Kill(*kill), **options)
    resumed = build()
    with torch.no_grad():
        resumed.head.weight.add_(1)  # so that what was not restored is seen
    fit(resumed, *callbacks(), ModelCheckpoint(folder / "resumed"), ckpt_path=last.last_model_path, **options)
    return undisturbed, resumed


@pytest.mark.parametrize(
    "arguments",
    [{}, {"learn_offsets": True, "scale_lr": 0.01}, {"learn_scales": False}, {"delay_epochs": 1}, {"delay_epochs": 3}],
    ids=str,
)
def test_a_killed_run_ends_like_an_undisturbed_one(arguments, tmp_path):
    def build():
        return Net(momentum=0.9, weight_decay=0.01)

    undisturbed, resumed = killed_and_resumed(build, lambda: [qat(**arguments)], tmp_path)
    assert weights_of(resumed) == weights_of(undisturbed)
    assert validate(resumed) == validate(undisturbed) and quantizers(resumed)


def test_a_killed_run_with_a_scheduler_and_adam_ends_like_an_undisturbed_one(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    undisturbed, resumed = killed_and_resumed(Scheduled, lambda: [qat(scale_lr=1e-3)], tmp_path)
    assert weights_of(resumed) == weights_of(undisturbed)


def test_resuming_within_an_epoch_goes_on_as_it_was(tmp_path):
    last = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_last=True)
    arguments = {"freeze_batchnorm_epochs": 1}
    with pytest.raises(Killed):
        fit(WithBatchNorm(), qat(**arguments), last, Kill(1, 3), enable_checkpointing=True)
    look = Look(
        on_train_start=lambda m: m.head.weight_quantizer.scale.detach().clone(),
        on_train_batch_start=lambda m: m.norm.training,
    )
    fit(WithBatchNorm(), qat(**arguments), look, ckpt_path=last.last_model_path)
    stored = torch.load(last.last_model_path, weights_only=True)["state_dict"]["head.weight_quantizer.scale"]
    assert torch.equal(look.seen["on_train_start"][0], stored)
    assert look.seen["on_train_batch_start"] and not any(look.seen["on_train_batch_start"])


def test_a_float_run_cannot_be_resumed_as_a_quantized_one(tmp_path):
    running = fit(Net())
    running.save_checkpoint(tmp_path / "float.ckpt")
    model = Net()
    with pytest.raises(ValueError, match=r"checkpoint is of a float run.*without ckpt_path"):
        fit(model, qat(), ckpt_path=tmp_path / "float.ckpt")
    assert not quantizers(model)


def test_a_run_is_not_resumed_with_other_arguments(tmp_path):
    running = fit(Net(), qat())
    running.save_checkpoint(tmp_path / "q.ckpt")
    for other in (qat("int4"), qat(learn_offsets=True)):
        with pytest.raises(ValueError, match=r"another plan.*same arguments"):
            fit(Net(), other, ckpt_path=tmp_path / "q.ckpt")


def test_best_and_last_checkpoints(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="loss", save_last=True, save_top_k=-1)
    model = Net()
    running = fit(model, qat(), best, enable_checkpointing=True, epochs=3)
    assert len(list(tmp_path.glob("*.ckpt"))) == 4
    want = running.validate(datamodule=Sequences(), ckpt_path="best", verbose=False)[0]
    assert want["loss"] == pytest.approx(best.best_model_score.item())
    assert validate(NetWithMixin.load_from_checkpoint(best.best_model_path)) == want
    assert running.test(datamodule=Sequences(), ckpt_path="last", verbose=False)


# ---------------------------------------------------------------- delay and BatchNorm


def test_the_delay_trains_in_float():
    def look(model):
        return [p.detach().clone() for name, p in model.named_parameters() if "quantizer" not in name]

    plain, delayed = Look(on_train_epoch_end=look), Look(on_train_epoch_end=look)
    running = Look(on_train_epoch_start=lambda m: [q.calibrated for q in quantizers(m).values()])
    fit(Net(weight_decay=0.1), plain)
    fit(Net(weight_decay=0.1), qat("int2", delay_epochs=1), delayed, running)
    (first, second), (first_delayed, second_delayed) = (
        plain.seen["on_train_epoch_end"],
        delayed.seen["on_train_epoch_end"],
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, first_delayed, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(second, second_delayed, strict=True))
    assert [any(seen) for seen in running.seen["on_train_epoch_start"]] == [False, True]


def test_a_checkpoint_of_the_delay_is_not_calibrated(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(Net(), qat(delay_epochs=1), keep, enable_checkpointing=True)
    path = tmp_path / "epoch=0.ckpt"
    loaded = NetWithMixin.load_from_checkpoint(path)
    assert quantizers(loaded) and not any(q.calibrated for q in quantizers(loaded).values())
    with pytest.raises(ValueError, match="not calibrated"):
        save_quantized(loaded, tmp_path / "folder")
    with pytest.raises(RuntimeError, match="has not calibrated"):
        trainer(qat()).predict(Net(), datamodule=Sequences(), ckpt_path=path)
    float_model = Net()
    fit(float_model, epochs=1)
    want = validate(float_model, qat())
    assert validate(Net(), qat(), ckpt_path=path) == pytest.approx(want, rel=1e-3)  # which calibrates it


def test_batchnorm_statistics_stand_still_in_the_last_epochs():
    look = Look(on_train_epoch_end=lambda m: (bits(m.norm.running_mean), bits(m.norm.weight)))
    model = WithBatchNorm()
    fit(model, qat(freeze_batchnorm_epochs=2), look, epochs=4, val_check_interval=2)
    means, weights = zip(*look.seen["on_train_epoch_end"], strict=True)
    assert len({*means}) == 2 and means[1] == means[2] == means[3]
    assert len({*weights}) == 4
    assert model.norm.training


# ---------------------------------------------------------------- beside other callbacks and options


def scale_values(model):
    return {name: bits(q.scale) for name, q in quantizers(model).items()}


@pytest.mark.parametrize("delay_epochs", [0, 1])
def test_beside_an_average_of_the_weights(delay_epochs, tmp_path):
    average, shown = EMAWeightAveraging(decay=0.5, use_buffers=False), []

    class Showing(Net):
        def validation_step(self, batch, batch_idx):
            shown.append(F.cross_entropy(self(batch[0]), batch[1]).item())

    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model = Showing()
    fit(model, qat(delay_epochs=delay_epochs), average, keep, enable_checkpointing=True, num_sanity_val_steps=1)
    if not delay_epochs:  # before the first step the average is the start
        start = Net()
        validate(start, qat())
        with torch.no_grad():
            x, y = (tensor[:16] for tensor in Sequences().val.tensors)
            assert shown[0] == pytest.approx(F.cross_entropy(start.eval()(x), y).item())
    assert all(loss < 2 for loss in shown)
    averaged = NetWithMixin.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert weights_of(averaged) == weights_of(model)  # what the fit ends with is the average
    stored = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert not torch.equal(
        stored["current_model_state"]["head.weight_quantizer.scale"],
        stored["state_dict"]["head.weight_quantizer.scale"],
    )


def test_a_killed_run_with_an_average_ends_like_an_undisturbed_one(tmp_path):
    undisturbed, resumed = killed_and_resumed(
        Net, lambda: [qat(), EMAWeightAveraging(decay=0.9, use_buffers=False)], tmp_path
    )
    assert weights_of(resumed) == weights_of(undisturbed)


def test_beside_stochastic_weight_averaging():
    for build in (Net, WithBatchNorm):
        model = build()
        fit(model, qat(freeze_batchnorm_epochs=1), StochasticWeightAveraging(0.01, swa_epoch_start=2), epochs=4)
        assert build is Net or (model.norm.training and model.norm.running_mean.abs().min() > 0)
        assert training_loss(model) < 1.2 and quantizers(model)


@pytest.mark.parametrize("average", [WeightAveraging, lambda: StochasticWeightAveraging(0.01)])
def test_an_average_must_come_later(average):
    model = Net()
    with refused(model, "put QuantizationAwareTraining before it"):
        fit(model, average(), qat())


def test_an_average_must_leave_zero_points_alone():
    model = Net()
    with refused(model, "pass use_buffers=False"):
        fit(model, qat(), WeightAveraging())


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"detect_anomaly": True, "limit_train_batches": 1, "limit_val_batches": 0},
    ],
    ids=str,
)
def test_trainer_options(options, tmp_path):
    model = Net()
    running = fit(model, qat(learn_offsets=True), epochs=2, **options)
    assert all(
        q.scale.dtype == torch.float32 and q.zero_point.dtype == torch.float32 for q in quantizers(model).values()
    )
    assert all(p.isfinite().all() for p in model.parameters())
    running.save_checkpoint(tmp_path / "q.ckpt")
    want = trainer(precision=options.get("precision")).validate(model, datamodule=Sequences(), verbose=False)[0]
    again = trainer(qat(learn_offsets=True), precision=options.get("precision"))
    assert again.validate(Net(), datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt", verbose=False)[0] == want


class Small(Net):
    def forward(self, x):
        return self.head(F.gelu(self.embed(x)).mean(1))


def test_compiled_equals_eager():
    compiled, eager = Small(), Small()
    trainer(qat(), max_epochs=1).fit(torch.compile(compiled, backend="eager"), datamodule=InOrder())
    fit(eager, qat(), epochs=1)
    assert len(quantizers(compiled)) == 4
    for name, value in eager.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(compiled.state_dict()[name], value, atol=1e-5), name


class OnRanks(L.Callback):
    """What each rank ends with, in files."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"start{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"end{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("delay_epochs", [0, 1])
def test_two_ranks_have_equal_scales_and_those_of_one(delay_epochs, tmp_path):
    model, callback = NetWithMixin(), qat(delay_epochs=delay_epochs, learn_offsets=True)
    fit(model, callback, OnRanks(tmp_path), strategy="ddp_fork", devices=2)
    for moment in ("start", "end"):
        first, second = (torch.load(tmp_path / f"{moment}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert {name: bits(value) for name, value in first.items()} == {name: bits(v) for name, v in second.items()}
    assert weights_of(model) == {name: bits(value) for name, value in first.items()}  # taken over by this process
    if not delay_epochs:
        alone = NetWithMixin()
        validate(alone, callback)
        start = torch.load(tmp_path / "start0.pt", weights_only=True)
        assert {name: bits(value) for name, value in start.items()} == weights_of(alone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_that_hand_back_a_state_dict_need_the_mixin():
    with pytest.raises(Exception, match="CalibrationMixin before LightningModule"):
        fit(Net(), qat(), strategy="ddp_fork", devices=2)


# ---------------------------------------------------------------- optimizers


def groups(model, callback, **options):
    """The parameter groups that train, as (learning rate, weight decay, names)."""
    names = {}
    look = Look(
        on_train_start=lambda m: (
            names.update({id(p): n for n, p in m.named_parameters()})
            or [
                [(g["lr"], g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in o.param_groups]
                for o in m.trainer.optimizers
            ]
        )
    )
    fit(model, callback, look, epochs=1, **options)
    return look.seen["on_train_start"][0]


def test_scales_stay_in_a_group_without_weight_decay():
    ((rate, decay, names),) = groups(Net(), qat())[0]
    assert (rate, decay) == (0.05, 0) and len(names) == 56


def test_scales_have_no_weight_decay_and_a_learning_rate_of_their_own():
    ((weights, scales),) = groups(Net(weight_decay=0.1), qat(scale_lr=0.002))
    assert weights[:2] == (0.05, 0.1) and len(weights[2]) == 28
    assert scales[:2] == (0.002, 0.0) and len(scales[2]) == 28 and all("scale" in name for name in scales[2])


def test_an_optimizer_built_before_setup_trains_the_scales_too():
    class Prebuilt(Net):  # as LightningCLI does
        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.AdamW(self.parameters(), 0.01)

        def configure_optimizers(self):
            return self.optimizer

    ((weights, scales),) = groups(Prebuilt(), qat())
    assert len(weights[2]) == 28 and len(scales[2]) == 28 and scales[:2] == (0.01, 0.0)


def test_from_the_command_line(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    look = Look(
        on_train_end=lambda m: [(g["lr"], g["weight_decay"], len(g["params"])) for g in m.optimizers().param_groups]
    )
    arguments = {"activations": "int8", "scale_lr": 0.001, "overrides": {"head": "int8"}, "skip": ["embed"]}
    callback = {"class_path": "lightning_quant.QuantizationAwareTraining", "init_args": arguments}
    quiet = {"accelerator": "cpu", "enable_checkpointing": False, "logger": False, "enable_model_summary": False}
    config = {
        "trainer": {"max_epochs": 1, "callbacks": [callback], **quiet},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    args = ["fit", f"--config={tmp_path / 'config.yaml'}"]
    LightningCLI(TinyTransformer, InOrder, args=args, trainer_defaults={"callbacks": [look]}, save_config_callback=None)
    assert look.seen["on_train_end"] == [[(0.01, 0.1, 28), (0.001, 0.0, 26)]]


class TwoNetworks(L.LightningModule):
    """Two networks with an optimizer each."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = TinyTransformer(dropout=0.0), TinyTransformer(dropout=0.0)

    def forward(self, x):
        return self.first(x) + self.second(x)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(net.parameters(), 0.01) for net in (self.first, self.second)]


def test_every_scale_trains_with_its_own_network():
    for optimizer, network in zip(groups(TwoNetworks(), qat()), ("first", "second"), strict=True):
        assert [len(names) for _, _, names in optimizer] == [28, 28]
        assert all(name.startswith(network) for _, _, names in optimizer for name in names)


# ---------------------------------------------------------------- formats and models


@pytest.mark.parametrize(
    ("weights", "activations", "learned"),
    [
        ("int4_g8", None, 10),
        ("int4", "int8_token_dynamic", 10),
        ("int4", "int8_channel", 20),
        ("fp8_e4m3", "fp8_e4m3", 0),
        (None, "uint4", 28 - 10),
    ],
)
def test_formats(weights, activations, learned, tmp_path):
    model = Net()
    count = Look(on_train_start=lambda m: sum(isinstance(q, LearnedQuantizer) for q in quantizers(m).values()))
    attention = activations is not None and "channel" not in activations
    arguments = {"first_last": None, "attention": attention}
    running = fit(model, qat(weights, activations, **arguments), count, epochs=2)
    assert count.seen["on_train_start"] == [learned]
    running.save_checkpoint(tmp_path / "q.ckpt")
    assert validate(Net(), qat(weights, activations, **arguments), ckpt_path=tmp_path / "q.ckpt") == validate(model)


def test_offsets_of_activations_are_learned_and_those_of_weights_are_not():
    before, after = (
        Look(**{hook: lambda m: copy.deepcopy(m.state_dict())}) for hook in ("on_train_start", "on_train_end")
    )
    model = Net(lr=0.1)
    fit(model, qat("int4_asym", learn_offsets=True), before, after)
    (start,), (end,) = before.seen["on_train_start"], after.seen["on_train_end"]
    moved = {name for name, value in end.items() if name.endswith("zero_point") and not torch.equal(value, start[name])}
    assert moved and not any("weight_quantizer" in name for name in moved)
    model.head.weight_quantizer.encode(model.head.weight.detach())


class Encoder(L.LightningModule):
    """torch's own encoder, whose fast path must stay off, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 1)
        self.idle = nn.Linear(3, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))

    training_step = TinyTransformer.training_step
    validation_step = lambda self, batch, i: self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))  # noqa: E731
    configure_optimizers = lambda self: torch.optim.SGD(self.parameters(), 0.05)  # noqa: E731


def test_a_layer_that_does_not_run_stays_float():
    model = Encoder()
    fit(model, qat(), epochs=1)
    assert type(model.idle) is nn.Linear and isinstance(model.encoder.layers[0].linear1, QuantizedLayer)
    assert model.encoder.layers[0].self_attn.attention_quantizers.query_quantizer.calibrated


def test_a_model_that_is_built_late():
    class Late(Net):
        def __init__(self):
            super().__init__()
            del self.head

        def configure_model(self):
            if not hasattr(self, "head"):
                self.head = nn.Linear(16, 3)

    model = Late()
    fit(model, qat(), epochs=1)
    assert isinstance(model.head, QuantizedLayer)


def test_two_callbacks_for_two_parts(tmp_path):
    def callbacks():
        return [qat("int8", "int8", target="blocks.0"), qat("int4", "int8", target="blocks.1")]

    undisturbed, resumed = killed_and_resumed(Net, callbacks, tmp_path)
    assert weights_of(resumed) == weights_of(undisturbed)
    assert type(resumed.head) is nn.Linear and resumed.blocks[0].fc1.weight_quantizer.scheme.bits == 8
    callbacks()[0].remove(resumed)
    assert type(resumed.blocks[0].fc1) is nn.Linear and isinstance(resumed.blocks[1].fc1, QuantizedLayer)


# ---------------------------------------------------------------- refusals


def test_a_model_that_another_method_has_quantized_is_refused(tmp_path):
    model, other = Net(), PostTrainingQuantization("int8", "int8")
    running = trainer(other)
    running.validate(model, datamodule=Sequences(), verbose=False)
    with refused(model, "quantized already: call remove"):
        fit(model, qat())
    running.save_checkpoint(tmp_path / "ptq.ckpt")
    with pytest.raises(ValueError, match=r"quantized by PostTrainingQuantization.*float checkpoint"):
        fit(Net(), qat(), ckpt_path=tmp_path / "ptq.ckpt")
    other.remove(model)
    fit(model, qat(), epochs=1)
    assert quantizers(model)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ({"delay_epochs": 2}, {}, "none of max_epochs=2"),
        ({"freeze_batchnorm_epochs": 1}, {"epochs": -1, "max_steps": 2}, "set max_epochs"),
        ({"skip": ["nothing"]}, {}, "matches no layer"),
        ({"calibration_loader": "test"}, {}, "none of"),
    ],
    ids=str,
)
def test_refused_before_anything_is_changed(arguments, options, words):
    model = Net()
    with refused(model, words):
        fit(model, qat(**arguments), **options)


def test_arguments_that_contradict_each_other_are_refused():
    for arguments, words in [
        ({"learn_scales": False, "learn_offsets": True}, "needs learn_scales"),
        ({"delay_epochs": -1}, "numbers of epochs"),
        ({"delay_epochs": 1, "activations": "int8_token"}, "would not wait"),
    ]:
        with pytest.raises(ValueError, match=words):
            qat(**arguments)


def test_layers_that_setup_builds_come_too_late():
    class TooLate(Net):
        def __init__(self):
            super().__init__()
            del self.head

        def setup(self, stage):
            self.head = nn.Linear(16, 3)

    with pytest.raises(AttributeError, match="head") as caught:
        fit(TooLate(), qat())
    assert "build layers in" in caught.value.__notes__[0]


def test_nothing_is_left_of_a_fit_without_training():
    model = Net()
    with left_as_it_was(model):
        callback = qat()
        fit(model, callback, limit_train_batches=0)
        callback.remove(model)
