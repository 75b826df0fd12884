"""OpenVINO answers what was simulated, by products of bytes, and leaves nothing behind."""

import copy
import sys

import lightning as L
import pytest
import torch
from torch import nn

from lightning_quant import KernelSwap
from lightning_quant.kernels.openvino import Trial, has_openvino
from lightning_quant.kernels.openvino.door import AnsweredModule
from lightning_quant.kernels.openvino.grids import as_fake_quantize
from lightning_quant.layers import QuantizedLayer
from tests.cases import CASES, Case, predictions, ptq
from tests.models import NoDropout, Sequences, trainer

needs_openvino = pytest.mark.skipif(not has_openvino(), reason="OpenVINO is not installed: pip install openvino")
BYTES = "int8 (OpenVINO)"


def answered(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AnsweredModule)]


def predict(case: Case, model: L.LightningModule, swap: KernelSwap, *callbacks: L.Callback, batch_size: int = 8):
    running = trainer(case(), swap, *callbacks)
    return torch.cat(running.predict(model, datamodule=Sequences(batch_size)))


def far(out: torch.Tensor, simulated: torch.Tensor) -> float:
    return ((out - simulated).norm() / simulated.norm()).item()


def kernels(swap: KernelSwap) -> dict[str, str]:
    return {row.layer: row.kernel for row in swap.table.rows}


@needs_openvino
@pytest.mark.parametrize("name", ["ptq", "qat", "repq_w4a4", "noisyquant"])  # 8 bits, 4 bits, logarithms, noise
def test_it_answers_what_was_simulated_and_leaves_nothing_behind(name):
    case = CASES[name]
    model = case.quantized()
    want, state = predictions(case, model), copy.deepcopy(model.state_dict())
    swap = KernelSwap(backend="openvino")
    assert far(predict(case, model, swap), want) < 0.02
    assert set(kernels(swap).values()) <= {BYTES, "float (OpenVINO)"}
    if name in ("ptq", "qat"):
        layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
        assert all(kernels(swap)[layer] == BYTES for layer in layers)
    assert not answered(model)
    assert torch.equal(predictions(case, model), want)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["ptq", "qat", "repq_w4a4", "ptq_w4", "gptq"])
def test_what_is_handed_over_is_what_was_simulated(name):
    case = CASES[name]
    model = case.quantized().eval()
    x = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(5)) * 3
    places = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    with torch.no_grad():
        want = model(x)
        with as_fake_quantize(places):
            assert far(model(x), want) < 0.01
        assert torch.equal(model(x), want)


class Looks(L.Callback):
    """Which modules OpenVINO may answer for while predict runs."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.answered = answered(pl_module)
        if batch_idx == 1:
            raise KeyError("in the middle")


@needs_openvino
def test_an_exception_in_the_middle_leaves_the_simulated_model():
    model = ptq.quantized()
    want = predictions(ptq, model)
    looks = Looks()
    with pytest.raises(KeyError, match="in the middle"):
        predict(ptq, model, KernelSwap(backend="openvino"), looks)
    assert looks.answered and not answered(model)
    assert torch.equal(predictions(ptq, model), want)


class Peeks(NoDropout):
    """Its Python looks at a value, so it cannot be compiled as a whole; its blocks can."""

    def forward(self, x):
        return super().forward(x if x.mean() > -9 else -x)


class Counts(NoDropout):
    """Changes what it holds in every forward."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        self.seen = x.sum()
        return super().forward(x)


@needs_openvino
@pytest.mark.parametrize(("model_class", "why"), [(Peeks, "DataDependent"), (Counts, "changes what a")])
def test_what_is_inside_is_tried_where_the_whole_cannot_be_compiled(model_class, why):
    case = Case(ptq.method, {**ptq.arguments, "attention": False}, model_class)
    model = case.quantized()
    want = predictions(case, model)
    swap = KernelSwap(backend="openvino")
    assert far(predict(case, model, swap), want) < 0.02
    assert kernels(swap)["blocks.0.qkv"] == BYTES and kernels(swap)["head"] == "int8 (oneDNN)"
    assert torch.equal(predictions(case, model), want)
    if model_class is Counts:
        assert type(model.seen) is torch.Tensor and model.seen.isfinite()  # nothing of the tracer is left in it
    swap = KernelSwap(backend="openvino")
    swap.swap(model.eval())
    with torch.no_grad():
        model(torch.randn(8, 5, 16))
    assert any(why in module.why_not for module in swap._swapped._modules.values())
    swap.give_back()


@needs_openvino
def test_a_module_whose_inside_is_watched_is_left_alone():
    model, seen = ptq.quantized(), []
    handle = model.blocks[0].fc1.register_forward_hook(lambda module, args, output: seen.append(1))
    swap = KernelSwap(backend="openvino")
    predict(ptq, model, swap)
    handle.remove()
    assert len(seen) == 8  # as many as there are batches
    assert kernels(swap)["blocks.1.fc1"] == BYTES and kernels(swap)["blocks.0.fc1"] == "int8 (oneDNN)"


@needs_openvino
def test_a_last_smaller_batch_is_answered():
    model = ptq.quantized()
    want = predictions(ptq, model)
    assert far(predict(ptq, model, KernelSwap(backend="openvino"), batch_size=24), want) < 0.02


@needs_openvino
def test_formats_that_it_lacks_go_to_the_kernels_of_torch():
    case = CASES["ptq_dynamic"]
    swap = KernelSwap(backend="openvino")
    predict(case, case.quantized(), swap)
    assert kernels(swap)["blocks.0.qkv"] == "int8 (oneDNN)"


@needs_openvino
def test_it_is_strict_after_the_first_batch():
    model = CASES["ptq_w4"].quantized()
    with pytest.raises(ValueError, match=r"strict=True, and 10 of 10 quantized layers .* inputs are float"):
        predict(CASES["ptq_w4"], model, KernelSwap(backend="openvino", strict=True))
    assert not answered(model)


@needs_openvino
@pytest.mark.parametrize("faster", ["torch", "openvino"])
def test_auto_tries_it_and_keeps_what_is_faster(faster, monkeypatch):
    """With a clock that tells which one is faster: torch's batches take a minute, or OpenVINO's take an hour."""
    times = iter([0, 60] * 3 + [0, 3600 if faster == "torch" else 1] * 3 + [0, 0] * 99)
    monkeypatch.setattr("lightning_quant.callbacks.kernel_swap.Trial", lambda: Trial(lambda: next(times)))
    model = ptq.quantized()
    want = predictions(ptq, model)
    swap = KernelSwap()
    assert far(predict(ptq, model, swap), want) < 0.02
    assert (kernels(swap)["head"] == BYTES) == (faster == "openvino")
    assert torch.equal(predictions(ptq, model), want)


def test_a_short_predict_is_over_before_it_would_have_compiled():
    times = iter([0, 1] * 9)
    trial = Trial(lambda: next(times))
    for _ in range(9):
        trial.began()
        assert trial.ended(10) in (None, "torch")
    assert trial.turn is None and "is over before" in str(trial)


@needs_openvino
def test_it_does_not_keep():
    with pytest.raises(ValueError, match="neither keep=True nor compile=True"):
        KernelSwap(backend="openvino", keep=True)


def test_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("lightning_quant.callbacks.kernel_swap.has_openvino", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-quant\[openvino\]"'):
        KernelSwap(backend="openvino")


def test_it_is_not_imported_before_it_is_used():
    assert has_openvino() or "openvino" not in sys.modules
