"""Convolutions take over what follows them, and nobody can tell but by the clock."""

import copy
import gc
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import lightning as L
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_quant import KernelSwap, PostTrainingQuantization
from lightning_quant.callbacks import kernel_latency
from lightning_quant.kernels import int8_product
from lightning_quant.kernels.codes import Grid
from lightning_quant.kernels.int8_conv import Int8Conv
from lightning_quant.kernels.layer_door import KernelLayer, give_back, run_on
from lightning_quant.kernels.pending import Pending
from tests.kernels.layers import calibrated
from tests.models import trainer

# 7 bits are exact on any CPU.
FORMATS = {"weights": "int8", "activations": "int8" if not int8_product.saturates() else "int7"}
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")


def norm(channels: int) -> nn.BatchNorm2d:
    """Some of its weights are negative, one is 0."""
    found = nn.BatchNorm2d(channels)
    nn.init.normal_(found.weight)
    nn.init.normal_(found.bias, std=0.5)
    nn.init.normal_(found.running_mean, std=0.5)
    nn.init.uniform_(found.running_var, 0.2, 2)
    with torch.no_grad():
        found.weight[0] = 0
    return found


class Net(L.LightningModule):
    """A stem, an inverted residual, and a head."""

    def __init__(self, activation=lambda: nn.ReLU6(inplace=True)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), norm(8), activation())
        self.block = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False),
            norm(24),
            activation(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            norm(24),
            activation(),
            nn.Dropout2d(0.1),
            nn.Conv2d(24, 8, 1, bias=False),
            norm(8),
        )
        self.last = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def features(self, x):
        x = self.stem(x)
        return self.last(x + self.block(x))

    def forward(self, x):
        return self.head(F.relu(self.features(x)).mean((2, 3)))

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def images(seed: int = 0, samples: int = 16) -> torch.Tensor:
    return torch.randn(samples, 3, 17, 16, generator=torch.Generator().manual_seed(seed))


def loader(batch_size: int = 4) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images()), batch_size=batch_size)


def quantized(net: L.LightningModule | None = None, **formats) -> tuple[L.LightningModule, PostTrainingQuantization]:
    torch.manual_seed(0)
    net = Net() if net is None else net
    ptq = PostTrainingQuantization(**{**FORMATS, "attention": False, **formats})
    trainer(ptq).validate(net, loader(), verbose=False)
    return net.eval(), ptq


def predict(net, *callbacks) -> torch.Tensor:
    return torch.cat(trainer(*callbacks).predict(net, loader()))


def near(out: torch.Tensor, simulated: torch.Tensor) -> bool:
    return bool((out - simulated).norm() < 0.02 * simulated.norm())


@pytest.fixture
def layer():
    """A convolution whose kernel answers to images (2, 6, 9, 8)."""
    torch.manual_seed(0)
    found = calibrated(nn.Conv2d(6, 10, 3, padding=1), "int8_sym_channel", "int7_asym_tensor", torch.randn(2, 6, 9, 8))
    run_on(found, Int8Conv.of(found))
    return found


@pytest.fixture
def x():
    return torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- what it answers

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu in place": lambda y: F.relu(y, inplace=True),
    "relu_": torch.relu_,
    "method": lambda y: y.relu(),
    "relu6": F.relu6,
    "relu6 module": nn.ReLU6(inplace=True),
    "hardtanh": lambda y: F.hardtanh(y, -0.5, 0.75),
    "clamp": lambda y: y.clamp(max=1.0),
    "clamp_": lambda y: y.clamp_(0.25),
    "two bounds": lambda y: torch.clamp(y, -1, 1.5),
    "hardswish": F.hardswish,
    "silu": F.silu,
}
GRIDS = {
    "8 bits": Grid(0.02, 50.0, -100, 155),
    "8 bits from 0": Grid(0.01, 100.0, 0, 255),
    "signed": Grid(0.03, 1 / 0.03, -128, 127),
    "7 bits": Grid(0.03, 1 / 0.03, -50, 77),
    "4 bits": Grid(0.4, 2.5, -3, 12),
    "without 0": Grid(0.004, 250.0, 20, 275),
}


