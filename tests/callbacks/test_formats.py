"""Formats that nothing could be quantized to are refused when the callback is made, by the name of the argument."""

import pytest

from lightning_quant import PostTrainingQuantization
from lightning_quant.callbacks.formats import Formats, activation_scheme, weight_scheme

WEIGHTS = {"symmetric": True, "granularity": "channel"}
ACTIVATIONS = {"symmetric": False, "granularity": "tensor"}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("int4", "int4_sym_channel"),
        ("int4_asym", "int4_asym_channel"),
        ("int4_tensor", "int4_sym_tensor"),
        ("int4_g128", "int4_sym_g128"),
        ("uint8", "uint8_sym_channel"),
        ("fp8_e4m3", "fp8_e4m3_channel"),
        ("fp4_e2m1_g16", "fp4_e2m1_g16"),
    ],
)
def test_weights(text, want):
    assert str(weight_scheme(text, WEIGHTS)) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("int8", "int8_asym_tensor"),
        ("int8_sym", "int8_sym_tensor"),
        ("int8_channel", "int8_asym_channel"),
        ("int8_token", "int8_asym_token_dynamic"),
        ("int8_g32_dynamic", "int8_asym_g32_dynamic"),
        ("fp8_e4m3", "fp8_e4m3_tensor"),
    ],
)
def test_activations(text, want):
    assert str(activation_scheme(text, ACTIVATIONS)) == want


UNKNOWN = ["int1", "int17", "fp8_e9", "fp8_e4m4", "integer", "int4_gx", "int4_sym_asym", "float16", "", "log3_4", 4]


@pytest.mark.parametrize("text", UNKNOWN)
@pytest.mark.parametrize("argument", ["weights", "activations", "first_last", "embeddings", "overrides"])
def test_no_format_at_all(argument, text):
    given = {"blocks.0.*": text} if argument == "overrides" else text
    name = r"overrides\['blocks\.0\.\*'\]" if argument == "overrides" else argument
    with pytest.raises(ValueError, match=rf'{name}: "{text}" is not a number format: .*valid examples'):
        PostTrainingQuantization(**{argument: given})


@pytest.mark.parametrize("text", ["int8_token", "int8_dynamic", "int4_g8_dynamic", "log2_4", "logsqrt2_4"])
def test_formats_that_weights_cannot_have(text):
    with pytest.raises(ValueError, match=rf"weights='{text}': weights have a static uniform or float format"):
        PostTrainingQuantization(weights=text)
    with pytest.raises(ValueError, match=rf"embeddings='{text}': weights have"):
        PostTrainingQuantization(weights="int8", embeddings=text, activations=None)
    with pytest.raises(ValueError, match=rf"overrides\['head'\]='{text}': weights have"):
        PostTrainingQuantization(weights="int8", overrides={"head": text}, activations=None)


@pytest.mark.parametrize("text", ["log2_4", "logsqrt2_8"])
def test_formats_that_activations_cannot_have(text):
    with pytest.raises(ValueError, match=rf"activations='{text}': a logarithmic format holds no negative numbers"):
        PostTrainingQuantization(activations=text)
    with pytest.raises(ValueError, match=rf"first_last='{text}': a logarithmic"):
        PostTrainingQuantization(weights=None, first_last=text)


@pytest.mark.parametrize("argument", ["activations", "first_last"])
def test_a_static_scale_per_group_of_activations(argument):
    """It would need a scale for every token."""
    with pytest.raises(ValueError, match=rf'{argument}: "int4_asym_g8".* use "int4_asym_g8_dynamic" for activations'):
        PostTrainingQuantization(**{argument: "int4_g8"})


def test_embeddings_are_weights():
    """A format that only weights can have is none that their inputs, token ids, would ever get."""
    PostTrainingQuantization(embeddings="int4_g8")
    PostTrainingQuantization(activations=None, overrides={"head": "int4_g8"}, first_last="int4_g8")


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match="weights and activations are both None"):
        PostTrainingQuantization(weights=None, activations=None)


def test_embeddings_without_weights():
    with pytest.raises(ValueError, match=r"embeddings='int8', but weights are None"):
        PostTrainingQuantization(weights=None, embeddings="int8")


def test_probabilities_follow_the_activations_unless_they_have_their_own():
    assert Formats("int8", "int8").probabilities is None
    assert Formats("int8", "int8", "logsqrt2_4").probabilities == "logsqrt2_4"
