"""Whether an image can be judged: three tests of how unlike the reference images it is, with a guaranteed rate of false refusals.

A test's score has a limit by split conformal prediction (Vovk, Gammerman & Shafer 2005, section 4.1; Angelopoulos & Bates 2023,
section 2.4): the densities are fitted on one half of the reference patients, and the limit is an order statistic of the scores of one
image of each patient of the other half. For a new patient of the same population, whatever that population and the network are,

    P(a test refuses) <= allowed / (n + 1),    allowed: the limit is the score with this rank from above,

since all n + 1 ranks are equally likely; over all tests the chances add up to at most `refusal_rate`. The guarantee is over draws of
the reference images too, and none is given for hospitals unlike those of the reference: refusing them is what the tests are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import Field

from common.config_types import Count, Section
from common.errors import DataError
from common.image_types import ImageInfo
from common.model_bundle.density import Density, Packed, fit_density
from common.model_bundle.header_rules import header_reasons
from common.model_bundle.judgement import Reason
from common.model_bundle.layout_statistics import cells_of, statistics_of, thumbnail

DEFAULT_REFUSAL_RATE = 0.02
FEATURE_AXES = 32
TESTS = ("features", "pixels", "turn")
"""Distance in the network's features, distance in the statistics of grey values and layout, and how much nearer to the reference the
image gets when it is turned or inverted."""

_TURNS = {
    "quarter turn": (Reason.TURNED, lambda grey: np.rot90(grey)),
    "upside down": (Reason.TURNED, lambda grey: np.rot90(grey, 2)),
    "three quarter turn": (Reason.TURNED, lambda grey: np.rot90(grey, 3)),
    "inverted": (Reason.INVERTED, lambda grey: 1.0 - grey),
}


class Suitability(Section):
    """What `fit_suitability` learnt; a part of a bundle's manifest."""

    refusal_rate: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Greatest share of false refusals by the three tests together."""
    reference_images: Count
    """Images that the densities were fitted on."""
    features: Density
    pixels: Density
    """Density of `LAYOUT_STATISTICS`."""
    cells: Density
    """Density of the greys of `cells_of`."""
    calibration: Packed
    """[T, n]: for each of `TESTS` the scores of n images of other patients, ascending."""

    @cached_property
    def limits(self) -> np.ndarray:
        """float64 [T]: a score above its limit refuses; infinite where there are too few images for the rate."""
        scores = self.calibration.array
        allowed = _allowed(scores.shape[1], self.refusal_rate)
        return np.array([row[-k] if k else np.inf for row, k in zip(scores, allowed, strict=True)])


@dataclass(frozen=True, eq=False)
class Inputs:
    """N images to check.

    Attributes:
        images: float32 [N, S, S] in [0, 1], the network's input before normalisation.
        features: float32 [N, D], the classifier's input.
        pixel_statistics: float32 [N, K]; not looked at, since it counts black padding.
        infos: what the files say of them.
    """

    images: np.ndarray
    features: np.ndarray
    pixel_statistics: np.ndarray
    infos: Sequence[ImageInfo]


@dataclass(frozen=True, eq=False)
class _Looks:
    """`LAYOUT_STATISTICS` [N, K] of N images, and the cells of each as it is and after each of `_TURNS`, [N, 1 + turns, C]."""

    statistics: np.ndarray
    cells: np.ndarray

    def of(self, rows: np.ndarray) -> _Looks:
        return _Looks(self.statistics[rows], self.cells[rows])


@dataclass(frozen=True)
class SuitabilityResult:
    """Of one image: why it cannot be judged, empty if it can, and the numbers behind that.

    Attributes:
        reasons: the file's own account alone where it speaks against the image, else what the tests found.
        scores: p-value of each of `TESTS`, in (0, 1]: about the share of good images that look as strange as this one or stranger.
    """

    reasons: tuple[Reason, ...]
    scores: Mapping[str, float]


def fit_suitability(
    images: np.ndarray,
    features: np.ndarray,
    pixel_statistics: np.ndarray,
    *,
    patients: Sequence[str] | None = None,
    refusal_rate: float = DEFAULT_REFUSAL_RATE,
) -> Suitability:
    """What M reference images (rows as in `Inputs`), on which the network was not trained, look like; pure in the arguments.

    Images that it was trained on have features that new ones do not come near: the rate would not hold. With fewer than
    3 / refusal_rate calibration patients some tests cannot refuse anything (their limit is infinite), and with fewer than
    1 / refusal_rate none can.

    Args:
        images, features, pixel_statistics: as in `Inputs`.
        patients: of each image; None if each has one of its own.
        refusal_rate: in (0, 1).

    Raises:
        DataError: lengths differ, or there are fewer than four patients.
    """
    patients = [str(number) for number in range(len(images))] if patients is None else patients
    if not len(images) == len(features) == len(patients):
        raise DataError(f"expected as many features and patients as images, got {len(images)}, {len(features)}, {len(patients)}")
    fitted, calibrated = _split(patients)
    looks = _look(images)
    densities = (
        fit_density(features[fitted], components=FEATURE_AXES, standardize=False),
        fit_density(looks.statistics[fitted], components=looks.statistics.shape[1], standardize=True),
        fit_density(looks.cells[fitted, 0], components=looks.cells.shape[2], standardize=False),
    )
    scores = np.sort(_scores(densities, features[calibrated], looks.of(calibrated)), axis=1)
    known, layout, cells = densities
    return Suitability(
        refusal_rate=refusal_rate,
        reference_images=len(fitted),
        features=known,
        pixels=layout,
        cells=cells,
        calibration=Packed.of(scores),
    )


def check_suitability(suitability: Suitability | None, inputs: Inputs) -> list[SuitabilityResult]:
    """One finding for each image of `inputs`, in order; without `suitability` the file's own account alone decides."""
    own = [header_reasons(info) for info in inputs.infos]
    if suitability is None or not own:
        return [SuitabilityResult(reasons, {}) for reasons in own]
    looks = _look(inputs.images)
    scores = _scores((suitability.features, suitability.pixels, suitability.cells), inputs.features, looks)
    p_values = _p_values(suitability.calibration.array, scores)
    refused = ~(scores <= suitability.limits[:, None])  # NaN, which a network may give for a strange picture, refuses
    best = _turned_distances(suitability.cells, looks.cells).argmin(axis=1)
    return [
        SuitabilityResult(
            reasons or _explain(refused[:, row], int(best[row])), dict(zip(TESTS, p_values[:, row].tolist(), strict=True))
        )
        for row, reasons in enumerate(own)
    ]


