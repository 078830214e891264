"""The learning rate over a run: the shapes of the schedules, and the mean rate of a round."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig, TrainingConfig
from pneumofed.common.models.schedule import rate_of_round, schedule_factor

Schedule = Literal["constant", "cosine", "one_cycle"]
SCHEDULES = st.sampled_from(["constant", "cosine", "one_cycle"])


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