@torch.no_grad()
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_and_activation_are_those_of_one_step_after_the_other(layer, x, activation, normed):
    follows, batch_norm = ACTIVATIONS[activation], norm(10).eval()
    bare = layer.simulate(x)
    want = follows(batch_norm(bare) if normed else bare)
    for grid in GRIDS.values():
        out = layer(x)
        out = follows(batch_norm(out) if normed else out)
        assert isinstance(out, Pending) and len(out.steps) == normed + (activation != "none")
        codes, exact = out.codes_on(grid), grid.unsigned(want.contiguous(memory_format=torch.channels_last))
        assert codes.dtype == torch.uint8 and codes.is_contiguous(memory_format=torch.channels_last)
        apart = (codes.int() - exact.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-3
    out = layer(x)
    torch.testing.assert_close(follows(batch_norm(out) if normed else out), want, rtol=1e-5, atol=1e-5)
    assert all(layer.kernel.trusted.values())


READERS = {
    "sum": lambda y: y + 1,
    "in place": lambda y: y.add_(1).mul_(y),
    "augmented": lambda y: y.__imul__(3),
    "mean": lambda y: y.mean((2, 3)),
    "index": lambda y: y[0, 1:3],
    "cat": lambda y: torch.cat([y, y], 1),
    "into": lambda y: torch.mul(y, 2, out=torch.empty(y.shape)),
    "clamped into": lambda y: torch.clamp(y, 0, out=torch.empty(y.shape)),
    "pool": lambda y: F.max_pool2d(y, 2),
    "pad": lambda y: F.pad(y, (1, 0, 0, 2)),
    "convolution": lambda y: F.conv2d(y, torch.ones(1, 10, 2, 2)),
    "numpy": lambda y: torch.from_numpy(y.numpy()),
    "list": lambda y: torch.tensor(y.tolist()),
    "copy": copy.deepcopy,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "clone": lambda y: y.clone().add_(1),
    "rounding": lambda y: y.to(torch.bfloat16).float(),
    "data": lambda y: y.data + y.detach(),
    "keyword": lambda y: torch.add(input=y, other=y),
    "iteration": lambda y: torch.stack(list(y)),
    "set": lambda y: y.index_fill_(1, torch.tensor([2]), 0.0),
    "script": torch.jit.script(nn.Sequential(nn.Tanh(), nn.Softplus())),
    "another norm": lambda y: F.batch_norm(
        F.batch_norm(y, torch.ones(10), torch.ones(10)), torch.ones(10), torch.ones(10)
    ),
    "statistics": lambda y: F.batch_norm(y, None, None, training=True),
    "clamp by tensors": lambda y: torch.clamp(y, torch.tensor(-0.5), torch.tensor(0.5)),
    "upside down": lambda y: torch.clamp(y, 1.0, -1.0),
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "twice clamped": lambda y: F.relu(F.hardtanh(y)),
    "curved, then clamped": lambda y: F.relu(F.silu(y)),
    "viewed, then in place": lambda y: (y.view(2, 10, 72), y.relu_())[0],
    "read, then in place": lambda y: (y + 1, F.relu(y, inplace=True), y)[2],
}


@torch.no_grad()
@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_it_reads_floats(layer, x, reader):
    want = READERS[reader](layer.simulate(x).contiguous())
    for _ in range(2):
        out = READERS[reader](layer(x))
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_its_shape_is_known_before_it_is_computed(layer, x):
    out, want = layer(x), layer.simulate(x)
    assert isinstance(out, torch.Tensor) and out._value is None
    assert (out.shape, out.ndim, out.dtype, out.device, len(out)) == (want.shape, 4, want.dtype, want.device, 2)
    assert out.size(1) == 10 and out.numel() == want.numel() and out.is_floating_point() and not out.requires_grad
    assert out.is_contiguous(memory_format=torch.channels_last) and out.stride() == out.value().stride()
    assert layer.kernel.patient  # nobody has read it


@torch.no_grad()
def test_codes_are_those_of_what_was_read_and_changed(layer, x):
    grid, out = GRIDS["8 bits"], layer(x)
    out.codes_on(grid)
    out.mul_(2)
    exact = grid.unsigned((2 * layer.simulate(x)).contiguous(memory_format=torch.channels_last))
    assert torch.equal(out.codes_on(grid), exact)


@torch.no_grad()
def test_an_answer_does_not_wait_where_the_first_one_was_read_as_it_is(layer, x):
    F.relu(layer(x)) + 1
    layer(x) + 1
    assert isinstance(layer(x), Pending)
    give_back(layer)
    run_on(layer, Int8Conv.of(layer))
    layer(x) + 1
    assert type(layer(x)) is torch.Tensor


@torch.no_grad()
def test_a_kernel_that_is_off_goes_one_step_after_the_other(layer, x, monkeypatch):
    want, finish = F.relu(layer.simulate(x)), Int8Conv.finish

    def off(self, codes, epilogue, grid=None):
        return finish(self, codes, epilogue._replace(high=0.5) if epilogue.activated else epilogue, grid)

    monkeypatch.setattr(Int8Conv, "finish", off)
    grid = GRIDS["8 bits"]
    assert torch.equal(F.relu(layer(x)), want)
    assert torch.equal(
        F.relu(layer(x)).codes_on(grid), grid.unsigned(want.contiguous(memory_format=torch.channels_last))
    )
    assert set(layer.kernel.trusted.values()) == {False}


def test_gradients_of_what_follows_are_those_of_floats(layer, x):
    batch_norm = norm(10).eval()
    with torch.no_grad():
        waiting = layer(x)
    for out in (layer(x), waiting):
        out = batch_norm(out)
        assert type(out) is torch.Tensor and out.requires_grad
        out.sum().backward()
        assert batch_norm.weight.grad is not None
    with torch.no_grad():
        layer.kernel.patient = True
        assert isinstance(batch_norm(layer(x)), Pending)


@torch.no_grad()
def test_other_precisions_do_not_wait(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        assert type(layer(x)) is torch.Tensor and layer(x).dtype == torch.bfloat16
    waiting = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert type(F.batch_norm(waiting, torch.zeros(10), torch.ones(10))) is torch.Tensor
    assert type(layer(x[0])) is torch.Tensor
    assert layer(x[:0]).shape == (0, 10, 9, 8)


def test_whoever_measures_it_lets_it_compute(layer, x, monkeypatch):
    finished, finish = [], Int8Conv.finish
    monkeypatch.setattr(Int8Conv, "finish", lambda *args: finished.append(args) or finish(*args))
    with torch.no_grad():
        kernel_latency._seconds(layer, x)
    assert len(finished) == 1


# ---------------------------------------------------------------- norms


@torch.no_grad()
def test_a_norm_that_trains_is_not_folded(layer, x):
    ours, theirs = norm(10).train(), nn.BatchNorm2d(10)
    theirs.load_state_dict(ours.state_dict())
    out, want = ours(layer(x)), theirs(layer.simulate(x))
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.running_mean.add_(1),
        lambda found: found.weight.mul_(2),
        lambda found: setattr(found, "eps", 0.5),
        lambda found: setattr(found, "running_var", torch.full((10,), 3.0)),
        lambda found: setattr(found.weight, "data", torch.ones(10)),
        lambda found: found.load_state_dict(norm(10).state_dict()),
        lambda found: setattr(found, "bias", None),
    ],
)
def test_a_norm_that_changes_is_folded_anew(layer, x, change):
    batch_norm = norm(10).eval()
    batch_norm(layer(x)).sum()
    change(batch_norm)
    torch.testing.assert_close(batch_norm(layer(x)), batch_norm(layer.simulate(x)), rtol=1e-5, atol=1e-5)


