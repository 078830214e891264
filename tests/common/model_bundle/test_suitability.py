"""Which images can be judged."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pneumofed.common.errors import DataError
from pneumofed.common.imaging.images import fit_square
from pneumofed.common.imaging.types import ImageInfo
from pneumofed.common.model_bundle.image_statistics import LAYOUT_STATISTICS, Packed, fit_density, statistics_of, thumbnail
from pneumofed.common.model_bundle.suitability import (
    Inputs,
    Reason,
    Suitability,
    check_suitability,
    fit_suitability,
    header_reasons,
)
from pneumofed.simulation.phantoms.other_images import CORRUPTIONS, PATTERNS, corrupt, draw_pattern
from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture

SIDE = 64
GREY = ImageInfo(format="png", height_px=SIDE, width_px=SIDE, bits=8)


@lru_cache(maxsize=1)
def phantoms() -> tuple[np.ndarray, list[str]]:
    """Squares of 160 phantom patients, and whose they are."""
    patients = list(draw_patients("test", 160, seed=3))
    squares = [fit_square(draw_picture(patient, 0, "test", 3, SIDE).astype(np.float32), SIDE, "pad") for patient in patients]
    return np.stack(squares), [f"p{number}" for number in range(len(patients))]


def features_of(squares: np.ndarray) -> np.ndarray:
    """In a network's place: mean greys of 8 x 8 cells."""
    return squares.reshape(len(squares), 8, SIDE // 8, 8, SIDE // 8).mean(axis=(2, 4)).reshape(len(squares), -1)


@lru_cache(maxsize=1)
def fitted() -> Suitability:
    squares, patients = phantoms()
    return fit(squares[:130], patients[:130])


def inputs_of(squares: np.ndarray) -> Inputs:
    return Inputs(squares, features_of(squares), np.empty((len(squares), 0)), [GREY] * len(squares))


def reasons_of(squares: np.ndarray) -> list[tuple[Reason, ...]]:
    return [finding.reasons for finding in check_suitability(fitted(), inputs_of(squares))]


def fit(squares: np.ndarray, patients: list[str], rate: float = 0.05) -> Suitability:
    inputs = inputs_of(squares)
    return fit_suitability(squares, inputs.features, inputs.pixel_statistics, patients=patients, refusal_rate=rate)


def with_scores(scores: np.ndarray, rate: float) -> Suitability:
    learnt = fitted()
    return Suitability(
        refusal_rate=rate,
        reference_images=65,
        features=learnt.features,
        pixels=learnt.pixels,
        cells=learnt.cells,
        calibration=Packed.of(scores),
    )


def test_new_images_of_the_same_kind_pass() -> None:
    refused = sum(bool(reasons) for reasons in reasons_of(phantoms()[0][130:]))
    assert refused <= 6  # of 30; a binomial of rate 0.05 is above with a chance of 0.001


@pytest.mark.parametrize("how", sorted(CORRUPTIONS.keys() - {"over-exposed", "under-exposed", "noise over all"}))
def test_spoilt_images_are_refused(how: str) -> None:
    spoilt = np.stack([corrupt(square, how) for square in phantoms()[0][130:]])
    assert np.mean([bool(reasons) for reasons in reasons_of(spoilt)]) > 0.9


@pytest.mark.parametrize("kind", sorted(PATTERNS))
def test_other_pictures_are_refused(kind: str) -> None:
    generator = np.random.default_rng(0)
    assert all(reasons_of(np.stack([draw_pattern(kind, SIDE, generator) for _ in range(10)])))


def test_what_is_wrong_is_told() -> None:
    squares = phantoms()[0][130:]
    inverted = reasons_of(np.stack([corrupt(square, "inverted grey") for square in squares]))
    turned = reasons_of(np.stack([corrupt(square, "upside down") for square in squares]))
    assert np.mean([Reason.INVERTED in reasons for reasons in inverted]) > 0.9
    assert np.mean([Reason.TURNED in reasons for reasons in turned]) > 0.9


def test_exactly_the_allowed_share_is_refused_when_every_image_takes_its_turn() -> None:
    """The oracle of the guarantee: of n + 1 exchangeable scores without ties exactly `allowed` are above the others' limit."""
    scores = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    refused = np.zeros(3)
    for one in range(300):
        others = np.sort(np.delete(scores, one, axis=1), axis=1)
        refused += scores[:, one] > with_scores(others, 0.05).limits
    np.testing.assert_array_equal(refused, [5, 5, 5])


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 2000), rate=st.floats(0.001, 0.5), seed=st.integers(0, 9))
def test_the_tests_together_stay_within_the_rate(count: int, rate: float, seed: int) -> None:
    calibration = np.sort(np.random.default_rng(seed).normal(size=(3, count)).astype(np.float32), axis=1)
    limits = with_scores(calibration, rate).limits
    # A limit that is the k-th score from above is passed by a new draw with a chance of k / (n + 1).
    allowed = sum(int((scores >= limit).sum()) for scores, limit in zip(calibration, limits, strict=True))
    assert allowed <= rate * (count + 1) + 1e-6


