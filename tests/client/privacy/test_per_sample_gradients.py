"""Clipped sums against plain autograd, one unit at a time; the clipping bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pneumofed.client.privacy import layer_gradients
from pneumofed.client.privacy.per_sample_gradients import ClippedGradients
from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.build import build_model, set_trainable
from pneumofed.common.models.layers import StandardizedConv2d

NAMES: tuple[ModelName, ...] = get_args(ModelName)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "stride and odd padding": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(2, 1), bias=False),
    "1x1 with stride": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "no padding": lambda: nn.Conv2d(4, 6, 4),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 5, padding=2, groups=4, bias=False),
    "standardized": lambda: StandardizedConv2d(4, 6, 3, padding=1),
    "standardized depthwise": lambda: StandardizedConv2d(4, 8, 3, stride=2, groups=4),
    "group norm": lambda: _drawn_norm(nn.GroupNorm(2, 4)),
}


def _drawn_norm(norm: nn.GroupNorm) -> nn.GroupNorm:
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


class Chain(nn.Module):
    """A layer amid others, down to one number an image; the product makes gradients differ from position to position."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(1, 4, 3), layer
        self.head = nn.Linear(layer(torch.zeros(2, 4, 9, 9)).shape[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(torch.relu(self.first(x)))
        return self.head((hidden * hidden.roll(1, 3)).mean(dim=(2, 3)))


def losses(model: nn.Module, x: Tensor) -> Tensor:
    """float32 [N], one row's own each."""
    out = model(x)
    return nn.functional.softplus(out).sum(dim=1) + (out**2).sum(dim=1)


def loop(model: nn.Module, x: Tensor, views: int) -> tuple[Tensor, list[list[Tensor]]]:
    """The slow way: norms [units] and gradients of each unit's mean loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [list(torch.autograd.grad(losses(model, unit).mean(), parameters)) for unit in x.split(views)]
    return torch.stack([sum_of_squares(unit).sqrt() for unit in gradients]), gradients


def sum_of_squares(gradients: list[Tensor]) -> Tensor:
    return torch.stack([(gradient**2).sum() for gradient in gradients]).sum()


def assert_as_loop(model: nn.Module, x: Tensor, views: int, tolerance: float = 1e-4, units: int | None = None) -> None:
    """A factor may be smaller than the loop's by what the rounding of a sum can be, and not larger but for the loop's own rounding."""
    norms, gradients = loop(model, x, views)
    bound = float(norms.median())
    clipped = ClippedGradients(model, bound, views)
    model.zero_grad()
    factors = clipped.add(lambda: losses(model, x).sum() / views, units)
    wanted = (bound / norms).clamp_max(1.0)
    assert (factors <= wanted * (1 + 5e-6)).all()
    assert (factors >= wanted * (1 - tolerance)).all()
    for number, parameter in enumerate(clipped.parameters):
        expected = sum(factor * unit[number] for factor, unit in zip(wanted, gradients, strict=True))
        assert isinstance(expected, Tensor)
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() <= tolerance * expected.norm() + 1e-5 * bound


@pytest.fixture(params=["chosen by cost", "always ghost", "never ghost"])
def choice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "chosen by cost":
        monkeypatch.setattr(layer_gradients, "ROW_COST", 1e12 if request.param == "always ghost" else 0)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_clipped_sum_is_that_of_a_loop_over_units(name: str, memory_format: Any, views: int, choice: None) -> None:
    torch.manual_seed(0)
    model = Chain(LAYERS[name]()).to(memory_format=memory_format)  # type: ignore[call-overload]
    assert_as_loop(model, torch.randn(4 * views, 1, 11, 11), views)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "efficientnet_lite0", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("standardized", [False, True])
def test_a_network_of_the_registry_is_as_a_loop_over_units(name: str, standardized: bool) -> None:
    for network in NAMES if name == "all" else (name,):
        cfg = ModelConfig(name=network, norm="group", weight_standardization=standardized)  # type: ignore[arg-type]
        model = build_model(cfg, "binary", 0).eval()  # without dropout, whose draws a loop would not repeat
        assert_as_loop(model, torch.randn(6, 1, 40, 40, generator=torch.Generator().manual_seed(1)), views=2)


@pytest.mark.parametrize("freeze", ["head_only", "last_block"])
def test_frozen_layers_get_no_gradient_and_count_for_no_norm(freeze: Any) -> None:
    model = build_model(ModelConfig(name="small_cnn", norm="group"), "binary", 0)
    trained = set_trainable(model, freeze)
    assert_as_loop(model, torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1)), views=1)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(trained)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trained)


def total(clipped: ClippedGradients, model: nn.Module, x: Tensor, views: int, dtype: str) -> list[Tensor]:
    """The clipped sum over the units of `x`."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        clipped.add(lambda: losses(model, x).float().sum() / views)
    return [parameter.grad.clone() for parameter in clipped.parameters if parameter.grad is not None]


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 10), st.floats(1e-2, 1e4), st.integers(1, 3), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 99))
def test_one_unit_moves_the_sum_by_the_bound_at_most(bound: float, size: float, views: int, dtype: str, seed: int) -> None:
    """Alone, in bfloat16 too, where its own gradient is rounded before its norm is taken; and among others, whose bfloat16 values
    would depend on how many rows a kernel takes at once."""
    torch.manual_seed(seed)
    model = Chain(nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, padding=1), StandardizedConv2d(6, 6, 3)))
    clipped, x = ClippedGradients(model, bound, views), torch.randn(5 * views, 1, 11, 11) * size
    alone = total(clipped, model, x[:views], views, dtype)
    assert float(sum_of_squares(alone).sqrt()) <= bound * (1 + 1e-5)
    if dtype == "float32":
        pairs = zip(total(clipped, model, x, views, dtype), total(clipped, model, x[views:], views, dtype), strict=True)
        assert float(sum_of_squares([one - other for one, other in pairs]).sqrt()) <= bound * (1 + 1e-4)


