"""CalibrationSensitivity: the same sets give no spread, a planted channel shows, and the float model is left."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quant import CalibrationSensitivity, PostTrainingQuantization, QuantReport, SmoothQuant, TokenWindows
from lightning_quant.calibration.activation_statistics import ActivationStatistics
from tests.language import TOKENS, WORDS, llama, tokens

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def windows(ids):
    return DataLoader(TokenWindows(ids, TOKENS), batch_size=4)


def validate(model, *callbacks):
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **QUIET)
    (got,) = trainer.validate(model, windows(tokens()), verbose=False)
    return got


def planted():
    """A model in which one word has a loud channel."""
    model = llama(tied=False)
    model.net.table.weight.data[7, 5] = 100.0
    return model


def without(word):
    ids = tokens(40 * TOKENS)
    return ids.where(ids != word, torch.zeros_like(ids))


def with_many(word):
    ids = without(word)
    ids[::3] = word
    return ids


@pytest.mark.parametrize("method", [PostTrainingQuantization, SmoothQuant])
def test_the_same_samples_give_no_spread_and_the_weights_are_as_they_were(method):
    model = planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = validate(model)["perplexity"]
    study = CalibrationSensitivity(
        method("int8", "int8", attention=False, skip=["head"]),
        {"text/1": windows(without(7)), "text/2": windows(without(7))},
    )
    got = validate(model, study)
    assert got["perplexity"] == exact and got["calibration_sensitivity"] == study.sensitivity == study.spread() == 0
    assert study.overlap("text/2") == 1 and study.name == "perplexity"
    assert study.results[0].degradation == pytest.approx(study.results[0].value - exact)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_planted_channel_shows_in_static_activations_and_not_in_weights_alone():
    sets = {"text": windows(without(7)), "loud": windows(with_many(7))}
    static = CalibrationSensitivity(PostTrainingQuantization("int8", "int4", "minmax", False, skip=["head"]), sets)
    validate(planted(), static)
    weights = CalibrationSensitivity(PostTrainingQuantization("int4", None, attention=False), sets)
    validate(planted(), weights)
    assert static.sensitivity > 0 and static.gap("loud") != 0
    assert weights.sensitivity == 0 and weights.gap("loud") == 0
    reads = [result.statistics["net.layers.0.o"] for result in static.results]
    streams = [max(s.absmax for s in result.statistics.values()) for result in static.results]
    assert len(reads) == 2 and streams[1] != streams[0]


def test_a_set_that_cannot_calibrate_is_nan_and_not_left_out():
    broken = DataLoader([{"input_ids": torch.full((TOKENS,), WORDS - 1), "labels": torch.full((TOKENS,), -100)}])
    model = planted()
    model.net.table.weight.data[WORDS - 1] = float("nan")
    study = CalibrationSensitivity(
        PostTrainingQuantization("int8", "int8", attention=False),
        {"text": windows(without(WORDS - 1)), "broken": broken},
    )
    with pytest.warns(UserWarning, match="calibrating with broken failed"):
        validate(model, study)
    assert study.results[1].value != study.results[1].value


def test_the_report_tells_of_each_set(tmp_path):
    study = CalibrationSensitivity(
        PostTrainingQuantization(attention=False), {"text": windows(without(7)), "loud": windows(with_many(7))}
    )
    model = planted()
    validate(model, study)
    (section,) = study.report_sections(None, model)
    assert "loud" in str(section.body) and section.facts["sets"].keys() == {"text", "loud"}
    assert QuantReport  # contributes through the same protocol


def test_statistics_are_those_of_all_values_at_once():
    x = torch.randn(6, 50, 20) * torch.logspace(-1, 1, 20)
    x[:2, :, 4] += 30
    found = ActivationStatistics()
    for part in x.split([1, 3, 2]):
        found.add(part)
    flat = x.flatten().double()
    centred = flat - flat.mean()
    assert found.absmax == flat.abs().max() and found.absmean == pytest.approx(flat.abs().mean().item(), rel=1e-6)
    assert found.kurtosis == pytest.approx((centred**4).mean().item() / centred.square().mean().item() ** 2, rel=1e-6)
    assert found.outlier_share == pytest.approx((flat.abs() > 6).double().mean().item())
    assert found.outlier_channels == {c for c in range(20) if (x[..., c].abs().amax(1) > 6).double().mean() >= 0.25}
    for q in (0.5, 0.99, 0.999):
        exact = flat.abs().quantile(q).item()
        assert exact <= found.quantile(q) * 1.05 and found.quantile(q) <= exact * 1.06
    first = ActivationStatistics(skip_first=True)
    first.add(x)
    assert first.count == x[:, 1:].numel()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="two calibration sets"):
        CalibrationSensitivity(PostTrainingQuantization(), {"text": "train"})
    with pytest.raises(ValueError, match="neither 'min' nor 'max'"):
        CalibrationSensitivity(PostTrainingQuantization(), {"a": "train", "b": "val"}, mode="best")