def test_one_image_of_a_patient_is_calibrated_on_and_no_patient_is_in_both_halves() -> None:
    squares, patients = phantoms()
    twice = [*patients[:65], *patients[:65]]
    suitability = fit(squares[:130], twice)
    assert (suitability.reference_images, suitability.calibration.shape) == (64, (3, 33))


def test_parameters_survive_a_file() -> None:
    again = Suitability.model_validate_json(fitted().model_dump_json())
    inputs = inputs_of(phantoms()[0][:5])
    assert again == fitted()
    assert check_suitability(again, inputs) == check_suitability(fitted(), inputs)


def test_an_array_of_the_wrong_length_is_refused() -> None:
    broken = fitted().model_dump(mode="json")
    broken["pixels"]["mean"]["shape"] = [7]
    with pytest.raises(ValidationError, match="expected 7 numbers"):
        Suitability.model_validate_json(json.dumps(broken))


def test_features_that_are_no_numbers_are_refused() -> None:
    squares = phantoms()[0][:1]
    (finding,) = check_suitability(fitted(), replace(inputs_of(squares), features=np.full((1, 64), np.nan)))
    assert Reason.FAR_FROM_REFERENCE in finding.reasons


def test_too_few_patients_cannot_be_fitted() -> None:
    squares = phantoms()[0][:6]
    with pytest.raises(DataError, match="4 patients"):
        fit(squares, ["a", "a", "b", "b", "c", "c"])


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"modality": "CT"}, Reason.NOT_A_RADIOGRAPH),
        ({"modality": "DX"}, None),
        ({"view": "LL"}, Reason.NOT_FRONTAL),
        ({"view": "PA"}, None),
        ({"body_part": "HAND"}, Reason.NOT_THE_CHEST),
        ({"body_part": "CHEST"}, None),
        ({"body_part": "CHEST ABDOMEN"}, None),
        ({"body_part": "TORAX"}, None),
        ({"colour": 0.3}, Reason.COLOUR),
        ({"height_px": 500, "width_px": 100}, Reason.SHAPE),
        ({"height_px": 2048, "width_px": 2500}, None),
    ],
)
def test_the_files_own_account_is_believed(told: dict[str, object], reason: Reason | None) -> None:
    info = replace(GREY, **told)  # type: ignore[arg-type]
    assert header_reasons(info) == ((reason,) if reason else ())
    (finding,) = check_suitability(None, replace(inputs_of(phantoms()[0][:1]), infos=[info]))
    assert finding.reasons == header_reasons(info)


def test_every_reason_has_a_sentence() -> None:
    assert len({reason.sentence for reason in Reason}) == len(Reason)


def test_a_density_with_all_axes_is_the_gaussian_of_the_sample() -> None:
    points = np.random.default_rng(0).normal(size=(200, 5)) @ np.random.default_rng(1).normal(size=(5, 5)) + 3
    inverse = np.linalg.inv(np.cov(points.T, bias=True))
    centred = points[:20] - points.mean(axis=0)
    expected = np.einsum("ni,ij,nj->n", centred, inverse, centred) / 5
    for standardize in (False, True):
        density = fit_density(points, components=5, standardize=standardize)
        np.testing.assert_allclose(density.distance(points[:20]), expected, rtol=1e-4)


def test_a_direction_in_which_the_sample_does_not_differ_tells_strangers() -> None:
    points = np.random.default_rng(0).normal(size=(40, 6)) * [1, 1, 1, 1, 1, 0]
    density = fit_density(points, components=4, standardize=False)
    assert density.distance(points + np.array([0, 0, 0, 0, 0, 30])).min() > density.distance(points).max()


@settings(max_examples=20, deadline=None)
@given(top=st.integers(0, 20), left=st.integers(0, 20), seed=st.integers(0, 99))
def test_black_padding_does_not_change_the_layout(top: int, left: int, seed: int) -> None:
    picture = np.random.default_rng(seed).uniform(0.1, 1, (40, 40)).astype(np.float32)
    padded = np.pad(picture, ((top, 20 - top), (left, 20 - left)))
    np.testing.assert_allclose(thumbnail(padded), thumbnail(picture), atol=1e-6)


def test_layout_of_extreme_pictures_is_finite() -> None:
    for picture in (np.zeros((32, 32)), np.ones((32, 32)), np.eye(32), np.eye(1, 32 * 32).reshape(32, 32)):
        values = statistics_of(thumbnail(picture.astype(np.float32)))
        assert values.shape == (len(LAYOUT_STATISTICS),)
        assert np.isfinite(values).all()


def test_colour_is_measured(tmp_path: object) -> None:
    from pneumofed.common.imaging.images import read_image

    path = tmp_path / "picture.png"  # type: ignore[operator]
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    for channels, expected in (((ramp, ramp, ramp), 0.0), ((ramp + 100, ramp, ramp), 100 / 255)):
        PIL.Image.fromarray(np.stack(channels, axis=2)).save(path)
        assert read_image(path).info.colour == pytest.approx(expected, abs=0.01)
