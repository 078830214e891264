"""Local training: the batches, the schedule, the proximal pull, what is frozen, and that it repeats."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.client.federation.training import (
    PlainSteps,
    RoundPlan,
    _build_optimizer,
    build_setup,
    draw_batches,
    pull_toward,
    train_locally,
)
from pneumofed.common.config.experiment import TrainingConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.recipe import count_batches, gradient_weight
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.tiny import tiny_experiment

CPU = build_compute("cpu", "fp32", threads=1)


def tiny_data(images: int, seed: int = 0, size_px: int = 32) -> Dataset:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (images, size_px, size_px)).astype(np.uint8)
    names = tuple(str(number) for number in range(images))
    return Dataset(pixels, (np.arange(images) % 2).astype(np.int64), names, names, DataReport())


def train(rounds: int = 1, images: int = 20, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and statistics after `rounds` rounds from the same first weights."""
    experiment = tiny_experiment(rounds=4, **changes)
    model = build_model(experiment.model, experiment.task, seed=1)
    for number in range(1, rounds + 1):
        setup = build_setup(model, [images // 2, images - images // 2], RoundPlan(experiment, number, "site"), CPU)
        train_locally(setup, tiny_data(images), RoundPlan(experiment, number, "site"))
    return ArraysLayout.of(model).flatten(model)


def first_weights() -> np.ndarray:
    experiment = tiny_experiment()
    model = build_model(experiment.model, experiment.task, seed=1)
    return ArraysLayout.of(model).flatten(model)[0]


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 9))
def test_batches_hold_every_image_once_and_none_is_a_single_value(images: int, size: int, seed: int) -> None:
    batches = draw_batches(images, size, np.random.default_rng(seed))
    together = np.sort(np.concatenate(batches))
    if images == 1:
        assert together.tolist() == [0, 0]
        return
    assert together.tolist() == list(range(images))
    if size > 1:
        assert all(2 <= len(batch) <= size + 1 for batch in batches)


def test_a_round_repeats_bit_for_bit() -> None:
    for first, second in zip(train(rounds=2), train(rounds=2), strict=True):
        np.testing.assert_array_equal(first, second)


def test_another_seed_gives_other_weights() -> None:
    assert not np.array_equal(train()[0], train(seed=1)[0])


def test_mu_zero_is_fedavg_bit_for_bit() -> None:
    plain = train(rounds=2)
    zero = train(rounds=2, strategy={"name": "fedprox"}, training={"proximal_mu": 0})
    np.testing.assert_array_equal(plain[0], zero[0])


def test_a_larger_mu_stays_nearer_to_the_global_weights() -> None:
    start = first_weights()
    distances = [
        np.linalg.norm(
            train(training={"proximal_mu": mu, "optimizer": "sgd", "learning_rate": 0.05, "local_epochs": 4})[0] - start
        )
        for mu in (0.0, 1.0, 10.0)
    ]
    assert distances[0] > distances[1] > distances[2]


def test_the_pull_is_the_gradient_of_the_proximal_term() -> None:
    torch.manual_seed(0)
    start, anchor, mu = torch.randn(5), torch.randn(5), 0.3
    pulled, oracle = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer, reference = torch.optim.SGD([pulled], lr=0.1, momentum=0.9), torch.optim.SGD([oracle], lr=0.1, momentum=0.9)
    pull_toward(optimizer, [anchor], mu)
    for _ in range(5):
        for parameter, stepper in ((pulled, optimizer), (oracle, reference)):
            stepper.zero_grad()
            loss = (parameter**4).sum()
            if parameter is oracle:
                loss = loss + mu / 2 * ((parameter - anchor) ** 2).sum()
            loss.backward()
            stepper.step()
    torch.testing.assert_close(pulled, oracle)


def _bowl(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter**2).sum() / 10


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_under_a_scaled_loss_the_pull_is_as_strong_as_without(optimizer: str) -> None:
    """Half precision scales the loss by 65,536; what hooks add to the gradients must not be divided by that."""
    ends = []
    for dtype in (torch.float32, torch.float16):
        training = TrainingConfig(optimizer=optimizer, learning_rate=0.01, proximal_mu=5.0)  # type: ignore[arg-type]
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        stepper = _build_optimizer([parameter], training, 0.01)
        pull_toward(stepper, [torch.full((2,), 3.0)], 5.0)
        rule = PlainSteps(stepper, [parameter], training, Compute(torch.device("cpu"), dtype))
        for _ in range(3):
            stepper.zero_grad()
            rule.add_gradient(partial(_bowl, parameter), 1)
            rule.take_step()
        ends.append(parameter.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])
    assert (ends[0] != torch.tensor([1.0, -2.0])).all()


