"""Predict runs on kernels, computes what was simulated, and leaves nothing behind."""

import copy
import gc
import re
from concurrent.futures import ThreadPoolExecutor

import lightning as L
import psutil
import pytest
import torch
from torch import nn

from lightning_quant import KernelSwap, PostTrainingQuantization, load_quantized, save_quantized
from lightning_quant.kernels.attention_door import RoutedAttention
from lightning_quant.kernels.layer_door import KernelLayer
from lightning_quant.layers import QuantizedLayer
from tests.cases import CASES, Case, is_float, predictions, ptq, quantized
from tests.models import NoDropout, Sequences, TinyTransformer, trainer


def swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, KernelLayer)]


def predict(case: Case, model: L.LightningModule, *callbacks: L.Callback) -> torch.Tensor:
    return torch.cat(trainer(case(), *callbacks).predict(model, datamodule=Sequences()))


def near(out: torch.Tensor, simulated: torch.Tensor) -> bool:
    """Equal but for a few activations that fell on the other side of a rounding."""
    return bool((out - simulated).norm() < 0.02 * simulated.norm())


def test_predict_on_kernels_is_validate_and_leaves_nothing_behind(case):
    model = case.quantized()
    want, state = predictions(case, model), copy.deepcopy(model.state_dict())
    swap = KernelSwap(backend="torch")
    assert near(predict(case, model, swap), want)
    assert {row.layer for row in swap.table.rows} >= set(quantized(model))
    assert not swapped(model)
    assert torch.equal(predictions(case, model), want)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_kept_kernels_are_small_and_answer_like_the_simulated_model(case):
    model = case.quantized()
    want = predictions(case, model)
    assert near(predict(case, model, KernelSwap(keep=True)), want)
    for name in quantized(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, KernelLayer) and layer.kept
        assert not [key for key, _ in layer.named_parameters(recurse=False) if "weight" in key]
        assert layer.weight.dtype == torch.float32 and layer.weight.isnan().all()  # T5 asks for the dtype
    assert near(predict(case, model), want)  # without the callback, too


@pytest.mark.parametrize("case", [CASES[name] for name in ("ptq_w4", "ptq_fp8", "repq_w4a4", "ptq_reconstructed")])
@pytest.mark.parametrize("how", ["folder", "checkpoint"])
def test_a_kept_model_saves_its_codes(case, how, tmp_path):
    model = case.quantized()
    want = predictions(case, model)
    running = trainer(case(), KernelSwap(keep=True))
    running.predict(model, datamodule=Sequences())
    layer = quantized(model)[0]
    assert f"{layer}.weight" not in model.state_dict() and f"{layer}.weight.codes" in model.state_dict()
    fresh = case.model()
    if how == "folder":
        save_quantized(model, tmp_path / "kept")
        load_quantized(fresh, tmp_path / "kept")
        assert torch.equal(predictions(case, fresh), want)
    else:
        running.save_checkpoint(tmp_path / "kept.ckpt")
        answers = trainer(case()).predict(fresh, datamodule=Sequences(), ckpt_path=tmp_path / "kept.ckpt")
        assert torch.equal(torch.cat(answers), want)


def test_memory_falls_with_the_bits():
    class Wide(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 3))

        def forward(self, x):
            return self.net(x).mean(1)

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    def size(model):
        return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])

    for weights, activations, smaller in (("int8", None, 3.8), ("int4", None, 6.9), ("int7", "int8", 3.7)):
        model = Wide()
        before = size(model)
        callbacks = [PostTrainingQuantization(weights=weights, activations=activations), KernelSwap(keep=True)]
        trainer(callbacks[0]).validate(model, datamodule=Sequences(), verbose=False)
        trainer(*callbacks).predict(model, datamodule=Sequences())
        assert before / size(model) > smaller


