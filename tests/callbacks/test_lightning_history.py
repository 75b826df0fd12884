"""What Lightning's own QuantizationAwareTraining got wrong, one test per issue or pull request of its tracker."""

import inspect

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_quant import CalibrationMixin, PostTrainingQuantization, RepQViT, load_quantized, save_quantized
from lightning_quant.layers import QuantizedLayer
from tests.callbacks.unchanged import bits, facts, left_as_it_was, refused, scales
from tests.cases import ptq, repq
from tests.models import CLASSES, TOKENS, WIDTH, Sequences, TinyTransformer, trainer, validate


def quantized(model):
    return sum(isinstance(module, QuantizedLayer) for module in model.modules())


# ---------------------------------------------------------------- arguments


def test_16609_the_callback_without_arguments_works_with_this_torch():
    for callback in (PostTrainingQuantization(), RepQViT()):
        model = TinyTransformer()
        validate(model, callback)
        assert quantized(model) == 10


class Attention(nn.Module):
    """Called with keywords only, as transformers does."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, *, hidden_states, attention_mask=None):
        q, k, v = self.qkv(input=hidden_states).chunk(3, -1)
        return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=attention_mask)


class Keywords(L.LightningModule):
    """A dict batch goes into forward as keywords; labels are among them."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x, *, mask=None, scale=1.0, labels=None):
        states = self.attention(hidden_states=self.norm(x), attention_mask=mask)
        logits = self.head(input=states.mean(1)) * scale
        return (F.cross_entropy(logits, labels), logits) if labels is not None else logits

    def validation_step(self, batch, batch_idx):
        self.log("loss", self(**batch)[0])


def keyword_batches():
    x, y = Sequences().val.tensors
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return [{"x": x[i : i + 16], "labels": y[i : i + 16], "mask": mask} for i in range(0, 64, 16)]


def test_15862_forward_with_keyword_arguments(method):
    torch.manual_seed(1)
    model, run = Keywords(), trainer(method(calibration_loader="val", calibration_samples=16))
    signature, loader = inspect.signature(model.forward), DataLoader(keyword_batches(), batch_size=None)
    before = trainer().validate(model, loader, verbose=False)[0]["loss"]
    after = run.validate(model, loader, verbose=False)[0]["loss"]
    assert quantized(model) == 2 and 0 < abs(before - after) < 0.05
    batch = keyword_batches()[0]
    x, mask = batch["x"], batch["mask"]
    assert torch.equal(model(x=x, mask=mask, scale=2.0), 2 * model(x, mask=mask))
    assert not torch.equal(model(x=x, mask=mask), model(x=x))  # the keyword is not swallowed
    assert torch.equal(model.head(input=x), model.head(x))
    assert inspect.signature(model.forward) == signature and "forward" not in vars(model)


