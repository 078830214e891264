"""The door to torchvision, and optimizers that leave torch's compiler alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any, cast

import pytest
import torch

from pneumofed.common.models import compute
from pneumofed.common.models.compute import import_torchvision, without_compiler


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


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.AdamW, {"fused": True, "weight_decay": 0.01}), (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01})],
)
def test_an_optimizer_without_compiler_takes_the_same_steps(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """To the bit, with hooks before a step, gradients that are set to none, and a state that goes on elsewhere."""
    weights = []
    for kind in (optimizer, without_compiler(cast(Any, optimizer))):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        parameters, factory = list(model.parameters()), cast(Any, kind)
        steps = factory(parameters, lr=0.1, **options)
        assert isinstance(steps, optimizer)
        for number in range(6):
            if number == 3:
                state, steps = steps.state_dict(), factory(parameters, lr=0.5, **options)
                steps.load_state_dict(state)
                steps.register_step_pre_hook(pull)
            model(torch.ones(3, 5)).square().sum().backward()
            steps.step()
            assert all(one.requires_grad for one in parameters)
            steps.zero_grad(set_to_none=True)
            assert all(one.grad is None for one in parameters)
        weights.append(torch.cat([one.detach().flatten() for one in parameters]))
    assert torch.equal(*weights)


def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad.add_(0.1)


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_process_that_trains_imports_no_compiler() -> None:
    code = """
import sys, torch
from pneumofed.common.models.compute import import_torchvision, without_compiler, without_compiler
torchvision = import_torchvision()
model = torch.nn.Linear(3, 2)
for kind in (torch.optim.SGD, torch.optim.AdamW):
    optimizer = without_compiler(kind)(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print(*[name for name in ("torch._dynamo", "torch._dynamo.utils", "sympy") if name in sys.modules])
from torchvision.ops.roi_align import is_compile_supported
print(is_compile_supported("cpu"), "torch._dynamo" in sys.modules)
"""
    supported, imported = run_python(code)
    assert supported in ("True", "False")
    assert imported == "True", "the function that torchvision took is the compiler's own"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch._dynamo.utils", "pneumofed.common.models.layers"])
def test_the_compiler_is_whole_for_whoever_imports_it(first: str) -> None:
    """Before torchvision, after it, or, as a library of torchvision's might, in the midst of its import."""
    code = f"""
import importlib, sys
from pneumofed.common.models import compute
importlib.import_module({first!r})
compute.import_torchvision()
for name in [name for name in sys.modules if name.startswith("torch._dynamo")]:
    assert sys.modules[name].__file__, name
with compute._compiler_left_out():
    import torch._dynamo
import torch._dynamo.utils
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"] and torch._dynamo.utils.__file__
print(torch._dynamo.optimize.__name__, torch._dynamo.utils.counters is not None)
"""
    assert run_python(code) == ["optimize", "True"]
