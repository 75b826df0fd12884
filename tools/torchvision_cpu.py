"""Lets torchvision be imported beside a CPU build of torch.

The package index has no CPU build of torchvision. The build it does have carries compiled operators linked against
CUDA: beside a CPU torch they do not load, torchvision's own Python code then refers to operators nobody declared, and
`import torchvision` dies, taking timm, transformers, diffusers, torchmetrics and lightning with it. Declaring the names
is enough for the import; calling one of the operators still raises torchvision's own "Couldn't load custom C++ ops".

`make setup` copies this module into `.venv` next to a `torchvision_cpu.pth` that calls `install()` when Python starts.
Nothing is imported at that time: the work waits for the first import of torchvision.
"""

from __future__ import annotations

import sys

DIFFERENTIABLE = ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"]
OPERATORS = ["nms", "qnms", *DIFFERENTIABLE, *(f"_{name}_backward" for name in DIFFERENTIABLE)]

declarations = None  # torch forgets what a Library declared once the Library is collected, so it is kept here


def install() -> None:
    """Start waiting for the first import of torchvision."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


class TorchvisionFinder:
    """A finder of one name: the others find it, this one has the operators declared before the code runs.

    Only running the code triggers it: libraries that merely ask whether torchvision is there still import no torch.
    """

    def find_spec(self, name, path=None, target=None):  # noqa: ANN001, ANN201 (the signature is the import system's)
        """Return torchvision's spec with the declaration put before its code, and None for every other name."""
        if name != "torchvision":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.submodule_search_locations and spec.loader is not None:
            run_code, folder = spec.loader.exec_module, spec.submodule_search_locations[0]

            def declare_and_run(module):  # noqa: ANN001, ANN202
                if not operators_load(folder):
                    declare_operators()
                run_code(module)

            spec.loader.exec_module = declare_and_run
        return spec


def operators_load(folder: str) -> bool:
    """Whether the compiled operators in torchvision's folder load beside the torch that is installed."""
    from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder

    import torch

    library = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if library is None:
        return False
    try:
        torch.ops.load_library(library.origin)
    except (ImportError, OSError):
        return False
    return True


def declare_operators() -> None:
    """Declare those operators torchvision refers to that are not declared yet.

    The library is a FRAGMENT, where DEF would do too, so that a script that brings a declaration of its own still runs.
    """
    global declarations
    import torch

    declarations = declarations or torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            declarations.define(f"{name}(...) -> ...")  # never called, so the arguments do not matter
