"""A bad reply is left out and named; a good one is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pneumofed.common.config.experiment import StrategyConfig
from pneumofed.common.wire.messages import ModelArrays, Update
from pneumofed.server.federation.replies import UpdateChecks, implausible
from tests.server.federation.updates import LAYOUT, as_reply, full_update, zeros


def check(*updates: Update, names: tuple[str, ...] = ()) -> tuple[set[str], dict[str, str]]:
    sites = names or tuple(update.presence.site for update in updates)
    answers = {site: as_reply(update) for site, update in zip(sites, updates, strict=True)}
    presences = {site: full_update(site).presence for site in sites}
    checks = UpdateChecks(zeros(), LAYOUT, presences, StrategyConfig(max_update_norm_factor=10.0))
    for site, message in answers.items():
        checks.take(site, message)
    good, left_out = checks.close()
    return set(good), {site: failure.sentence for site, failure in left_out.items()}


def with_arrays(update: Update, parameters: np.ndarray, statistics: np.ndarray) -> Update:
    return Update.of(update.presence, ModelArrays(parameters, statistics), update.num_examples, update.metrics)


def spoiled(update: Update, position: int, value: float, statistic: bool = False) -> Update:
    parameters, statistics = update.arrays.parameters.copy(), update.arrays.statistics.copy()
    (statistics if statistic else parameters)[position] = value
    return with_arrays(update, parameters, statistics)


def test_an_update_is_too_long_for_those_that_came_last_and_not_for_the_first_ones() -> None:
    """A buffer of asynchronous rounds looks after each reply: two sites that hardly move must not shut the others out."""
    short, usual = [full_update(name, scale=1e-5) for name in "ab"], [full_update(name) for name in "cde"]
    presences = {update.presence.site: update.presence for update in [*short, *usual]}
    checks = UpdateChecks(zeros(), LAYOUT, presences, StrategyConfig(max_update_norm_factor=10.0))
    for update in [*short, *usual]:
        checks.take(update.presence.site, as_reply(update))
        checks.close()
    assert set(checks.close()[0]) == set("abcde")


def test_good_updates_pass() -> None:
    assert check(full_update("a"), full_update("b"), full_update("c")) == ({"a", "b", "c"}, {})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_layer(value: float) -> None:
    good, left_out = check(full_update("a"), spoiled(full_update("b"), 0, value))
    assert good == {"a"}
    assert LAYOUT.name_at("parameter", 0) in left_out["b"]


def test_a_negative_variance_is_left_out() -> None:
    position = int(np.arange(LAYOUT.statistic_count)[LAYOUT.variances][0])
    good, left_out = check(full_update("a"), spoiled(full_update("b"), position, -1.0, statistic=True))
    assert good == {"a"}
    assert "variance" in left_out["b"]


def test_another_size_or_layout_or_name_is_left_out() -> None:
    short = with_arrays(full_update("b"), np.ones(3, np.float32), full_update("b").arrays.statistics)
    other = replace(full_update("c"), presence=replace(full_update("c").presence, layout="other"))
    good, left_out = check(full_update("a"), short, other, full_update("x"), names=("a", "b", "c", "d"))
    assert good == {"a"}
    assert set(left_out) == {"b", "c", "d"}


@pytest.mark.parametrize("count", [0, 11])
def test_more_images_than_announced_or_none_is_left_out(count: int) -> None:
    good, left_out = check(full_update("a"), replace(full_update("b"), num_examples=count))
    assert good == {"a"}
    assert "announced 10" in left_out["b"]


@pytest.mark.parametrize("scale", [0.5, 100.0])
def test_a_scaled_update_is_left_out_among_two_and_among_many(scale: float) -> None:
    for others in (["a"], ["a", "b", "c"]):
        good, left_out = check(*(full_update(site) for site in others), full_update("z", scale=0.01 * 100 * scale))
        assert good == set(others)
        assert "times as long" in left_out["z"]


def test_length_grows_with_images_without_being_implausible() -> None:
    assert implausible({"large": (30.0, 900), **{f"small-{i}": (1.0, 9) for i in range(5)}}, factor=10.0) == {}


def test_sites_that_did_not_move_do_not_condemn_the_others() -> None:
    assert implausible({**{f"still-{i}": (0.0, 10) for i in range(3)}, "moved": (1.0, 10)}, factor=10.0) == {}
