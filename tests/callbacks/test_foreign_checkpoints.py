"""Checkpoints that do not fit: from another plan, cut short, or with keys missing. The model stays what it was."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_quant import CalibrationMixin, PostTrainingQuantization, RepQViT, load_quantized, save_quantized
from tests.callbacks.unchanged import left_as_it_was, refused, scales
from tests.cases import is_float, ptq, quantized, repq
from tests.models import NoBias, Sequences, TinyTransformer, trainer, validate


class WithMixin(CalibrationMixin, NoBias):
    pass


class Attending(TinyTransformer):
    """torch's own attention, with more kinds of keys."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return super().forward(x + self.attention(x, x, x)[0])


def checkpoint(path, callback, build=NoBias):
    """A checkpoint of a calibrated model, whose float weights differ from those of a new one; and its metrics."""
    model, run = build(), trainer(callback)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    metrics = run.validate(model, datamodule=Sequences(), verbose=False)[0]
    run.save_checkpoint(path)
    return metrics


@functools.cache
def checkpoint_bytes(method):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder) / "q.ckpt", method())
        return (Path(folder) / "q.ckpt").read_bytes()


@pytest.fixture
def stored(method, tmp_path):
    """The path of a checkpoint that the method made."""
    path = tmp_path / "q.ckpt"
    path.write_bytes(checkpoint_bytes(method))
    return path


# ---------------------------------------------------------------- another plan

OTHER_PLANS = {
    "other bits": (lambda: ptq(weights="int8"), lambda: ptq(weights="int4"), "weights='int8'.*weights='int4'"),
    "other search": (lambda: ptq(), lambda: ptq(ranges="mse"), "ranges='minmax'.*ranges='mse'"),
    "other skip": (lambda: ptq(skip=["head"]), lambda: ptq(), r"skip=\['head'\].*skip=\[\]"),
    "other overrides": (
        lambda: ptq(),
        lambda: ptq(overrides={"head": "int4"}),
        "overrides={}.*overrides={'head': 'int4'}",
    ),
    "other method": (lambda: ptq(), lambda: repq(), r"quantized by PostTrainingQuantization\(.*has RepQViT\("),
    "other method 2": (lambda: repq(), lambda: ptq(), r"quantized by RepQViT\(.*has PostTrainingQuantization\("),
    "other target": (
        lambda: ptq(target="blocks.0"),
        lambda: ptq(target="blocks.1"),
        "target='blocks.0'.*target='blocks.1'",
    ),
    "one of two": (
        lambda: ptq(target="blocks.0"),
        lambda: [ptq(target="blocks.0"), ptq(target="blocks.1")],
        "target='blocks.0'.*target='blocks.1'",
    ),
}


@pytest.mark.parametrize(("made_by", "given", "words"), OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_a_checkpoint_from_another_plan_is_refused(made_by, given, words, tmp_path):
    checkpoint(tmp_path / "q.ckpt", made_by())
    model, callbacks = NoBias(), given()
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    for verb in ("test", "fit"):
        with refused(model, words):
            run = trainer(*callbacks, max_epochs=1)
            getattr(run, verb)(model, datamodule=Sequences(), ckpt_path=tmp_path / "q.ckpt")
        assert is_float(model)


def test_a_checkpoint_from_another_plan_leaves_a_calibrated_model_as_it_was(method, tmp_path):
    checkpoint(tmp_path / "q.ckpt", method(weights="int4"))
    model, callback = NoBias(), method()
    metrics = validate(model, callback)
    with refused(model, "weights='int4'", but=["record"]):
        validate(model, callback, ckpt_path=tmp_path / "q.ckpt")
    assert validate(model, callback) == metrics


def test_a_model_that_another_plan_quantized_is_refused():
    model = NoBias()
    metrics = validate(model, ptq())
    with refused(
        model, r"quantized already, by PostTrainingQuantization with .*'int8'.*remove\(model\) first", but=["record"]
    ):
        validate(model, ptq(weights="int4"))
    with refused(model, "`embed` is quantized already: call remove", but=["record"]):
        validate(model, repq())
    assert validate(model, ptq()) == metrics


def test_a_quantized_checkpoint_without_any_callback(method, stored):
    model = NoBias()
    with (
        left_as_it_was(model, but=["values"]),
        pytest.raises(  # torch itself loads what it knows before it complains
            RuntimeError, match=r"(?s)the callback that made it .*CalibrationMixin.*load_quantized"
        ),
    ):
        validate(model, ckpt_path=stored)
    assert is_float(model)


def test_a_float_checkpoint_with_the_callback_is_calibrated_after_loading(method, tmp_path):
    source, run = NoBias(), trainer()
    with torch.no_grad():
        source.head.weight.mul_(3)
    run.validate(source, datamodule=Sequences(), verbose=False)
    run.save_checkpoint(tmp_path / "float.ckpt")
    model = NoBias()
    with refused(model, "has not calibrated", RuntimeError, but=["values"]):
        trainer(method()).test(model, datamodule=Sequences(), ckpt_path=tmp_path / "float.ckpt")
    assert validate(NoBias(), method(), ckpt_path=tmp_path / "float.ckpt") == validate(source, method())


def test_a_checkpoint_of_another_architecture_is_refused(method, stored):
    class Shallow(NoBias):
        def __init__(self):
            super().__init__()
            del self.blocks[1]

    class Norm(NoBias):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(16, 3))

    for build, words in (
        (Shallow, r"names a layer `blocks\.1\.\w+`, which Shallow does not have"),
        (Norm, "quantizes `head`, but here it is a Sequential"),
    ):
        model = build()
        for load in (
            lambda model=model: validate(model, method(), ckpt_path=stored),
            lambda model=model: load_quantized(model, stored),
        ):
            with refused(model, words):
                load()
            assert is_float(model)


