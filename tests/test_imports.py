"""`import lightning_quant` brings in nothing a user may not have, and little that `import lightning` has not."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = {"timm", "diffusers", "transformers", "triton", "jsonargparse", "accelerate", "sklearn"}
ONLY_WHEN_USED = {"torchvision", "matplotlib", "scipy"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_brings_in_nothing_optional_and_nothing_heavy():
    added = modules_after("import lightning_quant") - modules_after("import lightning")
    assert added & (OPTIONAL | ONLY_WHEN_USED) == set()


def test_import_works_without_the_optional_packages():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(OPTIONAL))
    assert "lightning_quant" in modules_after(f"import lightning, sys; {blocked}; import lightning_quant")
