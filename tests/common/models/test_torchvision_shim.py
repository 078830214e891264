"""The door to torchvision."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from pneumofed.common.models import compute
from pneumofed.common.models.compute import import_torchvision


def test_models_and_transforms_work_beside_this_torch() -> None:
    torchvision = import_torchvision()
    assert torchvision is import_torchvision() is sys.modules["torchvision"]
    assert torchvision.transforms.functional.rgb_to_grayscale(torch.ones(3, 2, 2)).shape == (1, 2, 2)
    assert torchvision.models.get_model_weights("resnet18").DEFAULT.url.startswith("https://")


def test_nothing_is_declared_where_torchvision_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torchvision")
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    monkeypatch.setattr(compute, "_declare_operators", lambda: pytest.fail("declared"))
    assert import_torchvision() is module


@pytest.mark.parametrize("error", [ImportError("No module named 'torchvision'"), RuntimeError("something else")])
def test_any_other_failure_is_passed_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(type(error)) as caught:
        import_torchvision()
    assert caught.value is error
