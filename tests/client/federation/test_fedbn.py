"""FedBN: the site's own norm layers outlive rounds and restarts, and nothing else is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pneumofed.client.federation.network import LocalNorms
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.errors import MessageError
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout

LAYOUT = ArraysLayout.of(build_model(ModelConfig(name="small_cnn"), "binary", seed=0))


def filled(value: float) -> ModelArrays:
    return ModelArrays(
        np.full(LAYOUT.parameter_count, value, dtype=np.float32), np.full(LAYOUT.statistic_count, value, dtype=np.float32)
    )


def test_own_norm_layers_replace_the_global_ones_and_all_else_is_global(tmp_path: Path) -> None:
    LocalNorms.of(str(tmp_path), "00000000000000a7", LAYOUT).keep(filled(1.0), 1)
    restored = LocalNorms.of(str(tmp_path), "00000000000000a7", LAYOUT).restore(filled(2.0), before_round=2)
    own = np.zeros(LAYOUT.parameter_count, dtype=bool)
    own[LAYOUT.norm_parameters] = True
    assert own.any()
    assert not own.all()
    np.testing.assert_array_equal(restored.parameters, np.where(own, 1.0, 2.0))
    np.testing.assert_array_equal(restored.statistics[LAYOUT.norm_statistics], 1.0)


def test_a_site_without_earlier_rounds_takes_the_global_ones(tmp_path: Path) -> None:
    norms = LocalNorms.of(str(tmp_path), "00000000000000a7", LAYOUT)
    norms.keep(filled(1.0), 3)
    assert norms.restore(filled(2.0), before_round=3).parameters.min() == 2.0
    assert LocalNorms.of(str(tmp_path), "00000000000000a8", LAYOUT).restore(filled(2.0), before_round=9).parameters.min() == 2.0


def test_a_resumed_run_does_not_see_the_rounds_it_repeats(tmp_path: Path) -> None:
    norms = LocalNorms.of(str(tmp_path), "00000000000000a7", LAYOUT)
    for number in (1, 2, 3):
        norms.keep(filled(float(number)), number)
    norms.keep(filled(20.0), 2)
    assert norms.restore(filled(0.0), before_round=9).parameters.max() == 20.0
    assert norms.restore(filled(0.0), before_round=2).parameters.max() == 1.0


@pytest.mark.parametrize("kept", [True, False])
def test_arrays_of_another_network_are_refused(tmp_path: Path, kept: bool) -> None:
    norms = LocalNorms.of(str(tmp_path), "00000000000000a7", LAYOUT)
    if kept:
        norms.keep(filled(1.0), 1)
    short = ModelArrays(np.zeros(3, np.float32), filled(2.0).statistics)
    with pytest.raises(MessageError, match="expected float32"):
        norms.restore(short, before_round=2)


def test_a_run_keeps_its_network(tmp_path: Path) -> None:
    other = ArraysLayout.of(build_model(ModelConfig(name="resnet18"), "binary", seed=0))
    LocalNorms.of(str(tmp_path), "00000000000000a7", LAYOUT).keep(filled(1.0), 1)
    arrays = ModelArrays(np.zeros(other.parameter_count, np.float32), np.zeros(other.statistic_count, np.float32))
    with pytest.raises(MessageError, match="a run keeps its network"):
        LocalNorms.of(str(tmp_path), "00000000000000a7", other).restore(arrays, before_round=2)
