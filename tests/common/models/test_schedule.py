"""The learning rate over a run: the shapes of the schedules, and the mean rate of a round."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig, TrainingConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.recipe import plateau_factor, rate_of_round, refuse_plateau, schedule_factor

Schedule = Literal["constant", "cosine", "one_cycle", "plateau"]
SCHEDULES = st.sampled_from(["constant", "cosine", "one_cycle"])
VALUES = st.lists(st.integers(0, 40).map(lambda hundredths: hundredths / 100), max_size=30)


@given(SCHEDULES, st.floats(0, 1, exclude_max=True), st.floats(0, 1), st.floats(0, 1))
def test_schedule_stays_between_its_ends(name: Schedule, progress: float, warmup: float, final: float) -> None:
    cfg = TrainingConfig(schedule=name, warmup_fraction=warmup, final_factor=final)
    assert min(final, 1 / 25) - 1e-12 <= schedule_factor(cfg, progress) <= 1 + 1e-12


def test_one_cycle_has_the_shape_of_torch() -> None:
    cfg = TrainingConfig(schedule="one_cycle", warmup_fraction=0.25, final_factor=1e-2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    steps = 400
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps + 1, pct_start=0.25, final_div_factor=1 / (25 * 1e-2), cycle_momentum=False
    )
    for step in range(steps):
        assert math.isclose(
            oracle.get_last_lr()[0], schedule_factor(cfg, step / steps), abs_tol=2e-2
        )  # torch ends its warm-up one step early
        optimizer.step()
        oracle.step()


@given(SCHEDULES, st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_the_mean_rate_of_a_round_lies_between_its_least_and_greatest(
    name: Schedule, rounds: int, warmup: float, final: float
) -> None:
    training = TrainingConfig(schedule=name, warmup_fraction=warmup, final_factor=final)
    experiment = ExperimentConfig(rounds=rounds, training=training)
    for number in {1, (rounds + 1) // 2, rounds}:
        inside = [schedule_factor(training, (number - 1 + part / 500) / rounds) for part in range(501)]
        assert min(inside) - 1e-9 <= rate_of_round(experiment, number) <= max(inside) + 1e-9
        assert rate_of_round(experiment, number) > 0


def test_the_rate_falls_by_the_factor_of_fine_tuning_after_the_rounds_of_the_head() -> None:
    model = ModelConfig(head_first_rounds=2, fine_tune_factor=0.25)
    experiment = ExperimentConfig(rounds=4, model=model, training=TrainingConfig(schedule="constant"))
    assert [rate_of_round(experiment, number) for number in (1, 2, 3, 4)] == pytest.approx([1.0, 1.0, 0.25, 0.25])


def plateau(**rule: Any) -> TrainingConfig:
    return build_config(TrainingConfig, {"schedule": "plateau", "final_factor": 0.05, "plateau": rule})


@given(
    VALUES, st.sampled_from(["loss", "auroc"]), st.sampled_from([0.5, 0.1]), st.integers(0, 3), st.sampled_from([0.0, 0.015, 0.2])
)
def test_plateau_decides_as_torch_does_on_the_same_numbers(
    values: list[float], monitor: str, factor: float, patience: int, least: float
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    mode: Any = "min" if monitor == "loss" else "max"
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=factor, patience=patience, threshold=least, threshold_mode="abs", min_lr=0.05
    )
    cfg = plateau(monitor=monitor, factor=factor, patience_rounds=patience, min_delta=least)
    assert plateau_factor(cfg, []) == 1.0
    for number, value in enumerate(values, start=1):
        oracle.step(value)
        assert plateau_factor(cfg, values[:number]) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@given(VALUES, st.integers(0, 30), st.sampled_from([None, math.nan]))
def test_a_round_without_validation_changes_nothing(values: list[float], place: int, nothing: float | None) -> None:
    cfg = plateau(patience_rounds=1)
    assert plateau_factor(cfg, [*values[:place], nothing, *values[place:]]) == plateau_factor(cfg, values)


@given(SCHEDULES, VALUES)
def test_no_other_schedule_has_a_factor_of_validation(name: Schedule, values: list[float]) -> None:
    assert plateau_factor(TrainingConfig(schedule=name), values) == 1.0
    refuse_plateau(ExperimentConfig(training=TrainingConfig(schedule=name)), "this")


def test_what_trains_without_validation_refuses_it() -> None:
    with pytest.raises(ConfigError, match="validation statistics, and pretraining has none"):
        refuse_plateau(ExperimentConfig(training=plateau()), "pretraining")


def test_a_plateau_that_no_round_can_see_the_end_of_is_refused() -> None:
    """Round 1 sets the best; after `patience` + 1 that bring nothing, the next is the first with a lower rate."""
    cfg = plateau(patience_rounds=1)
    assert [plateau_factor(cfg, [0.5] * rounds) for rounds in range(4)] == [1.0, 1.0, 1.0, 0.5]  # before rounds 1 to 4
    values = {"rounds": 4, "training": {"schedule": "plateau", "plateau": {"patience_rounds": 1}}}
    assert build_config(ExperimentConfig, values).rounds == 4
    with pytest.raises(ConfigError, match="can fall after 3 validated rounds at the earliest, and 2 come before the last"):
        build_config(ExperimentConfig, {**values, "rounds": 3})