def test_a_checkpoint_for_a_model_that_cannot_be_swapped_is_refused(method, stored):
    model = NoBias()
    model.blocks[0].fc2.forward = model.blocks[0].fc2.forward
    with refused(model, r"`blocks\.0\.fc2`, but here it has a forward of its own on the instance"):
        validate(model, method(), ckpt_path=stored)


# ---------------------------------------------------------------- cut short


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short(method, share, stored):
    whole = stored.read_bytes()
    stored.write_bytes(whole[: int(share * len(whole))])
    for model, load in (
        (NoBias(), lambda model: validate(model, method(), ckpt_path=stored)),
        (NoBias(), lambda model: load_quantized(model, stored)),
        (WithMixin(), lambda model: type(model).load_from_checkpoint(stored)),
    ):
        with left_as_it_was(model), pytest.raises((RuntimeError, EOFError, OSError)):
            load(model)
        assert is_float(model)


@pytest.mark.parametrize("file", ["model.safetensors", "quantization.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, None])
def test_a_folder_with_a_file_cut_short(file, share, tmp_path):
    source = NoBias()
    validate(source, repq())
    save_quantized(source, tmp_path / "folder")
    path = tmp_path / "folder" / file
    whole = path.read_bytes()
    path.unlink() if share is None else path.write_bytes(whole[: int(share * len(whole))])
    model = NoBias()
    with refused(model, f"{file}|/folder", ValueError if share is not None else FileNotFoundError):
        load_quantized(model, tmp_path / "folder")
    assert is_float(model)


def lacking(path, *fragments):
    """Takes the keys that hold one of the fragments out of a checkpoint; returns them."""
    stored = torch.load(path, weights_only=True)
    gone = [key for key in stored["state_dict"] if any(fragment in key for fragment in fragments)]
    for key in gone:
        del stored["state_dict"][key]
    torch.save(stored, path)
    assert gone
    return gone


LACKING = {
    "a scale": ["blocks.0.fc1.weight_quantizer.scale"],
    "a zero point": ["blocks.1.proj.input_quantizer.zero_point"],
    "a quantizer": ["blocks.1.fc2.weight_quantizer"],
    "an input quantizer": ["blocks.1.qkv.input_quantizer"],
    "a flag": ["blocks.0.proj.folded"],
    "an operand": ["blocks.0.attention_quantizers.0.key_quantizer"],
    "a site": ["blocks.1.attention_quantizers"],
    "all of a layer": ["blocks.1.fc2."],
    "all quantizers": ["quantizer"],
    "a weight": ["blocks.0.fc2.weight"],
    "the end": ["blocks.1.", "head."],
}


@pytest.mark.parametrize("fragments", LACKING.values(), ids=LACKING)
def test_a_state_dict_that_lacks_keys_of_a_layer_is_refused_before_anything_is_changed(method, fragments, stored):
    lacking(stored, *fragments)
    for model, load in (
        (NoBias(), lambda model: validate(model, method(), ckpt_path=stored)),
        (NoBias(), lambda model: load_quantized(model, stored)),
        (WithMixin(), lambda model: model.load_state_dict(torch.load(stored)["state_dict"])),
    ):
        with refused(model, r"truncated: its plan \(\w+\) needs `(blocks|embed|head)[^`]*`, which it lacks \(\d+ keys"):
            load(model)
        assert is_float(model)


def test_a_truncated_checkpoint_leaves_a_calibrated_model_as_it_was(method, stored):
    lacking(stored, "blocks.1.fc2.weight_quantizer")
    model = NoBias()
    metrics = validate(model, method())
    found = scales(model)
    with refused(model, "truncated", but=["record"]):
        validate(model, method(), ckpt_path=stored)
    assert scales(model) == found and validate(model) == metrics


def test_a_truncated_checkpoint_of_another_structure_leaves_a_calibrated_model_as_it_was(method, tmp_path):
    """Quantizers, created biases and all: an optimizer may hold them."""
    checkpoint(tmp_path / "q.ckpt", method(skip=["head"], weights="int4"))
    model = NoBias()
    metrics = validate(model, method())
    model.blocks[0].fc2.forward = model.blocks[0].fc2.forward  # nothing could swap it now
    for fragments, words in (
        (["nothing"], "a forward of its own"),
        (["blocks.1.fc2.weight_quantizer"], "truncated|own"),
    ):
        if fragments != ["nothing"]:
            lacking(tmp_path / "q.ckpt", *fragments)
            del model.blocks[0].fc2.forward
        with refused(model, words, but=["record"]):
            load_quantized(model, tmp_path / "q.ckpt")
        assert validate(model, method()) == metrics


@pytest.mark.parametrize(
    "fragment",
    [
        "attention.in_proj_weight_quantizer",
        "attention.value_input_quantizer",
        "attention.attention_quantizers.value_quantizer",
        "attention.out_proj.input_quantizer.scale",
    ],
)
def test_a_truncated_multihead_attention_is_refused(fragment, tmp_path):
    want = checkpoint(tmp_path / "q.ckpt", ptq(), Attending)
    assert validate(Attending(), ptq(), ckpt_path=tmp_path / "q.ckpt") == want
    lacking(tmp_path / "q.ckpt", fragment)
    model = Attending()
    with refused(model, "truncated: .*`attention"):
        validate(model, ptq(), ckpt_path=tmp_path / "q.ckpt")


@pytest.mark.parametrize(
    "arguments",
    [
        {"activations": None},
        {"activations": "int8_token_dynamic"},
        {"attention": False},
        {"weights": None},
        {"weights": "fp8_e4m3"},
    ],
)
def test_what_a_plan_does_not_have_is_not_missed(arguments, tmp_path):
    want = checkpoint(tmp_path / "q.ckpt", ptq(**arguments), Attending)
    assert validate(Attending(), ptq(**arguments), ckpt_path=tmp_path / "q.ckpt") == want


def test_the_plan_itself_is_lost(method, stored):
    """Without its plan a quantized state dict looks like a float one with keys too many."""
    content = torch.load(stored, weights_only=True)
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if "lightning_quant" not in key}
    torch.save(content, stored)
    model = NoBias()
    with left_as_it_was(model, but=["values"]), pytest.raises(RuntimeError, match="Unexpected key"):
        validate(model, method(), ckpt_path=stored)
    with refused(model, "holds a float model|lost its plan"):
        load_quantized(model, stored)
    assert is_float(model)


@pytest.mark.parametrize("arguments", [{}, {"weights": "int4"}])
def test_the_plan_is_readable_and_plain(arguments, tmp_path):
    model = NoBias()
    validate(model, ptq(**arguments))
    save_quantized(model, tmp_path / "folder")
    (plan,) = json.loads((tmp_path / "folder" / "quantization.json").read_text())["plans"].values()
    assert plan["method"] == "PostTrainingQuantization" and plan["arguments"] == ptq(**arguments).arguments
    assert sorted(plan["layers"]) == sorted(quantized(model))


@pytest.mark.parametrize("callback", [PostTrainingQuantization, RepQViT])
def test_save_quantized_refuses_a_float_model(callback, tmp_path):
    model = NoBias()
    with refused(model, "NoBias is not quantized"):
        save_quantized(model, tmp_path / "folder")
    validate(model, callback())
    model.blocks[0].qkv.load_state_dict(NoBias().blocks[0].qkv.state_dict())
    with refused(model, r"`blocks\.0\.qkv.*` is not calibrated", but=["record"]):
        save_quantized(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
