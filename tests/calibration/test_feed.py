from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_quant.calibration import CalibrationBatches, check_feedable, feed, feeder_name, undisturbed
from tests.calibration.runs import Net, in_validate


class OnlyForward(pl.LightningModule):
    def forward(self, x):
        return "forward", x


class WithPredictStep(OnlyForward):
    def predict_step(self, batch, batch_idx):
        return "predict_step", batch, batch_idx


class WithCalibrationStep(WithPredictStep):
    def calibration_step(self, batch):
        return "calibration_step", batch


class Nothing(pl.LightningModule):
    pass


class TestPrecedence:
    def test_calibration_step_before_predict_step_before_forward(self):
        batch = (torch.ones(1), torch.zeros(1))
        assert feed(None, WithCalibrationStep(), batch) == ("calibration_step", batch)
        assert feed(None, WithPredictStep(), batch) == ("predict_step", batch, 0)
        assert feed(None, OnlyForward(), batch) == ("forward", batch[0])

    @pytest.mark.parametrize("module", [WithCalibrationStep, WithPredictStep, OnlyForward])
    def test_its_name(self, module):
        names = {WithCalibrationStep: "calibration_step", WithPredictStep: "predict_step", OnlyForward: "forward"}
        assert feeder_name(module()) == names[module]

    def test_a_module_with_nothing_to_call_is_told_apart_by_name(self):
        for call in (feeder_name, check_feedable, lambda module: feed(None, module, torch.ones(1))):
            with pytest.raises(TypeError, match=r"Nothing defines no forward.*define calibration_step\(self, batch\)"):
                call(Nothing())

    def test_dataloader_idx_is_passed_only_where_it_is_required(self):
        class Required(pl.LightningModule):
            def predict_step(self, batch, batch_idx, dataloader_idx):
                return batch_idx, dataloader_idx

        class Optional(pl.LightningModule):
            def predict_step(self, batch, batch_idx, dataloader_idx=7):
                return batch_idx, dataloader_idx

        assert feed(None, Required(), "batch") == (0, 0)
        assert feed(None, Optional(), "batch") == (0, 7)


class TestForwardArguments:
    def test_a_plain_module_and_its_hooks(self):
        layer, seen = nn.Linear(3, 2), []
        layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert feed(None, layer, torch.ones(5, 3)).shape == (5, 2)
        assert seen == [(5, 2)]

    @pytest.mark.parametrize("batch", [("first", 2), ["first", 2], ("first",)])
    def test_of_a_tuple_or_list_the_first_element(self, batch):
        assert feed(None, OnlyForward(), batch) == ("forward", "first")

    def test_a_dict_as_keywords_without_those_that_forward_does_not_take(self):
        class Model(nn.Module):
            def forward(self, ids, mask=None):
                return ids, mask

        assert feed(None, Model(), {"ids": 1, "mask": 2, "labels": 3}) == (1, 2)

    def test_a_dict_as_keywords_with_all_of_them_if_forward_takes_any(self):
        class Model(nn.Module):
            def forward(self, ids, **others):
                return ids, others

        assert feed(None, Model(), {"ids": 1, "labels": 3}) == (1, {"labels": 3})

    def test_keys_that_do_not_fit_are_named(self):
        class Model(nn.Module):
            def forward(self, ids, mask):
                pass

        with pytest.raises(TypeError, match=r"Model.forward\(ids, mask\).*\(ids, labels\).*'mask'.*calibration_step"):
            feed(None, Model(), {"ids": 1, "labels": 3})

    def test_no_key_that_fits_is_refused_though_forward_could_be_called(self):
        class Model(nn.Module):
            def forward(self, ids=None):
                pass

        with pytest.raises(TypeError, match="takes none of the keys"):
            feed(None, Model(), {"labels": 3})

    @pytest.mark.parametrize(
        ("batch", "described"),
        [("text", "a str"), ((), "an empty tuple"), ({1: 2}, "a dict whose keys"), (object(), "a object")],
    )
    def test_anything_else_is_refused(self, batch, described):
        with pytest.raises(TypeError, match=f"the batch is {described}.*calibration_step"):
            feed(None, OnlyForward(), batch)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16), ("32-true", torch.float32)]
)
def test_activations_have_the_precision_that_validation_has(precision, dtype):
    class Module(Net):
        def validation_step(self, batch, batch_idx):
            self.validated = self(batch[0]).dtype

    def calibrate(trainer, module):
        with undisturbed(module):
            return feed(trainer, module, next(iter(CalibrationBatches(trainer, module, samples=2))))

    module = Module()
    output = in_validate(calibrate, module, precision=precision)
    assert output.dtype == dtype == module.validated
    assert not output.is_inference()
