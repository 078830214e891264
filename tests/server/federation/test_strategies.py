"""The strategies against their definitions, and their memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.config.choices import ROBUST, StrategyName
from pneumofed.common.config.experiment import StrategyConfig
from pneumofed.common.config.reader import load_experiment
from pneumofed.common.models.kept_model import moving_average
from pneumofed.common.wire.messages import ModelArrays, Update, pack_arrays
from pneumofed.server.federation.round_choices import draw_sites
from pneumofed.server.federation.strategies import (
    SiteStrategy,
    aggregate,
    build_strategy,
    restore_state,
    strategy_state,
)
from tests.server.federation.updates import small_update, take_identity

ALL: list[StrategyName] = [
    "fedavg",
    "fedprox",
    "fedbn",
    "fedavgm",
    "fedexp",
    "fedadam",
    "fedyogi",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "fednova",
    "scaffold",
    "feddyn",
]
OPTIMIZERS: list[StrategyName] = ["fedavgm", "fedadam", "fedyogi"]
REMEMBERING: list[StrategyName] = [*OPTIMIZERS, "scaffold", "feddyn"]
START = ModelArrays(np.array([1.0, -1.0], np.float32), np.array([1.0], np.float32))
VALUES = [(1.1, -1.2), (1.3, -0.9), (0.8, -1.1), (1.2, -1.0), (0.9, -0.7)]


@pytest.fixture(autouse=True)
def _identity() -> None:
    take_identity()


def updates(values: Sequence[Sequence[float]] = VALUES, counts: Sequence[int] = (10, 20, 30, 5, 15)) -> list[Update]:
    return [
        small_update(f"site-{i}", value, [1.0 + i], count) for i, (value, count) in enumerate(zip(values, counts, strict=False))
    ]


def step(strategy: SiteStrategy, given_updates: Sequence[Update], start: ModelArrays = START, number: int = 1) -> ModelArrays:
    strategy.configure_train(number, pack_arrays(start), ConfigRecord(), None)  # type: ignore[arg-type]
    return aggregate(strategy, number, given_updates)


def of_rows(values: np.ndarray) -> list[Update]:
    return updates(values.tolist(), [10] * len(values))


def weighted_mean(given_updates: Sequence[Update]) -> np.ndarray:
    return np.average([u.arrays.parameters for u in given_updates], axis=0, weights=[u.num_examples for u in given_updates])


def test_the_moving_average_forgets_as_its_decay_says() -> None:
    rounds = [ModelArrays(np.array([value], np.float32), np.array([-value], np.float32)) for value in (1.0, 3.0, 5.0)]
    average = None
    for arrays in rounds:
        average = moving_average(average, arrays, 0.5)
    assert average is not None and average.parameters.dtype == np.float32
    assert average.parameters == 0.5 * (0.5 * 1.0 + 0.5 * 3.0) + 0.5 * 5.0 == -average.statistics
    assert moving_average(rounds[0], rounds[1], 0.0) is rounds[1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("order", [(4, 2, 0, 3, 1), (1, 0, 2, 4, 3)])
def test_the_order_of_replies_does_not_matter(name: StrategyName, order: Sequence[int]) -> None:
    given_updates = updates()
    straight = step(build_strategy(StrategyConfig(name=name)), given_updates)
    mixed = step(build_strategy(StrategyConfig(name=name)), [given_updates[i] for i in order])
    np.testing.assert_array_equal(straight.parameters, mixed.parameters)
    np.testing.assert_array_equal(straight.statistics, mixed.statistics)


@pytest.mark.parametrize("name", ALL)
def test_arrays_stay_float32_and_statistics_stay_within_those_of_the_sites(name: StrategyName) -> None:
    result = step(build_strategy(StrategyConfig(name=name)), updates())
    assert result.parameters.dtype == result.statistics.dtype == np.float32
    assert 1.0 <= result.statistics[0] <= 5.0


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedbn"])
def test_fedavg_is_the_mean_weighted_by_images(name: StrategyName) -> None:
    given_updates = updates()
    np.testing.assert_allclose(
        step(build_strategy(StrategyConfig(name=name)), given_updates).parameters, weighted_mean(given_updates), rtol=1e-6
    )


def test_one_site_alone_gets_its_own_weights_back() -> None:
    alone = updates()[:1]
    for name in ("fedavg", "fedmedian", "fedtrimmedavg"):
        np.testing.assert_allclose(
            step(build_strategy(StrategyConfig(name=name)), alone).parameters, alone[0].arrays.parameters, rtol=1e-6
        )


def test_fedavgm_without_momentum_is_fedavg() -> None:
    plain = step(build_strategy(StrategyConfig(name="fedavg")), updates())
    momentum = step(build_strategy(StrategyConfig(name="fedavgm", server_momentum=0.0)), updates())
    np.testing.assert_allclose(momentum.parameters, plain.parameters, rtol=1e-6)


def test_fedadam_takes_the_step_of_its_paper() -> None:
    cfg = StrategyConfig(name="fedadam", server_learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    delta = weighted_mean(updates()) - START.parameters
    first, second = 0.1 * delta, 0.01 * delta**2
    rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    expected = START.parameters + rate * first / (np.sqrt(second) + 1e-3)
    np.testing.assert_allclose(step(build_strategy(cfg), updates()).parameters, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_server_optimizers_average_statistics_by_images(name: StrategyName) -> None:
    given_updates = updates()
    mean = np.average([u.arrays.statistics for u in given_updates], axis=0, weights=[u.num_examples for u in given_updates])
    np.testing.assert_allclose(step(build_strategy(StrategyConfig(name=name)), given_updates).statistics, mean, rtol=1e-6)


def test_median_and_trimmed_mean_are_those_of_the_coordinates() -> None:
    values = np.array(VALUES, dtype=np.float32)
    median = step(build_strategy(StrategyConfig(name="fedmedian")), updates())
    np.testing.assert_allclose(median.parameters, np.median(values, axis=0), rtol=1e-6)
    trimmed = step(build_strategy(StrategyConfig(name="fedtrimmedavg", trim_fraction=0.2)), updates())
    np.testing.assert_allclose(trimmed.parameters, np.sort(values, axis=0)[1:-1].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("replies", [7, 8, 9, 10])
def test_two_hostile_sites_move_no_weight_of_the_trimmed_mean_beyond_the_honest_ones_however_many_reply(replies: int) -> None:
    cfg = load_experiment("configs/hostile.yaml", {}).strategy
    assert replies >= cfg.replies_needed
    honest = np.random.default_rng(replies).normal(size=(replies - 2, len(START.parameters))).astype(np.float32)
    values = np.concatenate([honest, np.full_like(honest[:2], -1e3)])
    found = step(build_strategy(cfg), of_rows(values)).parameters
    assert np.all((honest.min(axis=0) <= found) & (found <= honest.max(axis=0)))


@pytest.mark.parametrize(("replies", "fraction"), [(3, 0.2), (4, 0.4), (6, 0.4)])
def test_of_few_replies_the_trimmed_mean_is_the_median(replies: int, fraction: float) -> None:
    values = np.random.default_rng(1).normal(size=(replies, len(START.parameters))).astype(np.float32)
    found = step(
        build_strategy(StrategyConfig(name="fedtrimmedavg", trim_fraction=fraction)),
        of_rows(values),
    )
    np.testing.assert_allclose(found.parameters, np.median(values, axis=0), rtol=1e-6)


@given(st.integers(0, 4), st.floats(50, 1e4))
def test_krum_takes_one_of_the_honest_updates(hostile: int, distance: float) -> None:
    take_identity()
    values = [list(value) for value in VALUES]
    values[hostile] = [distance, -distance]
    result = step(build_strategy(StrategyConfig(name="krum", malicious_sites=1)), updates(values))
    honest = [value for number, value in enumerate(values) if number != hostile]
    assert min(np.abs(np.array(honest) - result.parameters).max(axis=1)) < 1e-5


@given(st.integers(0, 5), st.floats(50, 1e4))
def test_multi_krum_is_the_plain_mean_of_honest_updates_whatever_the_counts(hostile: int, distance: float) -> None:
    take_identity()
    values = [*map(list, VALUES), [0.5, 0.5]]
    values[hostile] = [distance, -distance]
    counts = [1, 2, 3, 4, 5, 6]
    counts[hostile] = 10**6
    result = step(build_strategy(StrategyConfig(name="multikrum", malicious_sites=1)), updates(values, counts=tuple(counts)))
    honest = np.array([value for number, value in enumerate(values) if number != hostile])
    means = [np.mean(chosen, axis=0) for chosen in itertools.combinations(honest, 3)]
    assert min(np.abs(np.array(means) - result.parameters).max(axis=1)) < 1e-3


def test_krum_tells_near_points_apart_far_from_the_origin() -> None:
    far = ModelArrays(np.full(2, 3000.0, np.float32), START.statistics)
    values = [(3000.0, 3000.0), (3000.01, 3000.0), (3000.0, 3000.01), (3000.5, 2999.5), (2999.5, 3000.5)]
    result = step(build_strategy(StrategyConfig(name="krum", malicious_sites=1)), updates(values), far)
    assert np.abs(result.parameters - 3000.0).max() < 0.02


@pytest.mark.parametrize("name", ROBUST)
def test_robust_strategies_stay_near_the_honest_sites(name: StrategyName) -> None:
    values = [*VALUES[:4], (1e4, 1e4)]
    result = step(build_strategy(StrategyConfig(name=name, malicious_sites=1)), updates(values))
    assert np.abs(result.parameters - np.mean(VALUES[:4], axis=0)).max() < 1.0


def test_fedavgm_under_a_falling_rate_takes_the_steps_of_sgd_with_momentum() -> None:
    rates, gradients = {1: 1.0, 2: 0.5, 3: 0.5, 4: 0.01}, np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    strategy = build_strategy(StrategyConfig(name="fedavgm", server_momentum=0.6), rates.__getitem__)
    parameter, now = torch.nn.Parameter(torch.tensor(START.parameters)), START
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.6)
    for number, gradient in enumerate(gradients, 1):
        now = step(strategy, updates([now.parameters - rates[number] * gradient]), now, number)
        optimizer.param_groups[0]["lr"], parameter.grad = rates[number], torch.tensor(gradient)
        optimizer.step()
        np.testing.assert_allclose(now.parameters, parameter.detach().numpy(), rtol=1e-5)


def test_fedexp_is_fedavg_where_sites_agree_and_goes_further_where_they_do_not() -> None:
    agreeing = updates([(1.1, -1.2)] * 3)
    np.testing.assert_array_equal(
        step(build_strategy(StrategyConfig(name="fedexp")), agreeing).parameters,
        step(build_strategy(StrategyConfig(name="fedavg")), agreeing).parameters,
    )
    # four updates of length 1 at right angles: mean square 1, square of the mean 1/4, so twice the mean
    crossed = updates(
        [(2.0, -1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (1.0, -1.0, 1.0, 0.0), (1.0, -1.0, 0.0, 1.0)], counts=(7, 7, 7, 7)
    )
    start = ModelArrays(np.array([1.0, -1.0, 0.0, 0.0], np.float32), START.statistics)
    further = step(build_strategy(StrategyConfig(name="fedexp", tau=1e-9)), crossed, start)
    np.testing.assert_allclose(further.parameters - start.parameters, [0.5] * 4, rtol=1e-5)
    np.testing.assert_allclose(further.statistics, np.mean([1.0, 2.0, 3.0, 4.0]), rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_restored_strategy_goes_on_as_the_unbroken_one(name: StrategyName) -> None:
    cfg, rate = StrategyConfig(name=name), {1: 1.0, 2: 0.3}.__getitem__
    unbroken = build_strategy(cfg, rate)
    middle = step(unbroken, updates())
    after = step(unbroken, updates(counts=(1, 2, 3, 4, 5)), middle, number=2)
    first = build_strategy(cfg, rate)
    step(first, updates())
    restored = build_strategy(cfg, rate)
    restore_state(restored, {key: value.copy() for key, value in strategy_state(first).items()})
    resumed = step(restored, updates(counts=(1, 2, 3, 4, 5)), middle, number=2)
    np.testing.assert_array_equal(after.parameters, resumed.parameters)
    np.testing.assert_array_equal(after.statistics, resumed.statistics)
    assert bool(strategy_state(first)) == (name in REMEMBERING)


@given(
    st.sets(st.text("abc123", min_size=1, max_size=4), min_size=1, max_size=12),
    st.floats(0.01, 1),
    st.integers(0, 99),
    st.integers(1, 50),
)
def test_drawing_is_pure_and_takes_the_asked_share(sites: set[str], fraction: float, seed: int, number: int) -> None:
    drawn = draw_sites(sorted(sites), fraction, seed, number)
    assert drawn == draw_sites(sorted(sites, reverse=True), fraction, seed, number)
    assert set(drawn) <= sites
    assert len(drawn) == len(set(drawn)) == int(np.ceil(round(fraction * len(sites), 9)))


def test_every_site_has_its_turn() -> None:
    seen = {site for number in range(1, 60) for site in draw_sites(["a", "b", "c", "d"], 0.25, 0, number)}
    assert seen == {"a", "b", "c", "d"}


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedexp", "fedadam", "fednova", "scaffold", "feddyn", "multikrum"])
def test_hospitals_of_equal_weight_are_hospitals_of_equal_size(name: StrategyName) -> None:
    """What weighs sites equally must not ask for their images anywhere, but for FedNova's and SCAFFOLD's numbers of steps."""
    uneven, even = updates(counts=(7, 90, 3)), updates(counts=(50, 50, 50))

    def steps(_round: int, _images: int) -> float:
        return 3.0

    equal = step(build_strategy(StrategyConfig(name=name, weight_by="hospitals"), weight=steps), uneven)
    same = step(build_strategy(StrategyConfig(name=name), weight=steps), even)
    np.testing.assert_allclose(equal.parameters, same.parameters, rtol=1e-6)
    np.testing.assert_allclose(equal.statistics, same.statistics, rtol=1e-6)


def test_fednova_with_equal_weights_still_divides_by_each_sites_own_steps() -> None:
    cfg, uneven = StrategyConfig(name="fednova", weight_by="hospitals"), updates(counts=(7, 90, 3))
    result = step(build_strategy(cfg, weight=lambda _, images: float(images)), uneven)
    effective = np.mean([7, 90, 3])
    moves = [update.arrays.parameters - START.parameters for update in uneven]
    mean = np.mean([move * (effective / images) for move, images in zip(moves, (7, 90, 3), strict=True)], axis=0)
    np.testing.assert_allclose(result.parameters, START.parameters + mean, rtol=1e-5)
