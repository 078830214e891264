"""The sanity check tells a map of the network from a map of the image, and the deletion curve a map that matters from chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pneumofed.common.imaging.augment import GREY_MEAN
from pneumofed.common.seeds import torch_generator
from pneumofed.inference.explain.cam import LogOdds
from pneumofed.inference.explain.faithfulness import (
    CELLS_PER_SIDE,
    CURVE_STEPS,
    Likeness,
    area,
    cascade,
    conclude,
    curves,
    likeness,
    mean_interval,
    random_curves,
    randomised,
    sanity_check,
    spearman,
)
from tests.inference.explain.test_maps import IMAGE, Bright, network_of


def alike(values: list[float]) -> list[Likeness]:
    return [Likeness(value, value, value) for value in values]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.05, 0.1, 0.2, 0.0, -0.1, 0.1], "depends on the weights"),
        ([0.9, 0.95, 0.8, 0.9, 0.99, 0.85], "does not depend on the weights"),
        ([0.1, 0.9, 0.2, 0.95, 0.5, 0.6], "open"),
        ([0.0, 0.0], "open"),
        ([math.nan] * 8, "open"),
    ],
)
def test_the_verdict_follows_the_interval(values: list[float], verdict: str) -> None:
    found = conclude("grad-cam", alike(values))
    assert found.verdict == verdict
    assert ("do not use" in found.sentence()) == (verdict == "does not depend on the weights")
    assert found.pairs + found.constant == len(values)


def test_a_map_that_is_only_upside_down_is_no_other_map() -> None:
    found = conclude("occlusion", [Likeness(-0.9, 0.95, 0.9)] * 8)
    assert found.verdict == "does not depend on the weights"


def test_a_network_whose_weights_do_not_matter_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Bright` has no weights: its maps are of the image alone, and the check must say so."""
    monkeypatch.setattr("pneumofed.inference.explain.faithfulness.randomised", lambda network, share, seed: network)
    found = sanity_check(Bright(), [IMAGE], "integrated-gradients")
    assert found.verdict == "does not depend on the weights" and found.rank["value"] == pytest.approx(1.0)


def test_the_check_of_a_real_network_compares_enough_pairs() -> None:
    found = sanity_check(network_of("small_cnn"), [IMAGE, IMAGE.flip(-1)], "integrated-gradients")
    assert found.pairs + found.constant == 6 and found.rank["value"] < 0.9


def test_the_cascade_runs_from_the_classifier_to_everything_and_spares_the_original() -> None:
    network = network_of("resnet18")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    changed: list[set[str]] = []
    for _, other in cascade(network, seed=1):
        weights = {name for name, tensor in other.state_dict().items() if not torch.equal(tensor, before[name])}
        assert not changed or changed[-1] <= weights
        changed.append({name for name in weights if name.endswith("weight")})
    assert changed[0] == {"fc.weight"} and "conv1.weight" in changed[-1] and "conv1.weight" not in changed[-2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_randomising_is_pure_in_the_seed() -> None:
    network = network_of("small_cnn")
    first, again, other = (randomised(network, 1.0, seed).state_dict()["stages.0.0.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_rank_correlation_is_that_of_ranks() -> None:
    values = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    assert spearman(values, np.exp(values)) == pytest.approx(1.0)
    assert spearman(values, -values) == pytest.approx(-1.0)
    assert math.isnan(spearman(values, np.ones_like(values)))
    assert likeness(values, -values).absolute_rank == pytest.approx(1.0)


def test_the_right_map_beats_chance_and_the_wrong_one_does_not() -> None:
    """The score is the sum of the left half: deleting it first brings the probability down at once."""
    reference, score = torch.full((1, 1, 64, 64), GREY_MEAN), LogOdds(Bright(), "pneumonia")
    image = reference + 0.001 * torch.rand(1, 1, 64, 64, generator=torch_generator("deleted"))
    left = np.zeros((64, 64), np.float32)
    left[:, :32] = 1.0
    chance = random_curves(score, image, reference)
    right, wrong = curves(score, image, left, reference), curves(score, image, -left, reference)
    assert right.deletion_area < chance.deletion_area < wrong.deletion_area
    assert right.insertion_area > chance.insertion_area > wrong.insertion_area


def test_curves_run_from_image_to_reference_and_back() -> None:
    score, reference = LogOdds(network_of("small_cnn"), "pneumonia"), torch.zeros_like(IMAGE)
    found = curves(score, IMAGE, np.random.default_rng(0).random((32, 32)).astype(np.float32), reference)
    with torch.inference_mode():
        ends = [float(torch.sigmoid(score(image))) for image in (IMAGE, reference)]
    assert len(found.deletion) == CURVE_STEPS + 1 and CELLS_PER_SIDE**2 % CURVE_STEPS == 0
    assert [found.deletion[0], found.deletion[-1]] == pytest.approx(ends, abs=1e-5)
    assert [found.insertion[-1], found.insertion[0]] == pytest.approx(ends, abs=1e-5)
    assert area(np.array([1.0, 1.0, 0.0])) == pytest.approx(0.75)


def test_the_mean_s_interval_draws_patients_and_leaves_out_what_is_undefined() -> None:
    values = np.random.default_rng(1).normal(1.0, 1.0, 400)
    found = mean_interval([*values, math.nan])
    assert found["value"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20, rel=0.25)
    clustered = mean_interval(np.repeat(values[:100], 4).tolist(), np.repeat(np.arange(100), 4).astype(str).tolist())
    assert clustered["high"] - clustered["low"] == pytest.approx(2 * 1.96 / 10, rel=0.3)
    assert math.isnan(mean_interval([math.nan])["value"])
    few = mean_interval([1.0] * 50, ["one", "two"] * 25)
    assert few["value"] == 1.0 and math.isnan(few["low"])
