"""torchvision's CUDA build imports beside a CPU torch, and only whoever imports it pays for that.

Each fact is about a fresh interpreter, so each test starts one.
"""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_starting_python_imports_no_torch():
    assert run("import sys; print([name for name in sys.modules if name.startswith('torch')])") == "['torchvision_cpu']"


def test_looking_for_torchvision_imports_no_torch():
    code = "import sys, importlib.util; print(importlib.util.find_spec('torchvision').name, 'torch' in sys.modules)"
    assert run(code) == "torchvision False"


@pytest.mark.parametrize("first", ["torchvision", "lightning", "timm"])
def test_torchvision_imports_whatever_came_first(first):
    assert run(f"import {first}, torchvision; print(torchvision.ops.nms.__name__)") == "nms"


def test_operator_without_a_kernel_raises_an_ordinary_error():
    code = """
import torch, torchvision
try:
    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
except RuntimeError as error:
    print(error)
else:
    print(torchvision.extension._has_ops())
"""
    printed = run(code)
    assert printed.startswith("Couldn't load custom C++ ops") or printed == "True"


def test_operators_that_load_are_left_alone():
    code = """
import torch, torchvision_cpu
torchvision_cpu.operators_load = lambda folder: True  # what a matching pair of builds answers
try:
    import torchvision
except RuntimeError as error:
    print(error)
print(torchvision_cpu.declarations)
"""
    assert run(code).endswith("None")


def test_a_declaration_made_by_the_script_itself_still_works():
    code = """
import torch, torchvision_cpu
own = torch.library.Library("torchvision", "DEF")
for name in torchvision_cpu.OPERATORS:
    own.define(f"{name}(Tensor x) -> Tensor")
import torchvision
print(torch.ops.torchvision.nms.default._schema)
"""
    assert run(code) == "torchvision::nms(Tensor x) -> Tensor"


def test_importing_twice_declares_once():
    assert run("import importlib, torchvision; importlib.reload(torchvision); print('fine')") == "fine"


def test_spawned_process_imports_torchvision(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "def work(queue):\n"
        "    import torchvision\n"
        "    queue.put('imported')\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=work, args=(queue,))\n"
        "    process.start()\n"
        "    print(queue.get(timeout=120))\n"
        "    process.join()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr


def test_other_imports_are_not_its_business():
    import torchvision_cpu

    assert torchvision_cpu.TorchvisionFinder().find_spec("torchvision.ops") is None
    assert torchvision_cpu.TorchvisionFinder().find_spec("torch") is None


def test_installing_twice_adds_one_finder():
    code = """
import sys, torchvision_cpu
torchvision_cpu.install()
print(sum(isinstance(finder, torchvision_cpu.TorchvisionFinder) for finder in sys.meta_path))
"""
    assert run(code) == "1"