def test_a_hundred_swaps_leave_no_trace():
    model = ptq.quantized()
    want = predictions(ptq, model)
    swap = KernelSwap(backend="torch")
    resident = []
    for _ in range(5):
        for _ in range(20):
            swap.swap(model)
            swap.give_back()
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert torch.equal(predictions(ptq, model), want)
    assert max(resident) < resident[0] + 4e6
    assert not [key for module in model.modules() for key in vars(module) if key == "kernel"]


class Fails(L.Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            raise KeyError("in the middle")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_exception_in_the_middle_leaves_the_simulated_model(backend):
    model = ptq.quantized()
    want = predictions(ptq, model)
    with pytest.raises(KeyError, match="in the middle"):
        predict(ptq, model, KernelSwap(backend=backend), Fails())
    assert not swapped(model)
    assert torch.equal(predictions(ptq, model), want)


def test_a_checkpoint_of_the_swapped_model_is_that_of_the_simulated_one(tmp_path):
    class Saves(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, *rest):
            assert swapped(pl_module)
            trainer.save_checkpoint(tmp_path / "swapped.ckpt")

    model = ptq.quantized()
    want = predictions(ptq, model)
    predict(ptq, model, KernelSwap(), Saves())
    fresh = ptq.model()
    running = trainer(ptq())
    answers = torch.cat(running.predict(fresh, datamodule=Sequences(), ckpt_path=tmp_path / "swapped.ckpt"))
    assert torch.equal(answers, want)


def test_it_works_from_a_checkpoint(tmp_path):
    model = ptq.quantized()
    running = trainer(ptq())
    running.validate(model, datamodule=Sequences(), verbose=False)
    running.save_checkpoint(tmp_path / "simulated.ckpt")
    answers = trainer(ptq(), KernelSwap()).predict(
        ptq.model(), datamodule=Sequences(), ckpt_path=tmp_path / "simulated.ckpt"
    )
    assert near(torch.cat(answers), predictions(ptq, model))


def test_copies_and_pickles_of_a_swapped_model_are_simulated():
    model = ptq.quantized()
    want = predictions(ptq, model)
    swap = KernelSwap()
    swap.swap(model)
    for other in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        assert not swapped(other)
        assert torch.equal(predictions(ptq, other), want)
    swap.give_back()


def test_a_copy_of_a_kept_model_answers_the_same():
    model = ptq.quantized()
    answers = predict(ptq, model, KernelSwap(keep=True))
    for other in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        assert near(predict(ptq, other), answers)


def _saved(model):
    import io

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_threads_share_a_kept_model():
    model = ptq.quantized()
    predict(ptq, model.eval(), KernelSwap(keep=True))
    batches = [torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(seed)) * 3 for seed in range(32)]
    with torch.no_grad():
        alone = [model(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(torch.no_grad()(model), batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# ---------------------------------------------------------------- between the products


def in_precision(precision: str, case: Case, model: nn.Module, *callbacks: L.Callback) -> torch.Tensor:
    running = trainer(case(), *callbacks, precision=precision)
    return torch.cat([out.float() for out in running.predict(model, datamodule=Sequences())])


class Attends(L.Callback):
    """Notes which modules attend in another way than their own."""

    def __init__(self):
        self.routed = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        found = {name for name, module in pl_module.named_modules() if isinstance(module, RoutedAttention)}
        self.routed.append(found)


without_attention = Case(PostTrainingQuantization, {"attention": False})


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bfloat16_float_attention_is_routed_after_the_first_batch_and_comes_back(precision):
    model = without_attention.quantized()
    want, state = predictions(without_attention, model), copy.deepcopy(model.state_dict())
    simulated = in_precision(precision, without_attention, model)
    swap, attends = KernelSwap("torch"), Attends()
    out = in_precision(precision, without_attention, model, swap, attends)
    assert (out - simulated).norm() < 0.03 * simulated.norm()
    assert attends.routed[1:] and all(found == {"blocks.0", "blocks.1"} for found in attends.routed[1:])
    rows = {row.layer: row.kernel for row in swap.table.rows}
    assert rows["blocks.0"] == rows["blocks.1"] == "bfloat16 attention" and rows["head"].startswith("int8")
    assert not swapped(model) and not any(isinstance(module, RoutedAttention) for module in model.modules())
    if precision == "bf16-mixed":
        assert torch.equal(predictions(without_attention, model), want)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_in_float32_attention_is_left_alone():
    model, attends = without_attention.quantized(), Attends()
    predict(without_attention, model, KernelSwap("torch"), attends)
    assert not any(attends.routed)


@pytest.mark.parametrize("batch", [0, 1])
def test_an_exception_in_bfloat16_leaves_nothing_behind(batch):
    class FailsEarly(L.Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch_, batch_idx, dataloader_idx=0):
            if batch_idx == batch:
                raise KeyError("early")

    model = without_attention.quantized()
    want = predictions(without_attention, model)
    with pytest.raises(KeyError, match="early"):
        in_precision("bf16-mixed", without_attention, model, KernelSwap("torch"), FailsEarly())
    assert torch.is_grad_enabled() and torch._C._len_torch_function_stack() == 0
    assert not swapped(model) and not any(isinstance(module, RoutedAttention) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(predictions(without_attention, model), want)


# ---------------------------------------------------------------- the table, and what is refused


def test_the_table_names_layers_without_a_kernel_and_strict_refuses_them():
    case = Case(PostTrainingQuantization, {"overrides": {"head": "fp8_e4m3"}, "attention": False})
    model = case.quantized()
    swap = KernelSwap(backend="torch")
    predict(case, model, swap)
    (row,) = swap.table.simulated
    assert row.layer == "head" and row.kernel == "float" and "fp8_e4m3" in row.why_not
    assert "9 layers on int8 (oneDNN), 1 layer on float" in swap.table.summary()
    assert re.search(r"head\s.*fp8_e4m3", str(swap.table))
    with pytest.raises(ValueError, match=r"strict=True, and 1 of 10 quantized layers .*`head`: its weights are fp8"):
        predict(case, model, KernelSwap(strict=True))
    assert not swapped(model)


def test_auto_measures_in_the_first_batch_and_settles():
    model = ptq.quantized()

    class Looks(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                self.kernels = {type(pl_module.get_submodule(name).kernel).__name__ for name in swapped(pl_module)}

    swap, looks = KernelSwap(), Looks()
    predict(ptq, model, swap, looks)
    assert looks.kernels <= {"Int8Linear", "DecodedWeights"}
    slower = [row for row in swap.table.rows if "as long in the first batch" in row.why_not]
    assert all(row.kernel == "float" for row in slower)


def test_a_float_model_is_refused():
    with pytest.raises(RuntimeError, match=r"no quantized layer in this TinyTransformer: run trainer\.validate"):
        trainer(KernelSwap()).predict(TinyTransformer(), datamodule=Sequences())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='tpu' is none of 'auto', 'torch', 'openvino'"):
        KernelSwap(backend="tpu")


def test_a_kept_model_cannot_become_float_nor_be_loaded_into():
    model = ptq.quantized()
    state = model.state_dict()
    predict(ptq, model, KernelSwap(keep=True))
    with pytest.raises(ValueError, match=r"`embed` has no float weights any more"):
        ptq().remove(model)
    assert swapped(model) and not is_float(model)
    with pytest.raises(ValueError, match="build the model anew"):
        model.load_state_dict(state)


def test_compiling_is_undone():
    model = NoDropout()
    case = Case(PostTrainingQuantization, {"attention": False}, NoDropout)
    case.quantized(model)
    want = predictions(case, model)
    swap = KernelSwap(backend="torch", compile=True)
    swap.swap(model)
    assert any(module._compiled_call_impl is not None for module in model.modules())
    swap.give_back()
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert torch.equal(predictions(case, model), want)


def test_layers_that_are_float_stay_float():
    case = Case(PostTrainingQuantization, {"skip": ["head"], "attention": False})
    model = case.quantized()
    swap = KernelSwap(backend="torch")
    predict(case, model, swap)
    assert "head" not in {row.layer for row in swap.table.rows}
    assert not isinstance(model.head, QuantizedLayer)
