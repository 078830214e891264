"""The private rule in the one loop: its noise, its average, FedProx, and what it repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pneumofed.client.federation.training import RoundPlan, TrainingResult, train_locally
from pneumofed.client.privacy.dp_sgd import MovingAverage, PrivateOptimizer, PrivateRound, build_private_setup
from pneumofed.client.privacy.plan import SitePlan, count_units
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import build_compute
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.client.federation.test_training import tiny_data
from tests.tiny import tiny_experiment

CPU = build_compute("cpu", "fp32", threads=1)
KEY = bytes(32)
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 1.0}


def private_experiment(training: dict[str, Any] | None = None, **privacy: Any) -> Any:
    return tiny_experiment(
        rounds=4,
        model={"norm": "group"},
        loss={"logit_adjustment": False},
        training=training or {},
        privacy={"mechanism": "dp_sgd", "delta": 1e-3, "expected_batch_size": 5, "noise_multiplier": 1.0, **privacy},
    )


def still(experiment: Any) -> Any:
    """`experiment` without augmentation, whose draws depend on how rows are split into lots."""
    ranges = dict.fromkeys(("rotation_deg", "shift_fraction", "scale_fraction", "brightness", "contrast", "noise_std"), 0.0)
    return experiment.model_copy(update={"augmentation": experiment.augmentation.model_copy(update=ranges)})


def train(experiment: Any, data: Dataset, key: bytes = KEY, round_number: int = 1) -> tuple[np.ndarray, TrainingResult]:
    """How far one round from fixed first weights came, float32 [P], and what happened."""
    model = build_model(experiment.model, experiment.task, seed=1)
    layout = ArraysLayout.of(model)
    before = layout.flatten(model)[0]
    units = count_units(data.patients, experiment.privacy.unit)
    plan = SitePlan.of(experiment, units, len(set(data.patients)))
    private = PrivateRound.of(plan, data, key, secure=experiment.privacy.secure_noise)
    where = private.hide(RoundPlan(experiment, round_number, "site"))
    result = train_locally(build_private_setup(model, private, where, CPU), data, where)
    return layout.flatten(model)[0] - before, result


def test_a_round_repeats_bit_for_bit_under_its_key_and_not_under_another() -> None:
    data, experiment = tiny_data(20), private_experiment()
    one, same, other = train(experiment, data)[0], train(experiment, data)[0], train(experiment, data, bytes([1] * 32))[0]
    np.testing.assert_array_equal(one, same)
    assert np.abs(np.corrcoef(one, other)[0, 1]) < 0.5


def test_sums_that_differ_in_a_bit_share_no_noise() -> None:
    """As the same question gives under other kernels or another number of threads, under the same key of the round."""
    experiment = private_experiment(SGD, noise_multiplier=1.0)
    plan, steps = SitePlan.of(experiment, 20, 20), []
    for last_bit in (0.0, 0.0, 2.0**-23):
        model = torch.nn.Linear(300, 1, bias=False)
        private = PrivateRound(plan, KEY, 5.0)
        optimizer = PrivateOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), private, experiment.privacy)
        model.weight.data.zero_()
        model.weight.grad = torch.ones_like(model.weight)
        model.weight.grad[0, -1] += last_bit
        optimizer.step()
        steps.append(model.weight.detach().flatten())
    assert torch.equal(steps[0], steps[1])
    assert abs(float(torch.corrcoef(torch.stack(steps[1:]))[0, 1])) < 0.3


def test_secure_noise_repeats_nothing() -> None:
    data, experiment = tiny_data(20), private_experiment(secure_noise=True)
    assert not np.array_equal(train(experiment, data)[0], train(experiment, data)[0])


@pytest.mark.parametrize("secure", [False, True])
def test_a_step_moves_by_noise_of_the_planned_size(secure: bool) -> None:
    """Next to no gradient is left beneath the noise, so that the step is the noise over the expected units, 5."""
    settings = {"noise_multiplier": 50.0, "max_grad_norm": 0.01, "secure_noise": secure}
    moved, result = train(private_experiment(SGD, **settings), tiny_data(20))
    step = moved / np.sqrt(result.steps)
    assert step.std() == pytest.approx(50.0 * 0.01 / 5, rel=0.02)
    assert abs(step.mean()) < 5 * step.std() / len(step) ** 0.5


@pytest.mark.parametrize("views", [1, 3])
def test_without_noise_a_step_is_the_clipped_sum_over_the_expected_number(views: int) -> None:
    """The divisor is the plan's 8, however many were drawn, and no unit pulls farther than the bound."""
    settings = {"noise_multiplier": 1e-9, "max_grad_norm": 1e-3, "expected_batch_size": 8, "augmentation_multiplicity": views}
    moved, result = train(private_experiment(SGD, **settings), tiny_data(16))
    assert result.steps == 2
    drawn = result.images / views
    assert 0 < np.linalg.norm(moved) <= drawn * 1e-3 / 8 * 1.001


