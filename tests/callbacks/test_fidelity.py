"""Fidelity compares a quantized model with its float twin, and nobody else notices."""

import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import Fidelity, PostTrainingQuantization, RepQViT
from lightning_quant.metrics import (
    cosine_fidelity,
    negative_flip_rate,
    positive_flip_rate,
    sqnr,
    top_one_agreement,
)
from tests.models import SAMPLES, Sequences, TinyTransformer, trainer, validate

NAMES = ("sqnr", "cosine", "agreement", "negative_flips", "positive_flips")


def ptq(bits=4, **kwargs):
    return PostTrainingQuantization(weights=f"int{bits}", activations=f"int{bits}", **kwargs)


def wanted(quantized, reference, target):
    return {
        "sqnr": sqnr(quantized, reference),
        "cosine": cosine_fidelity(quantized, reference),
        "agreement": top_one_agreement(quantized, reference),
        "negative_flips": negative_flip_rate(quantized, reference, target),
        "positive_flips": positive_flip_rate(quantized, reference, target),
    }


def test_logs_what_two_models_side_by_side_give():
    exact, model = TinyTransformer().eval(), TinyTransformer()
    result = validate(model, Fidelity(), ptq(bits=2))  # the order of the callbacks does not matter
    x, target = Sequences().val.tensors
    with torch.no_grad():
        want = wanted(model.eval()(x), exact(x), target)
    found = {name: result[f"fidelity/{name}"] for name in NAMES}
    assert found == {name: pytest.approx(value.item(), rel=1e-5) for name, value in want.items()}
    assert found["negative_flips"] > found["positive_flips"] > 0


@pytest.mark.parametrize(
    "method", [lambda: ptq(2), lambda: RepQViT(weights="int3", activations="int3")], ids=["ptq", "repq"]
)
def test_the_logged_accuracies_differ_by_the_flips(method):
    before = validate(TinyTransformer())["accuracy"]
    after = validate(TinyTransformer(), method(), Fidelity())
    negative, positive = after["fidelity/negative_flips"], after["fidelity/positive_flips"]
    assert negative > 0 and positive > 0
    assert after["accuracy"] == before - negative + positive  # exactly: 64 samples


def test_more_bits_are_nearer():
    coarse, fine = (validate(TinyTransformer(), ptq(bits), Fidelity()) for bits in (4, 8))
    assert fine["fidelity/sqnr"] > coarse["fidelity/sqnr"] + 15
    assert fine["fidelity/cosine"] > coarse["fidelity/cosine"]
    assert fine["fidelity/agreement"] >= coarse["fidelity/agreement"]


def test_batches_of_any_size_give_the_same():
    first, second = (
        validate(TinyTransformer(), ptq(), Fidelity(), data=Sequences(batch_size=size)) for size in (8, 13)
    )
    assert first == {name: pytest.approx(value, rel=1e-4) for name, value in second.items()}


@pytest.mark.parametrize("function", ["validate", "test"])
def test_the_run_is_the_same_with_and_without(function):
    class Noisy(TinyTransformer):
        """Draws random numbers in each step, and its forward counts in a metric of its own."""

        def forward(self, x):
            logits = super().forward(x)
            self.accuracy.update(logits, torch.zeros(len(logits), dtype=torch.long))
            return logits

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("noise", torch.rand(()))

        test_step = validation_step

    def run(*callbacks):
        model = Noisy()
        validate(model, ptq())
        model.blocks[0].train()
        torch.manual_seed(5)
        result = getattr(trainer(*callbacks), function)(model, datamodule=Sequences(), verbose=False)[0]
        flags = [module.training for module in model.modules()]
        return {name: value for name, value in result.items() if "fidelity" not in name}, torch.rand(1), flags

    plain, compared = run(), run(Fidelity())
    assert plain == compared


def test_works_in_test():
    model = TinyTransformer()
    want = validate(model, ptq(), Fidelity())
    found = trainer(Fidelity()).test(model, datamodule=Sequences(), verbose=False)[0]
    assert {name: found[f"fidelity/{name}"] for name in NAMES} == {name: want[f"fidelity/{name}"] for name in NAMES}


def test_follows_the_weights_in_fit():
    class Log(L.Callback):
        def __init__(self):
            self.epochs = []

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.epochs.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def losses(*callbacks):
        torch.manual_seed(0)
        log, model = Log(), TinyTransformer()
        run = trainer(ptq(during_fit=True), *callbacks, log, max_epochs=2, num_sanity_val_steps=1)
        run.fit(model, datamodule=Sequences())
        return log.epochs, model

    (plain, _), (compared, model) = losses(), losses(Fidelity())
    assert [epoch["loss"] for epoch in plain] == [epoch["loss"] for epoch in compared]
    sqnrs = [epoch["fidelity/sqnr"] for epoch in compared]
    assert sqnrs[0] != sqnrs[1] and min(sqnrs) > 5
    again = validate(model, Fidelity())
    assert again["fidelity/sqnr"] == pytest.approx(sqnrs[1], rel=1e-5)


