"""What the report shows of a sampler: images that are what was sampled, and the curve."""

import base64
import io
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_quant import PostTrainingQuantization, QuantReport
from lightning_quant.reports import sample_sections
from tests.diffusion import pictures, sampler
from tests.models import TinyTransformer, trainer


@pytest.fixture
def module(tmp_path):
    module, report = sampler(validation_samples=6), QuantReport(tmp_path / "report")
    trainer(PostTrainingQuantization("int4", "int8"), report).validate(module, pictures(), verbose=False)
    module.report = report
    return module


def strips(page):
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", page)
    return [imread(io.BytesIO(base64.b64decode(image)), format="png")[..., :3] for image in encoded]


def test_the_images_are_those_of_the_first_batch(module):
    own, twin = module.judge.shown
    low, high = float(twin.min()), float(twin.max())
    shown = strips(sample_sections(module)[0].body)
    assert [strip.shape for strip in shown] == [(8, 4 * 8, 3)] * 3
    for strip, images in zip(shown, (twin, own), strict=False):
        wanted = np.concatenate([((image[0] - low) / (high - low)).clamp(0, 1).numpy() for image in images], 1)
        assert np.abs(strip[..., 0] - wanted).max() < 0.01
    redder = (own - twin)[:, 0].permute(1, 0, 2).flatten(1).numpy() > 0.03 * (high - low)
    assert redder.any() and (shown[2][..., 0] > shown[2][..., 2])[redder].all()


def test_the_curve_is_the_error_after_each_step(module):
    section = sample_sections(module)[0]
    assert len(section.facts["sqnr"]) == 4
    assert section.facts["sqnr"][-1] == section.scalars["samples/sqnr"]
    assert section.facts["sqnr"][0] > section.facts["sqnr"][-1]
    assert len(re.search(r'<polyline points="([^"]+)"', section.body)[1].split()) == 4
    assert len(section.figure().axes) == 4


def test_the_page_has_it(module):
    page = module.report.path.read_text()
    assert '<section id="samples">' in page and len(strips(page)) == 3
    facts = json.loads(module.report.path.with_suffix(".json").read_text())
    assert facts["samples"]["sqnr"] == sample_sections(module)[0].facts["sqnr"]


def test_other_models_have_no_samples_to_show():
    assert sample_sections(TinyTransformer()) == [] and sample_sections(sampler()) == []