def _explain(refused: np.ndarray, best_turn: int) -> tuple[Reason, ...]:
    """The reasons of the tests that refuse, the one that tells most first."""
    turn = list(_TURNS.values())[best_turn][0]
    of_test = {"turn": turn, "pixels": Reason.UNLIKE_REFERENCE, "features": Reason.FAR_FROM_REFERENCE}
    return tuple(reason for name, reason in of_test.items() if refused[TESTS.index(name)])


def _split(patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(indices of all images of one half of the patients, of one image of each of the others, drawn at random)."""
    from common.seeds import numpy_generator  # it imports torch, which those who only check need not have

    generator = numpy_generator("suitability")
    order = generator.permutation(len(patients))
    names = np.asarray(patients)[order]
    everyone = generator.permutation(np.unique(names))
    if len(everyone) < 4:
        raise DataError(f"expected reference images of at least 4 patients, got {len(everyone)}")
    others = everyone[len(everyone) // 2 :]
    first_of = {name: place for place, name in reversed(list(enumerate(names.tolist())))}
    return order[~np.isin(names, others)], order[[first_of[name] for name in others.tolist()]]


def _look(images: np.ndarray) -> _Looks:
    greys = [thumbnail(image) for image in images]
    statistics = np.stack([statistics_of(grey) for grey in greys])
    cells = np.stack([[cells_of(grey), *(cells_of(turn(grey)) for _, turn in _TURNS.values())] for grey in greys])
    return _Looks(statistics, cells)


def _turned_distances(density: Density, cells: np.ndarray) -> np.ndarray:
    """float64 [N, turns]."""
    return np.stack([density.distance(cells[:, turn]) for turn in range(1, cells.shape[1])], axis=1)


def _scores(densities: tuple[Density, Density, Density], features: np.ndarray, looks: _Looks) -> np.ndarray:
    """float64 [T, N], for each of `TESTS`; the larger the stranger. The densities are of features, statistics and cells."""
    known, layout, cells = densities
    turn = cells.distance(looks.cells[:, 0]) - _turned_distances(cells, looks.cells).min(axis=1)
    return np.stack([known.distance(features), layout.distance(looks.statistics), turn])


def _p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(1 + how many calibration scores are at least as large) / (n + 1), float64 [T, N]: Vovk et al. 2005, eq. 2.17."""
    count = calibration.shape[1]
    smaller = np.stack([np.searchsorted(known, new, "left") for known, new in zip(calibration, scores, strict=True)])
    return (1 + count - smaller) / (count + 1)


def _allowed(count: int, refusal_rate: float) -> list[int]:
    """How many calibration images each test may refuse: together at most `refusal_rate` of count + 1."""
    budget = int(refusal_rate * (count + 1) + 1e-9)
    cuts = [budget * test // len(TESTS) for test in range(len(TESTS), -1, -1)]
    return [high - low for high, low in pairwise(cuts)]
