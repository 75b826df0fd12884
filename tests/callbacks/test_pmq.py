"""PMQ: fewer bits for patches, only while the callback is there."""

import pytest
import torch

from lightning_quant import PMQ
from tests.models import Sequences, TinyTransformer, trainer, validate

MILD = {"budget": "6bit", "weight_bits": [4, 6, 8]}


def test_patches_have_fewer_bits_while_the_callback_is_there():
    model = TinyTransformer()
    whole = validate(model, PMQ(**MILD, share=1.0))
    assert validate(model) == whole  # the layers' own bits
    model = TinyTransformer()
    callback = PMQ(**MILD, share=0.4)
    coarse = validate(model, callback)
    assert coarse != whole and validate(model) == whole and validate(model, callback) == coarse


def test_predictions_are_of_the_model_that_was_validated():
    model, callback = TinyTransformer(), PMQ(**MILD, share=0.4)
    running = trainer(callback)
    running.validate(model, datamodule=Sequences(), verbose=False)
    predicted = torch.cat(running.predict(model, datamodule=Sequences()))
    model.eval()
    x = Sequences().val.tensors[0]
    with torch.no_grad(), callback.as_deployed(model):
        want = torch.cat([model(batch) for batch in x.split(8)])
        assert torch.allclose(predicted, want, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(predicted, torch.cat([model(batch) for batch in x.split(8)]), atol=1e-5)


class Breaks(TinyTransformer):
    broken = False

    def predict_step(self, batch, batch_idx):
        if self.broken:
            raise RuntimeError("broken")
        return super().predict_step(batch, batch_idx)


def test_nothing_stays_behind_after_an_exception():
    model, callback = Breaks(), PMQ(**MILD, share=0.4)
    running = trainer(callback)
    running.validate(model, datamodule=Sequences(), verbose=False)
    model.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        running.predict(model, datamodule=Sequences())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("arguments", [{"share": 0.0}, {"share": 1.5}, {"fewer_bits": -1}, {"class_tokens": -1}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="share="):
        PMQ(**arguments)