def test_sanity_checking_is_not_compared():
    class Counts(TinyTransformer):
        compared = 0

        def predict_step(self, batch, batch_idx):
            self.compared += 1
            return super().predict_step(batch, batch_idx)

    model = Counts()
    validate(model, ptq())
    model.compared = 0
    trainer(Fidelity(), max_epochs=1, limit_train_batches=1, num_sanity_val_steps=2).fit(model, datamodule=Sequences())
    assert model.compared == 2 * 8  # eight batches, quantized and float


def test_a_model_may_write_to_what_it_made_in_inference_mode():
    class Cached(TinyTransformer):
        cache = None

        def forward(self, x):
            if self.cache is None or len(self.cache) != len(x):
                self.cache = torch.zeros_like(x)
            return super().forward(self.cache.copy_(x))

    model = Cached()
    validate(model, ptq())
    model.cache = None
    assert "fidelity/sqnr" in validate(model, Fidelity())


def test_a_float_model_is_not_compared_and_one_warning_says_so():
    model, callback = TinyTransformer(), Fidelity()
    with pytest.warns(UserWarning, match="no layer of this TinyTransformer is quantized.*during_fit=True"):
        first = validate(model, callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Fidelity")
        assert validate(model, callback) == first == validate(model)
        assert "fidelity/sqnr" in validate(model, ptq(), callback)  # and goes on when the model is quantized


def test_several_dataloaders_are_compared_apart():
    class Two(Sequences):
        def val_dataloader(self):
            half = [TensorDataset(*(part[index::2] for part in self.val.tensors)) for index in range(2)]
            return [DataLoader(part, batch_size=8) for part in half]

    class Module(TinyTransformer):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    exact, model = TinyTransformer().eval(), Module()
    results = trainer(ptq(), Fidelity()).validate(model, datamodule=Two(), verbose=False)
    x, target = Sequences().val.tensors
    for index in range(2):
        part = slice(index, None, 2)
        with torch.no_grad():
            want = wanted(model.eval()(x[part]), exact(x[part]), target[part])
        for name, value in want.items():
            assert results[0][f"fidelity/{name}/dataloader_idx_{index}"] == pytest.approx(value.item(), rel=1e-5)


def test_only_the_first_batches():
    x, target = Sequences().val.tensors
    exact, model = TinyTransformer().eval(), TinyTransformer()
    result = validate(model, ptq(), Fidelity(metrics=["agreement", "relative_negative_flips"], limit_batches=3))
    with torch.no_grad():
        ours, theirs = model.eval()(x[:24]), exact(x[:24])
    assert result["fidelity/agreement"] == top_one_agreement(ours, theirs).item()
    relative = negative_flip_rate(ours, theirs, target[:24], relative=True).item()
    assert result["fidelity/relative_negative_flips"] == pytest.approx(relative)
    assert not {"fidelity/sqnr", "fidelity/negative_flips"} & result.keys()


class Dicts(TinyTransformer):
    """Takes dict batches and returns the loss in front of the logits, as many libraries do."""

    def predict_step(self, batch, batch_idx):
        logits = self(batch["x"])
        return {"loss": F.cross_entropy(logits, batch["labels"]), "logits": logits, "hidden": torch.ones(3, 2)}

    def validation_step(self, batch, batch_idx):
        return super().validation_step((batch["x"], batch["labels"]), batch_idx)


class DictData(Sequences):
    def val_dataloader(self):
        rows = [{"x": x, "labels": y} for x, y in zip(*self.val.tensors, strict=True)]
        return DataLoader(rows, batch_size=self.batch_size)

    train_dataloader = val_dataloader


def test_dict_batches_and_dict_outputs():
    want = validate(TinyTransformer(), ptq(calibration_loader="val"), Fidelity())
    for output in (None, "logits"):
        fidelity = Fidelity(target="labels", output=output)
        assert validate(Dicts(), ptq(calibration_loader="val"), fidelity, data=DictData()) == want
    hidden = validate(Dicts(), ptq(calibration_loader="val"), Fidelity(target=None, output="hidden"), data=DictData())
    assert hidden["fidelity/sqnr"] == float("inf")


def test_without_labels_there_are_no_flips():
    result = validate(TinyTransformer(), ptq(), Fidelity(target=None))
    assert {name for name in result if "fidelity" in name} == {f"fidelity/{name}" for name in NAMES[:3]}


def test_both_models_see_the_same_random_numbers():
    class Sampler(TinyTransformer):
        def predict_step(self, batch, batch_idx):
            return self(batch[0] + torch.randn_like(batch[0]))

    model = Sampler()
    validate(model, ptq(8), Fidelity(target=None))
    result = validate(model, Fidelity(target=None, metrics="sqnr"))
    assert result["fidelity/sqnr"] > 20  # different noise gives about 0 dB


class TestRefusals:
    def test_an_unknown_metric(self):
        with pytest.raises(ValueError, match=r"knows the metrics sqnr, cosine, .*; found psnr"):
            Fidelity(metrics=["sqnr", "psnr"])

    def test_flips_without_labels(self):
        with pytest.raises(ValueError, match="target=None leaves nothing to log"):
            Fidelity(metrics=["negative_flips"], target=None)

    @pytest.mark.parametrize(
        ("module", "data", "target", "described"),
        [
            (TinyTransformer, Sequences, 2, r"batch\[2\], but the batch is a list of Tensor, Tensor"),
            (TinyTransformer, Sequences, "labels", r"batch\['labels'\], but the batch is a list"),
            (Dicts, DictData, 1, r"batch\[1\], but the batch is a dict with 'x', 'labels'"),
        ],
    )
    def test_a_batch_without_such_a_target(self, module, data, target, described):
        with pytest.raises(ValueError, match=rf"{described}.*target=None"):
            validate(module(), ptq(), Fidelity(target=target), data=data())

    def test_a_tensor_has_no_labels_in_it(self):
        class Bare(Sequences):
            def val_dataloader(self):
                return DataLoader(self.val.tensors[0], batch_size=8)

        class Module(TinyTransformer):
            def predict_step(self, batch, batch_idx):
                return self(batch if isinstance(batch, torch.Tensor) else batch[0])

            def validation_step(self, batch, batch_idx):
                pass

        with pytest.raises(ValueError, match=r"the batch is a tensor \(8, 5, 16\) of torch.float32"):
            validate(Module(), ptq(), Fidelity(), data=Bare())

    @pytest.mark.parametrize("answer", [lambda logits: logits.argmax(-1), lambda logits: None, torch.mean])
    def test_a_model_that_returns_nothing_to_compare(self, answer):
        class Module(TinyTransformer):
            def predict_step(self, batch, batch_idx):
                return answer(self(batch[0]))

        model = Module()
        with pytest.raises(TypeError, match=r"Module.predict_step returned a .*output=.*calibration_step"):
            validate(model, ptq(), Fidelity())
        assert model.blocks[0].fc1.input_quantizer.observer is None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    result = validate(TinyTransformer(), ptq(8), Fidelity(), precision=precision)
    assert 15 < result["fidelity/sqnr"] < 60 and 0.9 < result["fidelity/cosine"] < 1


@pytest.mark.parametrize("monitor", ["fidelity/sqnr"])
def test_can_be_monitored(monitor, tmp_path):
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor=monitor, mode="max")
    run = trainer(
        ptq(during_fit=True), Fidelity(), checkpoint, max_epochs=1, enable_checkpointing=True, num_sanity_val_steps=0
    )
    run.fit(TinyTransformer(), datamodule=Sequences())
    assert checkpoint.best_model_score > 5


