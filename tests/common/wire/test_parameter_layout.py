"""Flat arrays: exact round trips, refusal of what does not fit, and names of positions."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import MessageError
from pneumofed.common.models.build import build_model, set_trainable
from pneumofed.common.wire.parameter_layout import ArraysLayout, TensorKind

NAMES: tuple[ModelName, ...] = get_args(ModelName)
KINDS: tuple[TensorKind, ...] = get_args(TensorKind)


def build_outline(name: ModelName, norm: Any = "batch") -> nn.Module:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return build_model(ModelConfig(name=name, norm=norm), "binary", 0)


def build_unset(name: ModelName = "small_cnn", norm: Any = "batch") -> nn.Module:
    """A network with memory for its weights but nothing sensible in it."""
    return build_outline(name, norm).to_empty(device="cpu")


def draw_arrays(layout: ArraysLayout, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.random(layout.parameter_count, dtype=np.float32), draw.random(layout.statistic_count, dtype=np.float32)


quick = settings(max_examples=25, deadline=None)
SMALL = build_unset()
LAYOUT = ArraysLayout.of(SMALL)


@pytest.mark.parametrize(("name", "norm"), [*((name, "batch") for name in NAMES), ("resnet18", "group"), ("small_cnn", "group")])
def test_arrays_come_back_bit_for_bit(name: ModelName, norm: Any) -> None:
    model: Any = build_unset(name, norm)
    model.to(memory_format=torch.channels_last)
    layout = ArraysLayout.of(model)
    arrays = draw_arrays(layout, 1)
    layout.load(model, *arrays)
    back = layout.flatten(model)
    assert all(np.array_equal(came, sent) for came, sent in zip(back, arrays, strict=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == layout.parameter_count
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (layout.statistic_count > 0) == has_batch_norm == (norm == "batch" and name != "scattering")


def test_arrays_hold_the_state_dict_in_its_order() -> None:
    model = build_model(ModelConfig(name="small_cnn"), "three_class", 5)
    parameters, statistics = ArraysLayout.of(model).flatten(model)
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    np.testing.assert_array_equal(parameters, expected.numpy())
    buffers = torch.cat([buffer.flatten() for buffer in model.buffers() if buffer.is_floating_point()])
    np.testing.assert_array_equal(statistics, buffers.numpy())


def test_not_finite_values_travel_too() -> None:
    parameters, statistics = draw_arrays(LAYOUT, 2)
    parameters[:3] = np.nan, np.inf, -0.0
    LAYOUT.load(SMALL, parameters, statistics)
    assert LAYOUT.flatten(SMALL)[0].tobytes() == parameters.tobytes()


def test_integer_buffers_stay_as_they_are() -> None:
    model = build_model(ModelConfig(name="small_cnn"), "binary", 0)
    counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    for number, counter in enumerate(counters):
        counter.fill_(number + 3)
    ArraysLayout.of(model).load(model, *draw_arrays(LAYOUT, 3))
    assert [int(counter) for counter in counters] == [3, 4, 5, 6]


def test_read_only_arrays_are_loaded_without_a_warning_and_not_shared() -> None:
    arrays = tuple(np.frombuffer(array.tobytes(), dtype=np.float32) for array in draw_arrays(LAYOUT, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LAYOUT.load(SMALL, *arrays)
    taken = LAYOUT.flatten(SMALL)[0]
    with torch.no_grad():
        next(SMALL.parameters()).add_(1.0)
    assert np.array_equal(taken, arrays[0])


@quick
@given(st.integers(-3, 3), st.integers(-3, 3), st.sampled_from(["float32", "float64", "float16"]))
def test_arrays_of_another_size_or_type_are_refused_and_change_nothing(more: int, few: int, dtype: str) -> None:
    LAYOUT.load(SMALL, *draw_arrays(LAYOUT, 5))
    before = LAYOUT.flatten(SMALL)[0]
    parameters = np.zeros(LAYOUT.parameter_count + more, dtype=dtype)
    statistics = np.zeros(LAYOUT.statistic_count + few, dtype=np.float32)
    if more == few == 0 and dtype == "float32":
        return
    with pytest.raises(MessageError, match="expected float32"):
        LAYOUT.load(SMALL, parameters, statistics)
    assert np.array_equal(LAYOUT.flatten(SMALL)[0], before)


def test_digest_tells_models_apart_and_not_what_is_frozen() -> None:
    models = [build_outline("resnet18", "group"), *(build_outline(name) for name in NAMES)]
    assert len({ArraysLayout.of(model).digest for model in models}) == len(models)
    frozen = build_unset()
    set_trainable(frozen, "head_only")
    assert ArraysLayout.of(frozen).digest == LAYOUT.digest


def test_another_model_is_refused() -> None:
    other = build_unset(norm="group")
    with pytest.raises(MessageError, match="layout"):
        LAYOUT.flatten(other)
    with pytest.raises(MessageError, match="layout"):
        LAYOUT.load(other, *draw_arrays(LAYOUT, 6))


@quick
@given(st.data())
def test_a_position_is_named_by_the_value_that_it_holds(data: st.DataObject) -> None:
    model = build_unset()
    kind = data.draw(st.sampled_from(KINDS))
    arrays = {"parameter": np.zeros(LAYOUT.parameter_count, "f"), "statistic": np.zeros(LAYOUT.statistic_count, "f")}
    position = data.draw(st.integers(0, len(arrays[kind]) - 1))
    arrays[kind][position] = 1.0
    LAYOUT.load(model, arrays["parameter"], arrays["statistic"])
    name, _, index = LAYOUT.name_at(kind, position).partition("[")
    marked = model.state_dict()[name]
    assert marked[tuple(int(part) for part in index.rstrip("]").split(","))] == 1.0
    assert marked.sum() == 1.0


@pytest.mark.parametrize("position", [-1, LAYOUT.statistic_count])
def test_a_position_outside_has_no_name(position: int) -> None:
    with pytest.raises(IndexError, match="expected 0 to"):
        LAYOUT.name_at("statistic", position)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "small_cnn"])
def test_norm_positions_are_those_of_the_batch_norm_layers(name: ModelName) -> None:
    model = build_unset(name)
    layout = ArraysLayout.of(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value, key in enumerate(("weight", "bias", "running_mean", "running_var"), 1):
                    module.state_dict()[key].fill_(value)
    parameters, statistics = layout.flatten(model)
    np.testing.assert_array_equal(layout.norm_parameters, np.flatnonzero(parameters))
    np.testing.assert_array_equal(layout.norm_statistics, np.flatnonzero(statistics))
    np.testing.assert_array_equal(layout.variances, np.flatnonzero(statistics == 4))


def test_a_model_without_batch_norm_has_no_norm_positions() -> None:
    layout = ArraysLayout.of(build_unset(norm="group"))
    assert layout.norm_parameters.size == layout.norm_statistics.size == layout.variances.size == layout.statistic_count == 0