class TwoInputs(L.LightningModule):
    """Two positional inputs and a keyword, with the layer shared by both inputs: the issue's own model."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, kernel_size=3)

    def forward(self, a, b, softmax=False):
        combined = self.conv(a) + self.conv(b)
        return combined.softmax(3) if softmax else combined

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(*batch, softmax=True).square().mean())


class TwoInputsPredict(TwoInputs):
    def predict_step(self, batch, batch_idx):
        return self(*batch)


def images():
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 9, 9, generator=generator), 10 * torch.randn(3, 9, 9, generator=generator))] * 8
    return DataLoader(data, batch_size=4)


def test_7926_several_inputs_and_a_keyword():
    model, callback = TwoInputsPredict(), ptq(calibration_loader="val")
    before = trainer().validate(model, images(), verbose=False)[0]["mean"]
    after = trainer(callback).validate(model, images(), verbose=False)[0]["mean"]
    assert type(model.conv).__name__ == "QuantConv2d" and 0 < abs(before - after) < 0.02 * before
    a, b = next(iter(images()))
    assert model.conv.input_quantizer.scale * 255 > 1.2 * b.max()  # both calls of the layer were observed
    assert torch.equal(model(a, b, softmax=True), model(b=b, a=a, softmax=True))


def test_7926_several_inputs_that_calibration_cannot_guess_are_refused():
    model = TwoInputs()
    with refused(model, "calibration_step", TypeError):
        trainer(ptq(calibration_loader="val")).validate(model, images(), verbose=False)


# ---------------------------------------------------------------- checkpoints


class WithMixin(CalibrationMixin, TinyTransformer):
    pass


def test_12896_test_with_ckpt_path(method, tmp_path):
    model, run = TinyTransformer(), trainer(method())
    run.validate(model, datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "q.ckpt")
    want = run.test(model, datamodule=Sequences(), verbose=False)
    assert run.test(model, datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt", verbose=False) == want
    for fresh, callbacks in ((TinyTransformer(), [method()]), (WithMixin(), [])):
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.mul_(0.5)
        again = trainer(*callbacks).test(fresh, datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt", verbose=False)
        assert again == want and scales(fresh) == scales(model)


def test_12896_test_with_the_best_checkpoint_of_a_fit(method, tmp_path):
    model, best = TinyTransformer(), ModelCheckpoint(tmp_path, monitor="loss")
    run = trainer(method(), best, max_epochs=2, enable_checkpointing=True, num_sanity_val_steps=0)
    run.validate(model, datamodule=Sequences(), verbose=False)
    found = scales(model)
    run.fit(model, datamodule=Sequences(32))
    run.test(datamodule=Sequences(), ckpt_path="best", verbose=False)
    assert scales(model) == found


def test_6457_load_from_checkpoint_of_a_checkpoint_made_in_training(method, tmp_path):
    model, best = TinyTransformer(), ModelCheckpoint(tmp_path, save_top_k=-1)
    run = trainer(method(during_fit=True), best, max_epochs=1, enable_checkpointing=True)
    run.fit(model, datamodule=Sequences(32))
    assert quantized(model)
    loaded = WithMixin.load_from_checkpoint(best.best_model_path)
    assert scales(loaded) == scales(model)
    assert all(bits(loaded.state_dict()[key]) == bits(value) for key, value in model.state_dict().items())
    assert validate(loaded) == validate(model)
    with pytest.raises(RuntimeError, match=r"(?s)load it with the callback that made it .*CalibrationMixin"):
        TinyTransformer.load_from_checkpoint(best.best_model_path)


@pytest.mark.parametrize("during_fit", [False, True])
def test_8485_resume_with_observer_state(method, during_fit, tmp_path):
    def fit(model, epochs, **kwargs):
        last = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        options = {"max_epochs": epochs, "enable_checkpointing": True, "num_sanity_val_steps": 1}
        run = trainer(method(during_fit=during_fit), last, **options)
        run.fit(model, datamodule=Sequences(32), **kwargs)
        return run, last.last_model_path

    straight = TinyTransformer(dropout=0.0)
    if not during_fit:
        validate(straight, method())
    _, path = fit(straight, 1)
    found = scales(straight)

    resumed = TinyTransformer(dropout=0.0)
    with torch.no_grad():
        resumed.head.weight.add_(1)  # so that what was not restored is seen
    run, _ = fit(resumed, 2, ckpt_path=path)
    assert run.current_epoch == 2 and run.global_step == 4
    assert scales(resumed) == found
    assert not torch.equal(resumed.head.weight, straight.head.weight)
    run.validate(resumed, datamodule=Sequences(), verbose=False)
    assert scales(resumed) == found


# ---------------------------------------------------------------- together with pruning


def prunable(model):
    return [(model.blocks[0].fc1, "weight"), (model.blocks[1].qkv, "weight"), (model.head, "weight")]


def effective(layer):
    """The weight that the layer computes with."""
    return layer.quantized() if isinstance(layer, QuantizedLayer) else layer.weight


@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("lottery", [True, False])
def test_11047_pruning_and_quantization_in_one_fit(pruning_first, lottery, tmp_path):
    model = TinyTransformer()
    pruning = ModelPruning(
        "l1_unstructured",
        prunable(model),
        ["weight"],
        amount=0.5,
        use_lottery_ticket_hypothesis=lottery,
        make_pruning_permanent=False,
    )
    quantization = ptq(during_fit=True)
    run = trainer(*((pruning, quantization) if pruning_first else (quantization, pruning)), max_epochs=3)
    run.fit(model, datamodule=Sequences(32))
    assert quantization.is_calibrated(model) and quantized(model) == 10
    model.eval()(Sequences().val.tensors[0])
    for layer, _ in prunable(model):
        assert (layer.weight_mask == 0).float().mean() > 0.8  # 50, 75, 87.5 %
        assert (effective(layer)[layer.weight_mask == 0] == 0).all() and effective(layer).count_nonzero() > 0
    masks = [layer.weight_mask.clone() for layer, _ in prunable(model)]

    validate(model, quantization)  # without ModelPruning, whose setup cannot copy a layer with a mask in force
    quantization.remove(model)
    assert quantized(model) == 0
    assert all(torch.equal(layer.weight_mask, mask) for (layer, _), mask in zip(prunable(model), masks, strict=True))
    for layer, _ in prunable(model):
        prune.remove(layer, "weight")
    validate(model)


@pytest.mark.parametrize("pruning_first", [True, False])
def test_11047_a_checkpoint_of_both_holds_plain_pruned_weights(pruning_first, tmp_path):
    model, quantization = TinyTransformer(), ptq(during_fit=True)
    pruning = ModelPruning("l1_unstructured", prunable(model), ["weight"], amount=0.5)
    run = trainer(*((pruning, quantization) if pruning_first else (quantization, pruning)), max_epochs=2)
    run.fit(model, datamodule=Sequences(32))
    want = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    assert (effective(model.head) == 0).float().mean() > 0.7
    run.save_checkpoint(tmp_path / "both.ckpt")
    fresh = TinyTransformer()
    assert validate(fresh, ptq(during_fit=True), ckpt_path=tmp_path / "both.ckpt") == want
    assert torch.equal(effective(fresh.head), effective(model.head))


def test_11047_masks_that_are_in_force_while_a_model_is_quantized(tmp_path):
    model = TinyTransformer()
    for layer, name in prunable(model):
        prune.l1_unstructured(layer, name, amount=0.6)
    before = validate(model)
    with left_as_it_was(model):
        callback = ptq()
        after = validate(model, callback)
        assert quantized(model) == 10 and 0 < abs(before["loss"] - after["loss"]) < 0.1
        for layer, _ in prunable(model):
            assert (layer.quantized()[layer.weight_mask == 0] == 0).all()
        callback.remove(model)
    assert validate(model) == before


def test_11047_folding_into_a_masked_layer_is_refused():
    model = TinyTransformer()
    for block in model.blocks:
        for layer in (block.qkv, block.fc1):
            prune.l1_unstructured(layer, "weight", amount=0.6)
    with refused(model, "RepQViT folds .* none that can be folded"):
        validate(model, repq())


def test_11047_packing_a_masked_layer_is_refused_with_one_error(tmp_path):
    model = TinyTransformer()
    validate(model, ptq())
    prune.l1_unstructured(model.head, "weight", amount=0.6)
    with refused(model, "`head.weight`.*permanent"):
        save_quantized(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    prune.remove(model.head, "weight")
    save_quantized(model, tmp_path / "folder")
    fresh = TinyTransformer()
    load_quantized(fresh, tmp_path / "folder")
    assert torch.equal(effective(fresh.head), effective(model.head))


# ---------------------------------------------------------------- nothing moves


class WithBatchNorm(TinyTransformer):
    """Batch statistics before the blocks, and statistics that have seen data."""

    def __init__(self):
        super().__init__()
        self.stem, self.batch_norm = nn.Conv1d(TOKENS, TOKENS, 3, padding=1), nn.BatchNorm1d(TOKENS)
        self.batch_norm.running_mean.normal_()

    def forward(self, x):
        return super().forward(self.batch_norm(self.stem(x)))


def tensors(model):
    """All parameters and buffers but the state of quantizers."""
    return {
        name: value
        for name, value in facts(model)["values"].items()
        if "quantizer" not in name and "folded" not in name
    }


def test_8540_nothing_moves_in_validate_test_and_predict(method):
    model, run = WithBatchNorm().train(), trainer(method())
    before = tensors(model)
    run.validate(model, datamodule=Sequences(), verbose=False)
    folds = {
        f"blocks.{i}.{name}.{p}"
        for i in (0, 1)
        for name in ("norm1", "norm2", "qkv", "fc1")
        for p in ("weight", "bias")
    }
    moved = {name for name, value in tensors(model).items() if value != before[name]}
    assert moved == (folds if "RepQ" in type(run.callbacks[0]).__name__ else set())
    assert model.batch_norm.num_batches_tracked == 0 and model.batch_norm.training

    values = facts(model)["values"]
    for verb in ("validate", "test", "predict", "validate"):
        quiet = {} if verb == "predict" else {"verbose": False}
        getattr(run, verb)(model, datamodule=Sequences(batch_size=7), **quiet)
        assert facts(model)["values"] == values, verb
    trainer(method(), limit_train_batches=0, max_epochs=1).fit(model, datamodule=Sequences(32))  # its sanity check too
    assert facts(model)["values"] == values


def test_8540_the_sanity_check_and_the_validation_in_fit_calibrate_nothing(method):
    model = WithBatchNorm()
    with left_as_it_was(model):
        trainer(method(), limit_train_batches=0, max_epochs=1, num_sanity_val_steps=2).fit(
            model, datamodule=Sequences()
        )


def test_8540_a_fit_of_a_calibrated_model_moves_no_scale(method):
    model = WithBatchNorm()
    validate(model, method())
    found, weight = scales(model), model.head.weight.detach().clone()
    trainer(method(), max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=Sequences(32))
    assert scales(model) == found and not torch.equal(model.head.weight, weight)
