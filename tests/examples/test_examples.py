"""The examples run as a newcomer runs them, and their figures are sane."""

import csv
import importlib.util
import json
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


def test_demo_fits_a_screen_and_is_quiet():
    """With few epochs; the whole one takes half a minute and ends well above 90 %."""
    done = python("-c", "import demo, json; found = demo.main(epochs=10); print(json.dumps(found))", cwd=EXAMPLES)
    *shown, last = done.stdout.splitlines()
    assert done.stderr == ""
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


def test_timm_deit_with_real_weights_and_images(assets, tmp_path):
    with (assets / "imagenet600" / "labels.csv").open(newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["split"] == "evaluation"][:32]
    with tarfile.open(assets / "imagenet600" / "images.tar") as archive:
        for row in rows:
            folder = tmp_path / row["class_index"]
            folder.mkdir(exist_ok=True)
            (folder / Path(row["file"]).name).write_bytes(archive.extractfile(row["file"]).read())
    weights = assets / "deit_tiny" / "model.safetensors"
    found = load("timm_deit").main(["--weights", str(weights), "--images", str(tmp_path)])
    assert found["float"] >= 0.7 and 0.4 <= found["RepQ-ViT W4A4"] <= found["float"]


@pytest.fixture
def folder(tmp_path):
    """A copy of the examples as working directory."""
    for file in EXAMPLES.glob("digits.*"):
        shutil.copy(file, tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("digits", None)


def test_digits_yaml(folder, capsys, caplog):
    """Both commands of its first lines, with four epochs."""
    from lightning_quant.cli import main

    short = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main(["fit", "--config", "digits.yaml", "--trainer.max_epochs=4", *short])
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == "epoch=3-step=84.ckpt"
    capsys.readouterr()
    main(["validate", "--config", "digits.yaml", f"--ckpt_path={checkpoint}", *short])
    accuracy = float(re.search(r"accuracy\D+([0-9.]+)", capsys.readouterr().out)[1])
    assert 0.15 < accuracy < 1 and "RepQViT quantized 18 layers" in caplog.text


def test_digits_yaml_says_where_the_checkpoint_will_be():
    text = (EXAMPLES / "digits.yaml").read_text()
    epochs = int(re.search(r"max_epochs: (\d+)", text)[1])
    batches = -(-1297 // 64)
    assert f"checkpoints/epoch={epochs - 1}-step={epochs * batches}.ckpt" in text