def test_one_patient_among_many_images_pulls_no_farther_than_the_bound() -> None:
    """Neighbours by one patient of nine images, under the same draws of the others: rate 1, no noise."""
    settings = {"noise_multiplier": 1e-9, "max_grad_norm": 1e-2, "expected_batch_size": 100}
    data = tiny_data(12)
    owners = ("a", "b", "c", *["z"] * 9)  # the last, so that it shifts no other unit's place
    crowded = Dataset(data.pixels, data.labels, owners, data.digests, data.report)
    experiment = still(private_experiment(SGD, **settings))
    with_patient, result = train(experiment, crowded)
    without, _ = train(experiment, crowded.subset([0, 1, 2]))
    assert (result.steps, result.images) == (1, 4)
    assert np.linalg.norm(4 * with_patient - 3 * without) <= 1e-2 * 1.001


def test_steps_without_any_unit_are_noise_too() -> None:
    """One unit of 40 is expected a step, so that a third of the 40 steps draws none."""
    settings = {"noise_multiplier": 50.0, "max_grad_norm": 0.01, "expected_batch_size": 1}
    moved, result = train(private_experiment(SGD, **settings), tiny_data(40))
    assert result.steps == 40
    assert moved.std() == pytest.approx(50.0 * 0.01 * 40**0.5, rel=0.02)


def test_lots_change_no_sum() -> None:
    data = tiny_data(20)
    quiet = {"noise_multiplier": 1e-9}  # noise is that of the very sum, whose last bits depend on the lots
    one, many = (train(still(private_experiment(SGD, physical_batch_size=size, **quiet)), data)[0] for size in (32, 3))
    np.testing.assert_allclose(one, many, atol=1e-3 * np.abs(one).max())


def test_fedprox_pulls_under_privacy() -> None:
    data = tiny_data(20)
    moved = [
        np.linalg.norm(train(private_experiment({**SGD, "learning_rate": 0.05, "local_epochs": 4, "proximal_mu": mu}), data)[0])
        for mu in (0.0, 5.0)
    ]
    assert moved[1] < 0.9 * moved[0]


def test_the_moving_average_is_the_weighted_mean_of_all_steps() -> None:
    parameter, decay = torch.nn.Parameter(torch.zeros(3)), 0.9
    average = MovingAverage([parameter], decay)
    seen: list[torch.Tensor] = []
    for _ in range(7):
        with torch.no_grad():
            parameter.copy_(torch.randn(3, generator=torch.Generator().manual_seed(len(seen))))
        average.include()
        seen.append(parameter.detach().clone())
    average.replace_weights()
    weights = torch.tensor([(1 - decay) * decay ** (6 - step) for step in range(7)]) / (1 - decay**7)
    torch.testing.assert_close(parameter.detach(), (weights[:, None] * torch.stack(seen)).sum(dim=0))


def test_the_average_travels_in_place_of_the_last_weights() -> None:
    data = tiny_data(20)
    last, averaged = train(private_experiment(SGD), data)[0], train(private_experiment(SGD, ema_decay=0.9), data)[0]
    assert 0 < np.linalg.norm(averaged) < np.linalg.norm(last)


def test_frozen_parts_stay_and_get_no_noise() -> None:
    experiment = private_experiment()
    experiment = experiment.model_copy(update={"model": experiment.model.model_copy(update={"freeze": "head_only"})})
    moved, _ = train(experiment, tiny_data(20))
    head = sum(parameter.numel() for parameter in build_model(experiment.model, "binary", 0).get_submodule("head").parameters())
    assert np.count_nonzero(moved) == head


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"norm": "batch"}}, "model.norm to 'group'"),
        ({"strategy": {"name": "fedbn"}, "model": {"norm": "batch"}}, "another strategy"),
        ({"loss": {"logit_adjustment": True}}, "loss.logit_adjustment to false"),
        ({"loss": {"logit_adjustment": False, "class_weights": "balanced"}}, "loss.class_weights to 'none'"),
        ({"training": {"max_grad_norm": 1.0}}, "privacy.max_grad_norm"),
        ({"training": {"precision": "fp16"}}, "bf16"),
    ],
)
def test_what_would_go_around_the_mechanism_is_refused_with_what_to_set(changes: dict[str, Any], said: str) -> None:
    base: dict[str, Any] = {"model": {"norm": "group"}, "loss": {"logit_adjustment": False}}
    with pytest.raises(ConfigError, match=said):
        tiny_experiment(**{**base, **changes}, privacy={"mechanism": "dp_sgd"})
    tiny_experiment(**{**base, **changes})
