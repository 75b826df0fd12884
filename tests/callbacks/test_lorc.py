"""LoRC keeps the largest part of the error beside the weight, and gives everything back."""

import pytest
import torch

from lightning_quant import GPTQ, KernelSwap, LoRC, load_quantized, save_quantized
from lightning_quant.layers import QuantizedLayer, as_float
from lightning_quant.solvers import low_rank
from tests.callbacks.test_gptq import Dies, Killed, codes, validated
from tests.cases import is_float
from tests.models import Sequences, TinyTransformer, trainer

W3 = {"weights": "int3_channel", "calibration_samples": 64}


def outputs(model):
    with torch.no_grad():
        return model(Sequences().val.tensors[0])


def distance(model):
    return float((outputs(model) - outputs(TinyTransformer().eval())).square().mean())


def test_the_branch_is_that_of_the_error():
    model = validated(LoRC(**W3, rank=3, branch_bits=32))
    for name, found in codes(model).items():
        layer = model.get_submodule(name)
        rounded = layer.weight_quantizer.decode(found.int())
        up, down = low_rank(layer.weight.detach() - rounded, 3)
        torch.testing.assert_close(layer.quantized(), rounded + (up @ down).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["nearest", "gptq"])
def test_more_rank_is_nearer_to_float_and_full_rank_is_float(solver):
    found = [distance(validated(LoRC(**W3, solver=solver, rank=rank, branch_bits=32))) for rank in (1, 4, 16)]
    assert found == sorted(found, reverse=True) and found[-1] < 1e-9


def test_the_hessian_leaves_less_of_the_outputs_error():
    callbacks = [LoRC(**W3, rank=2, metric=metric) for metric in ("frobenius", "hessian")]
    for callback in callbacks:
        validated(callback)
    frobenius, hessian = (callback.solved["blocks.0.fc2"]["left"] for callback in callbacks)
    assert 0 < hessian < frobenius < 1


def test_its_bytes_are_those_of_the_formula():
    model = validated(LoRC(**W3, rank=2))
    branch = model.blocks[0].fc1.weight_low_rank
    assert branch.up.nbytes + branch.down.nbytes == 16 * 2 * (64 + 16) // 8


def test_the_float_twin_has_no_branch_and_it_goes_with_the_callback():
    callback, start = LoRC(**W3), TinyTransformer().eval()
    model = validated(callback)
    with as_float(model):
        assert torch.equal(outputs(model), outputs(start))
    callback.remove(model)
    assert is_float(model) and torch.equal(outputs(model), outputs(start))
    assert not any("low_rank" in name for name, _ in model.named_modules())


def test_checkpoints_bring_the_branch_back(tmp_path):
    callback = LoRC(**W3)
    model = TinyTransformer().eval()
    running = trainer(callback, default_root_dir=tmp_path)
    running.validate(model, datamodule=Sequences(shuffle=False), verbose=False)
    running.save_checkpoint(tmp_path / "lorc.ckpt")
    save_quantized(model, tmp_path / "folder")

    again = TinyTransformer().eval()
    trainer(LoRC(**W3)).validate(again, datamodule=Sequences(), ckpt_path=tmp_path / "lorc.ckpt", verbose=False)
    loaded = TinyTransformer().eval()
    load_quantized(loaded, tmp_path / "folder")
    for other in (again, loaded):
        assert torch.equal(outputs(other), outputs(model))
        assert other.blocks[0].fc1.weight_low_rank.up.dtype == torch.float16
    assert not torch.equal(outputs(model), outputs(validated(GPTQ(**W3))))


def test_a_killed_run_has_the_branches_of_its_finished_blocks(tmp_path):
    class Both(Dies, LoRC):
        pass

    exact = validated(LoRC(**W3))
    first = Both(**W3, state_dir=str(tmp_path))
    with pytest.raises(Killed):
        validated(first)
    second = Both(**W3, state_dir=str(tmp_path))
    second.at = None
    assert torch.equal(outputs(validated(second)), outputs(exact)) and len(second.did) == 4


def test_kernels_leave_it_simulated_and_it_is_not_packed():
    model = validated(LoRC("int8_channel", "int8", calibration_samples=64, attention=False))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    simulated = outputs(model)
    swap = KernelSwap()
    table = swap.swap(model)
    assert all(not row.kernel.startswith("int8") for row in table.rows) and len(table.rows) == len(layers)
    torch.testing.assert_close(outputs(model), simulated)
    swap.give_back()
    with pytest.raises(ValueError, match="low-rank branch cannot be packed"):
        KernelSwap(keep=True).swap(model)


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"metric": "l1"}, {"solver": "best"}, {"branch_bits": 8}])
def test_arguments_are_checked(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LoRC(**arguments)