def test_a_norm_made_in_inference_mode_is_folded_every_time(layer, x):
    with torch.inference_mode():
        batch_norm = norm(10).eval()
        for _ in range(2):
            torch.testing.assert_close(batch_norm(layer(x)), batch_norm(layer.simulate(x)), rtol=1e-5, atol=1e-5)
            batch_norm.weight.mul_(2)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "activation",
    [lambda: nn.ReLU6(inplace=True), nn.ReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.Identity],
    ids=["relu6", "relu", "hardswish", "silu", "gelu", "none"],
)
@pytest.mark.parametrize("activations", ["int7", "uint4"])
def test_a_network_answers_as_simulated_and_leaves_nothing_behind(activation, activations):
    torch.manual_seed(0)
    net, ptq = quantized(Net(activation), activations=activations)
    want, state = predict(net, ptq), copy.deepcopy(net.state_dict())
    out = predict(net, ptq, KernelSwap(backend="torch"))
    assert type(out) is torch.Tensor
    assert (out - want).norm() < (0.02 if activations == "int7" else 0.1) * want.norm()
    assert torch.equal(predict(net, ptq), want)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    assert not any(isinstance(module, KernelLayer) for module in net.modules())


def test_the_table_says_what_was_taken_over():
    net, ptq = quantized(activations="int7")
    swap = KernelSwap(backend="torch")
    predict(net, ptq, swap)
    kernels = {row.layer: row.kernel for row in swap.table.rows}
    assert kernels["stem.0"] == "int8 conv (oneDNN) + BatchNorm + relu6 -> codes"
    assert kernels["block.3"] == "int8 conv (oneDNN) + BatchNorm + relu6 -> codes"
    assert kernels["block.7"] == "int8 conv (oneDNN) + BatchNorm"
    assert kernels["last"] == "int8 conv (oneDNN) + relu"
    assert kernels["head"] == "int8 (oneDNN)"
    assert "+ BatchNorm + relu6 -> codes" in str(swap.table)