@given(st.integers(1, 300), st.integers(1, 64))
def test_the_coordinator_counts_the_batches_that_a_site_draws(images: int, size: int) -> None:
    assert count_batches(images, size) == len(draw_batches(images, size, np.random.default_rng(0)))


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(("momentum", "mu", "schedule"), [(0.0, 0.0, "constant"), (0.9, 0.0, "one_cycle"), (0.6, 3.0, "cosine")])
def test_the_gradient_weight_is_how_far_gradients_of_one_move_the_weights(
    number: int, momentum: float, mu: float, schedule: str, steps: int | None
) -> None:
    training = {"optimizer": "sgd", "momentum": momentum, "proximal_mu": mu, "schedule": schedule, "learning_rate": 0.1}
    changes = {
        "training": {**training, "weight_decay": 0.0, "local_epochs": 3, "local_steps": steps},
        "model": {"head_first_rounds": 1},
    }
    experiment = tiny_experiment(rounds=4, **changes)
    model, plan = build_model(experiment.model, experiment.task, seed=1), RoundPlan(experiment, number, "site")
    layout = ArraysLayout.of(model)
    for parameter in model.parameters():
        parameter.register_hook(torch.ones_like)
    before = layout.flatten(model)[0]
    train_locally(build_setup(model, [11, 10], plan, CPU), tiny_data(21), plan)
    moved = before - layout.flatten(model)[0]
    np.testing.assert_allclose(moved[moved != 0], gradient_weight(experiment, number, 21), rtol=1e-3, atol=1e-6)
    assert (moved != 0).any()


@given(st.integers(1, 90), st.integers(1, 12), st.integers(1, 40), st.integers(1, 3))
def test_local_steps_are_as_many_at_every_site_and_pass_over_its_images_evenly(
    images: int, size: int, steps: int, number: int
) -> None:
    experiment = tiny_experiment(rounds=3, training={"local_steps": steps, "batch_size": max(2, size)})
    rule = PlainSteps(None, [], experiment.training, CPU)  # type: ignore[arg-type]
    drawn = list(rule.draw(replace(tiny_data(1), labels=np.zeros(images, np.int64)), RoundPlan(experiment, number, "site")))
    assert len(drawn) == steps
    progress = [share for share, _ in drawn]
    assert progress == sorted(progress) and (number - 1) / 3 - 1e-9 <= progress[0] and progress[-1] < number / 3
    seen = np.bincount(np.concatenate([index for _, lots in drawn for index in lots]), minlength=images)
    assert seen.max() - seen.min() <= 1 or images == 1


def test_epsilon_lets_a_site_of_one_class_move_by_what_it_has_to_teach() -> None:
    """AdamW's steps are of full length however small the gradient; an epsilon above a one-class site's gradients ends that."""

    def moved(class_counts: list[int], epsilon: float) -> float:
        experiment = tiny_experiment(training={"adam_epsilon": epsilon, "weight_decay": 0.0})
        model, plan = build_model(experiment.model, experiment.task, seed=1), RoundPlan(experiment, 1, "site")
        start = ArraysLayout.of(model).flatten(model)[0]
        data = tiny_data(20)
        data = replace(data, labels=np.ones_like(data.labels)) if class_counts[0] == 0 else data
        train_locally(build_setup(model, class_counts, plan, CPU), data, plan)
        return float(np.linalg.norm(ArraysLayout.of(model).flatten(model)[0] - start))

    one, both = [0, 2000], [1000, 1000]
    assert moved(one, 1e-8) > 0.3 * moved(both, 1e-8)
    assert moved(one, 1e-3) < 0.1 * moved(both, 1e-3)


def test_frozen_layers_and_their_statistics_do_not_move() -> None:
    experiment = tiny_experiment(model={"freeze": "head_only"})
    model = build_model(experiment.model, experiment.task, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = RoundPlan(experiment, 1, "site")
    train_locally(build_setup(model, [10, 10], plan, CPU), tiny_data(20), plan)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert trainable


def test_fixed_statistics_stand_still_while_everything_is_trained() -> None:
    experiment = tiny_experiment(rounds=2, training={"batch_statistics_fraction": 0.5})
    model = build_model(experiment.model, experiment.task, seed=1)
    layout, moved = ArraysLayout.of(model), []
    for number in (1, 2):
        before = layout.flatten(model)
        plan = RoundPlan(experiment, number, "site")
        train_locally(build_setup(model, [10, 10], plan, CPU), tiny_data(20), plan)
        moved.append([not np.array_equal(old, new) for old, new in zip(before, layout.flatten(model), strict=True)])
    assert moved == [[True, True], [True, False]]


def test_early_rounds_see_smaller_images() -> None:
    experiment = tiny_experiment(rounds=2, image={"size_px": 64}, training={"early_fraction": 0.5})
    model = build_model(experiment.model, experiment.task, seed=1)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for number in (1, 2):
        plan = RoundPlan(experiment, number, "site")
        train_locally(build_setup(model, [4, 4], plan, CPU), tiny_data(8, size_px=64), plan)
    assert seen == [32, 64]


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from([32, 64, 128, 224]))
def test_the_last_round_is_at_full_size_and_sizes_never_fall(rounds: int, fraction: float, size_px: int) -> None:
    cfg = TrainingConfig(early_fraction=fraction)
    sizes = [cfg.size_in_round(number, rounds, size_px) for number in range(1, rounds + 1)]
    assert sizes[-1] == size_px
    assert sizes == sorted(sizes)
    assert sizes[0] >= 32


@pytest.mark.parametrize("images", [1, 2, 9])
def test_a_handful_of_images_is_enough_for_a_step(images: int) -> None:
    parameters, statistics = train(images=images, training={"batch_size": 8})
    assert np.isfinite(parameters).all()
    assert np.isfinite(statistics).all()


def test_gradient_clipping_bounds_a_step_of_sgd() -> None:
    start = first_weights()
    settings = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "batch_size": 20,
        "learning_rate": 1.0,
    }
    clipped = train(training={**settings, "max_grad_norm": 0.01})[0]
    assert np.linalg.norm(clipped - start) == pytest.approx(0.01, rel=1e-3)