def test_a_unit_whose_gradient_is_no_number_adds_nothing() -> None:
    torch.manual_seed(0)
    model, x = Chain(nn.Conv2d(4, 6, 3, padding=1)), torch.randn(4, 1, 11, 11)
    clipped = ClippedGradients(model, 1.0)
    clipped.add(lambda: losses(model, x[1:]).sum())
    expected = [parameter.grad.clone() for parameter in clipped.parameters if parameter.grad is not None]
    model.zero_grad()
    x[0] = float("inf")
    assert clipped.add(lambda: losses(model, x).sum())[0] == 0
    for parameter, gradient in zip(clipped.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_lots_add_up_to_one_batch() -> None:
    torch.manual_seed(0)
    model, x = Chain(nn.Conv2d(4, 6, 3)), torch.randn(6, 1, 11, 11)
    clipped, sums = ClippedGradients(model, 0.5), []
    for lots in ([x], [x[:2], x[2:3], x[3:]]):
        model.zero_grad()
        for lot in lots:
            clipped.add(lambda lot=lot: losses(model, lot).sum())  # type: ignore[misc]
        sums.append(torch.cat([parameter.grad.flatten() for parameter in clipped.parameters if parameter.grad is not None]))
    torch.testing.assert_close(sums[0], sums[1])


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, dilation=2), nn.PReLU()])
def test_a_layer_without_a_rule_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"^1: "):
        ClippedGradients(nn.Sequential(nn.Conv2d(1, 4, 3), layer), 1.0)
    layer.requires_grad_(False)
    ClippedGradients(nn.Sequential(nn.Conv2d(1, 4, 3), layer), 1.0)


def test_a_layer_that_runs_twice_or_is_frozen_in_part_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="twice"):
        ClippedGradients(nn.Sequential(layer, layer), 1.0).add(lambda: layer(layer(torch.ones(2, 3))).sum())
    layer.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="whole"):
        ClippedGradients(nn.Sequential(layer), 1.0)