def test_auto_measures_from_codes_to_floats():
    net, ptq = quantized()
    want, swap = predict(net, ptq), KernelSwap()
    assert near(predict(net, ptq, swap), want)
    assert {row.kernel.split(" +")[0] for row in swap.table.rows} <= {"int8 conv (oneDNN)", "int8 (oneDNN)", "float"}


class Turns(Net):
    """Takes another way in every call."""

    calls = 0

    def features(self, x):
        self.calls += 1
        conv, batch_norm, activation = self.stem
        if self.calls % 3 == 0:
            return self.last(conv(x).relu() + 1)
        x = conv(x) if self.calls % 3 == 1 else batch_norm(conv(x))
        return self.last(self.block(activation(x)) * x)


def test_a_forward_that_turns_is_right_whatever_it_did_before():
    net, ptq = quantized(Turns())
    net.calls = 0
    want = predict(net, ptq)
    net.calls = 0
    assert near(predict(net, ptq, KernelSwap(backend="torch")), want)
    net.calls = 0
    assert torch.equal(predict(net, ptq), want)


def test_hooks_see_floats_and_a_norm_that_a_user_calls_is_a_norm():
    net, _ = quantized()
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    places = [net.stem[0], net.stem[1], net.block, net.block[3], net.block[8]]
    swap = KernelSwap(backend="torch")
    for swapped in (False, True):
        if swapped:
            swap.swap(net)
        hooks = [
            place.register_forward_hook(lambda m, args, out, to=seen[swapped]: to.append(out.detach().clone()))
            for place in places
        ]
        with torch.inference_mode():
            for seed in range(2):
                net(images(seed))
            seen[swapped].append(net.stem[1](torch.ones(1, 8, 2, 2)))
        for hook in hooks:
            hook.remove()
    swap.give_back()
    assert all(near(out, want) for out, want in zip(seen[True], seen[False], strict=True))
    assert torch.equal(seen[True][-1], seen[False][-1])


def test_an_answer_outlives_the_swap():
    net, _ = quantized()
    with torch.inference_mode():
        want = net.features(images())
        swap = KernelSwap(backend="torch")
        swap.swap(net)
        out = net.features(images())
        swap.give_back()
        assert near(out, want)


def test_copies_pickles_and_state_dicts_of_a_swapped_network_are_simulated():
    net, ptq = quantized()
    want, state = predict(net, ptq), net.state_dict()
    swap = KernelSwap(backend="torch")
    swap.swap(net)
    with torch.inference_mode():
        net(images())
    swap.settle()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert not any(isinstance(module, KernelLayer) for module in other.modules())
        assert torch.equal(predict(other, ptq), want)
    assert list(net.state_dict()) == list(state)
    swap.give_back()
    assert torch.equal(predict(net, ptq), want)


def test_an_exception_in_the_middle_leaves_the_simulated_network():
    class Fails(L.Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2:
                raise KeyError("in the middle")

    net, ptq = quantized()
    want = predict(net, ptq)
    with pytest.raises(KeyError, match="in the middle"):
        predict(net, ptq, KernelSwap(backend="torch"), Fails())
    assert torch.equal(predict(net, ptq), want)


def test_a_kept_network_answers_the_same_in_threads_and_copies():
    net, ptq = quantized()
    want = predict(net, ptq)
    assert near(predict(net, ptq, KernelSwap(keep=True)), want)
    assert not [key for key, _ in net.stem[0].named_parameters() if "weight" in key]
    batches = [images(seed) for seed in range(16)]
    with torch.inference_mode():
        alone = [net(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(torch.inference_mode()(net), batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        with torch.inference_mode():
            assert all(torch.equal(other(batch), a) for batch, a in zip(batches, alone, strict=True))


def test_a_hundred_swaps_leave_no_trace():
    net, ptq = quantized()
    want, swap, resident = predict(net, ptq), KernelSwap(backend="torch"), []
    for _ in range(5):
        for _ in range(20):
            swap.swap(net)
            with torch.inference_mode():
                net(images(samples=2))
            swap.settle()
            swap.give_back()
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert torch.equal(predict(net, ptq), want)
    assert max(resident) < resident[0] + 4e6
    assert not [x for x in gc.get_objects() if type(x) is Pending]
