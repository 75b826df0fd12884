"""The rows of diffusion models: each can be built, its settings say how, samples are paired, the page shows them."""

import lightning as L
import pytest
import torch

import lightning_quant
from benchmarks import diffusion_samples
from benchmarks.accuracy_page import page
from benchmarks.diffusion_rows import BITS, NETS, DiffusionRow, diffusion_rows
from benchmarks.diffusion_samples import Digits, judged
from lightning_quant import PostTrainingQuantization
from tests.diffusion import pictures, sampler


def test_every_row_is_there_once_and_can_be_built():
    rows = diffusion_rows()
    assert len({row.name for row in rows}) == len(rows) >= 3 * 13 and {row.model for row in rows} == {*NETS}
    for row in {(row.method, row.bits): row for row in rows if row.method != "float"}.values():
        (built,) = row.callbacks()
        bits = ["".join(filter(str.isdigit, built.arguments[name])) for name in ("weights", "activations")]
        assert "W{}A{}".format(*bits) == row.bits in BITS and built.arguments["first_last"] == "int8"


def test_the_settings_are_code_that_makes_the_same_callbacks():
    for row in {row.method: row for row in diffusion_rows() if row.method != "float"}.values():
        code = row.settings.replace("intN", "int8").replace("_N'", "_8'")  # as the bits say
        (given,), again = row.callbacks(), eval(code, vars(lightning_quant))
        formats = {"weights", "activations"}
        assert {k: v for k, v in again.arguments.items() if k not in formats} == {
            k: v for k, v in given.arguments.items() if k not in formats
        }


def test_a_callback_that_is_not_there_has_no_rows(monkeypatch):
    monkeypatch.delattr(lightning_quant, "PostTrainingQuantization")
    assert {row.method for row in diffusion_rows()}.isdisjoint({"min-max", "nearest", "BRECQ"})
    assert {DiffusionRow(net, "float", "W32A32") for net in NETS} <= {*diffusion_rows()}


class Few(Digits):
    """Small images, which small nets can take."""

    def images(self, count=512):
        images = torch.randn(512, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        return images[:count], torch.arange(512)[:count] % 10


def test_samples_are_paired_with_those_of_the_float_model_which_are_drawn_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(diffusion_samples, "sampler", lambda net: made.append(net) or sampler())
    data, model = Few("small", 4), sampler(validation_samples=0)
    run = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    found = {}
    for bits in ("int8", "int4"):
        callback = PostTrainingQuantization(bits, bits, calibration_samples=16)
        trainer = L.Trainer(callbacks=[callback], enable_model_summary=False, **run)
        trainer.validate(model, pictures(), verbose=False)
        found[bits] = judged(trainer, model, data, tmp_path, frechet=False)
        callback.remove(model)
    assert made == ["small"] and found["int8"]["sqnr"] > found["int4"]["sqnr"] + 6
    exact = torch.load(tmp_path / f"small_{data.first}_4.pt")
    assert torch.equal(exact, model.sample(data.first + torch.arange(4)))
    signal, noise = float(exact.square().mean()), found["int8"]["mse"]
    assert found["int8"]["sqnr"] == pytest.approx(10 * torch.tensor(signal / noise).log10().item(), abs=0.01)


def test_frechet_distance_tells_other_samples_from_the_same(tmp_path):
    data = Few("small", 4)
    same, other = torch.rand(64, 1, 8, 8), torch.rand(64, 1, 8, 8) / 2
    assert diffusion_samples.frechet_distance(same, same, data) == pytest.approx(0, abs=1e-3)
    assert diffusion_samples.frechet_distance(other, same, data) > 0.01


def test_the_page_has_a_section_of_what_is_measured():
    entry = {"draw": 0, "noise_mse": 0.0213, "seconds": 60, "core_seconds": 50, "settings": "", "date": "2000-01-01",
             "versions": "torch"}  # fmt: skip
    measured = {"float": {"W32A32": [entry]}, "nearest": {"W4A8": [{**entry, "sqnr": 12.34, "mse": 0.1}]}}
    text = page({"unet_mnist": measured})
    assert "### unet_mnist\n\nThe float model's noise MSE is 0.0213." in text and "### dit_mnist" not in text
    assert "| nearest | – | 12.3 dB, 0.0213 | – |" in text and "Frechet distance to float" not in text
    measured["nearest"]["W4A8"][0]["frechet"] = 3.456
    assert "| Frechet distance to float samples |" in page({"unet_mnist": measured})
