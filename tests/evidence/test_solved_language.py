"""The weights of a small language model are solved for at three bits: near the float one where rounding is not."""

import subprocess
import sys
import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import GPTQ, OSAQ, RSQ, CalibrationMixin, LoRC, PostTrainingQuantization
from lightning_quant.layers import QuantizedLayer
from tests.real import REPOSITORY, StoriesData, stories260k

pytestmark = pytest.mark.evidence

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
         "accelerator": "cpu"}  # fmt: skip
INT3 = "int3_asym_channel"


@pytest.fixture(scope="module")
def written():
    """Stories that the float model writes, 64 of 128 tokens: calibration data of its own kind."""
    torch.manual_seed(0)
    net = stories260k().net
    return net.generate(torch.ones(64, 1, dtype=torch.long), do_sample=True, max_new_tokens=127, pad_token_id=0)


def perplexity(callback, written, model=None, **options):
    model = stories260k() if model is None else model
    if callback is not None:
        callback.calibration_loader = DataLoader(written, batch_size=8)
    running = L.Trainer(callbacks=[] if callback is None else [callback], **QUIET, **options)
    return running.validate(model, datamodule=StoriesData(), verbose=False)[0]["perplexity"], model, running


def test_three_bits(assets, written, capsys):
    many = {"calibration_samples": 64, "ranges": "minmax"}
    rows = {
        "float": None,
        "nearest": PostTrainingQuantization(INT3, None, skip=["lm_head"], **many),
        "GPTQ": GPTQ(INT3, **many),
        "GPTQ, searched": GPTQ(INT3, calibration_samples=64),
        "RSQ": RSQ(INT3, calibration_samples=64),
        "OSAQ": OSAQ(INT3, **many),
        "OSAQ, nearest": OSAQ(INT3, solver="nearest", **many),
        "LoRC": LoRC(INT3, **many),
        "LoRC, hessian": LoRC(INT3, metric="hessian", **many),
    }
    found = {name: perplexity(callback, written)[0] for name, callback in rows.items()}
    with capsys.disabled():
        print("\n  stories260K, three bits per channel, perplexity: ", {k: round(v, 2) for k, v in found.items()})
    assert found["float"] == pytest.approx(3.548, abs=1e-3)
    assert found["GPTQ"] < 0.75 * found["nearest"] and found["GPTQ, searched"] < found["GPTQ"]
    assert found["OSAQ"] < 1.02 * found["GPTQ"] and found["OSAQ, nearest"] < 1.02 * found["nearest"]
    assert found["LoRC, hessian"] < found["LoRC"] < found["nearest"]


LOAD = """
import lightning as L, sys
from lightning_quant import GPTQ
from tests.real import StoriesData, stories260k
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(callbacks=[GPTQ("int3_asym_channel", calibration_samples=64)], accelerator="cpu", **quiet)
found = trainer.validate(stories260k(), datamodule=StoriesData(), ckpt_path=sys.argv[1], verbose=False)
print("perplexity", repr(found[0]["perplexity"]))
"""


def test_it_is_the_same_in_a_new_process_and_float_again_once_removed(assets, written, tmp_path):
    callback, start = GPTQ(INT3, calibration_samples=64), stories260k()
    found, model, running = perplexity(callback, written)
    running.save_checkpoint(tmp_path / "gptq.ckpt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "gptq.ckpt")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert f"perplexity {found!r}" in done.stdout, done.stderr[-2000:]

    assert model.net.lm_head.weight is model.net.model.embed_tokens.weight  # tied as before
    callback.remove(model)
    assert all(map(torch.equal, model.state_dict().values(), start.state_dict().values()))
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())


class SavesCodes(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_validation_epoch_start(self, trainer, pl_module):
        codes = {n: m.weight_quantizer.codes for n, m in pl_module.named_modules() if isinstance(m, QuantizedLayer)}
        torch.save(codes, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def test_two_ranks_find_the_codes_of_one(assets, written, tmp_path):
    for ranks in (1, 2):
        options = {"devices": 2, "strategy": "ddp_fork"} if ranks == 2 else {"devices": 1}
        model = stories260k()
        assert isinstance(model, CalibrationMixin)
        callback = GPTQ(INT3, calibration_samples=64, calibration_loader=DataLoader(written, batch_size=8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forking, and about validating on more than one device
            running = L.Trainer(callbacks=[callback, SavesCodes(tmp_path)], limit_val_batches=1, **QUIET, **options)
            running.validate(model, datamodule=StoriesData(), verbose=False)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(one) == 35
    for rank in two:
        assert all(torch.equal(one[name], rank[name]) for name in one)
