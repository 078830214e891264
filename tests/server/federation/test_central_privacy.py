"""Central differential privacy: what one site can move, the noise's size, its account, and whole runs with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from pneumofed.common.config.experiment import CentralPrivacyConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.wire.messages import ModelArrays, Presence, Update
from pneumofed.server.federation.central_privacy import CentralPrivacy, clip
from pneumofed.server.report.course import describe_privacy
from pneumofed.server.report.read_run import read_run
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from tests.server.federation.test_run import Killed, KillingApp
from tests.tiny import TinyFederation, there, tiny_experiment

CENTRAL: dict[str, Any] = {
    "model": {"norm": "group"},
    "central_privacy": {"enabled": True, "clip_norm": 0.5, "noise_multiplier": 0.8, "delta": 1e-3},
}
EMPTY = np.zeros(0, np.float32)


def mechanism(noise: float, clip_norm: float = 1.0, secret: bytes = b"s" * 32) -> CentralPrivacy:
    return CentralPrivacy(CentralPrivacyConfig(enabled=True, clip_norm=clip_norm), noise, secret)


def updates_of(changes: list[np.ndarray], current: np.ndarray) -> list[Update]:
    return [
        Update.of(
            Presence(f"site-{number}", "layout", {}), ModelArrays((current + change).astype(np.float32), EMPTY), number + 1, {}
        )
        for number, change in enumerate(changes)
    ]


changes = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3).map(np.array), min_size=1, max_size=5)


@settings(deadline=None)
@given(changes=changes, clip_norm=st.floats(0.01, 10.0))
def test_without_one_site_the_mean_moves_by_the_clipping_norm_over_the_sites_asked(
    changes: list[np.ndarray], clip_norm: float
) -> None:
    current, asked = np.array([1.0, -2.0, 0.5], np.float32), len(changes) + 1
    start, exact = ModelArrays(current, EMPTY), mechanism(0.0, clip_norm)
    everyone = updates_of(changes, current)
    whole = exact.combine(start, everyone, asked, 1).arrays.parameters
    if len(everyone) > 1:
        without = exact.combine(start, everyone[1:], asked, 1).arrays.parameters
        assert np.linalg.norm(whole - without) <= clip_norm / asked * 1.0001 + 1e-5
    assert np.array_equal(whole, exact.combine(start, everyone[::-1], asked, 1).arrays.parameters)


@given(change=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8).map(np.array), bound=st.floats(1e-3, 1e3))
def test_clipping_keeps_the_direction_and_what_is_short_enough(change: np.ndarray, bound: float) -> None:
    clipped = clip(change, bound)
    assert np.linalg.norm(clipped) <= bound * (1 + 1e-9)
    length = np.linalg.norm(change)
    assert np.allclose(clipped * max(length, bound), change * bound, rtol=1e-9, atol=1e-9)


def test_the_noise_has_the_deviation_that_is_accounted_and_is_new_for_other_updates() -> None:
    current = np.zeros(200_000, np.float32)
    start, noisy = ModelArrays(current, EMPTY), mechanism(1.5, 2.0)
    one = updates_of([np.zeros(len(current))], current)
    other = updates_of([np.full(len(current), 1e-6)], current)
    first = noisy.combine(start, one, 4, 1).arrays.parameters
    assert first.std() == pytest.approx(1.5 * 2.0 / 4, rel=0.01)
    assert abs(first.mean()) < 5 * first.std() / math.sqrt(len(first))
    assert np.array_equal(first, noisy.combine(start, one, 4, 1).arrays.parameters)
    for again in (noisy.combine(start, other, 4, 1), noisy.combine(start, one, 4, 2)):
        assert abs(np.corrcoef(first, again.arrays.parameters)[0, 1]) < 0.02
    assert abs(np.corrcoef(first, mechanism(1.5, 2.0, b"t" * 32).combine(start, one, 4, 1).arrays.parameters)[0, 1]) < 0.02


def test_epsilon_is_that_of_the_composed_gaussian() -> None:
    """Balle and Wang 2018, theorem 8, for 9 rounds of noise 3: one Gaussian of noise 1."""
    found = CentralPrivacy(CentralPrivacyConfig(enabled=True, delta=1e-4), 3.0, b"").epsilon(9)
    delta = norm.cdf(0.5 - found) - math.exp(found) * norm.cdf(-0.5 - found)
    assert 0.9e-4 < delta <= 1e-4


def test_the_target_holds_over_all_planned_rounds(tmp_path: Path) -> None:
    changes = {**CENTRAL, "central_privacy": {"enabled": True, "target_epsilon": 3.0}}
    found = CentralPrivacy.of(tiny_experiment(rounds=7, **changes), tmp_path)
    assert found is not None and 2.9 < found.epsilon(7) <= 3.0 < found.epsilon(8)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": {"norm": "batch"}}, "model.norm"),
        ({"strategy": {"name": "fedmedian"}}, "strategy.name"),
        ({"secure_aggregation": {"enabled": True}}, "secure_aggregation"),
    ],
)
def test_what_would_go_around_the_noise_is_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        tiny_experiment(**{**CENTRAL, **change})


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_a_run_tells_what_it_spent_round_by_round(tmp_path: Path, strategy: str) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment(rounds=2, strategy={"name": strategy}, **CENTRAL))
    spent = [there(line.central_epsilon) for line in RunFolder(tmp_path / "run").read_history()]
    assert 0 < spent[0] < spent[1]
    found = describe_privacy(read_run(tmp_path / "run"))
    assert found is not None and "each whole hospital" in found.protected[0]
    assert any("to the coordinator" in thing for thing in found.unprotected)


def test_both_kinds_of_privacy_together(tmp_path: Path) -> None:
    local = {"loss": {"logit_adjustment": False}, "privacy": {"mechanism": "dp_sgd", "delta": 1e-2, "expected_batch_size": 4}}
    TinyFederation(tmp_path, patients=12).run("run", tiny_experiment(rounds=1, **CENTRAL, **local))
    (line,) = RunFolder(tmp_path / "run").read_history()
    assert (
        there(line.central_epsilon) > 0
        and set(line.epsilons) == set(line.sites)
        and all(value > 0 for value in line.epsilons.values())
    )


def test_a_resumed_run_has_the_noise_of_an_unbroken_one(tmp_path: Path) -> None:
    federation, experiment = TinyFederation(tmp_path), tiny_experiment(rounds=3, **CENTRAL)
    federation.run("whole", experiment)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "noise.key").write_bytes((tmp_path / "whole" / "noise.key").read_bytes())
    (tmp_path / "broken" / "noise.key").chmod(0o600)
    with pytest.raises(Killed):
        federation.run("broken", experiment, grid=federation.grid(KillingApp(2)))
    federation.run("broken", experiment, resume=True)
    ends = [read_checkpoint(tmp_path / name / "checkpoints" / "last.pt").arrays.parameters for name in ("whole", "broken")]
    assert np.array_equal(ends[0], ends[1])
