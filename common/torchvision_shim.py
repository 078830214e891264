"""The one door to torchvision, which opens it also beside a build of torch that its C extension does not fit."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = (f"nms{_BOXES}", f"qnms{_BOXES}")
"""Schemas of `torchvision/csrc/ops/nms.cpp` and `ops/quantized/cpu/qnms_kernel.cpp`, which torchvision refers to."""

_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """The module `torchvision`, with `torchvision.models` and `torchvision.transforms` usable.

    The wheel's C extension is built against the CUDA build of torch. Beside a CPU-only torch it cannot be loaded, and the import
    stops at `operator torchvision::nms does not exist`. Then the schemas of the missing operators are declared, without a kernel,
    and the import is made again: models and transforms need none of these operators. Where torchvision loads normally nothing
    is declared. After the first call a plain `import torchvision` by another library works too.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: its import fails for another reason than the missing operators.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _libraries:
            raise
    _forget_torchvision()
    _declare_operators()
    return importlib.import_module("torchvision")


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    _libraries.append(library)  # the declarations end with the life of the object