def test_arguments_come_from_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(L.Callback, "callback")
    text = "{class_path: lightning_quant.Fidelity, init_args: {metrics: [sqnr], target: labels, limit_batches: 2}}"
    callback = parser.instantiate(parser.parse_args([f"--callback={text}"])).callback
    assert (callback.metrics, callback.target, callback.limit_batches) == (["sqnr"], None, 2)
    parsed = parser.parse_args(["--callback=lightning_quant.Fidelity", "--callback.target=1"])
    assert parser.instantiate(parsed).callback.target == 1


def test_the_callback_can_be_copied_after_a_run():
    callback = Fidelity()
    want = validate(TinyTransformer(), ptq(), callback)
    assert validate(TinyTransformer(), ptq(), copy.deepcopy(callback)) == want


@pytest.mark.slow
@pytest.mark.parametrize("samples", [SAMPLES, 24])  # 8 batches for both ranks alike, or 3 and so one rank more
def test_two_processes_are_one(samples):
    class Data(Sequences):
        def val_dataloader(self):
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
            loader = super().val_dataloader()
            if rank is None:
                return loader
            batches = torch.arange(len(self.val)).split(self.batch_size)[rank::2]
            return DataLoader(torch.utils.data.Subset(self.val, torch.cat(batches).tolist()), self.batch_size)

    model = TinyTransformer()
    validate(model, ptq(bits=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking, and about validating on more than one device
        one = validate(model, Fidelity(), data=Data(samples=samples))
        two = validate(
            model, Fidelity(), data=Data(samples=samples), strategy="ddp_fork", devices=2, use_distributed_sampler=False
        )
    assert one["fidelity/negative_flips"] > 0
    for name in NAMES:
        assert two[f"fidelity/{name}"] == pytest.approx(one[f"fidelity/{name}"], rel=1e-12)
