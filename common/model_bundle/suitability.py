"""Whether an image can be judged, and the record of its judgement.

- `Judgement`: what a model bundle says of one image, from which every table, report, page and database row is written. It has either a
  `Prediction` or the `Reason`s why there is none.
- `fit_suitability`, `check_suitability`: three tests of how unlike the reference images an image is, with a guaranteed rate of false
  refusals.
- `header_reasons`: rules that need no model, on what the file itself says against a frontal chest radiograph.

A test's score has a limit by split conformal prediction (Vovk, Gammerman & Shafer 2005, section 4.1; Angelopoulos & Bates 2023,
section 2.4): the densities are fitted on one half of the reference patients, and the limit is an order statistic of the scores of one
image of each patient of the other half. For a new patient of the same population, whatever that population and the network are,

    P(a test refuses) <= allowed / (n + 1),    allowed: the limit is the score with this rank from above,

since all n + 1 ranks are equally likely; over all tests the chances add up to at most `refusal_rate`. The guarantee is over draws of
the reference images too, and none is given for hospitals unlike those of the reference: refusing them is what the tests are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pneumofed.common.config.experiment import Count, Section
from pneumofed.common.errors import DataError
from pneumofed.common.imaging.patient_groups import PatientGroups, is_frontal, is_other_part
from pneumofed.common.imaging.types import ImageInfo
from pneumofed.common.model_bundle.image_statistics import (
    Density,
    Packed,
    as_pictures,
    cells_of,
    fit_density,
    statistics_of,
    thumbnail,
)
from pneumofed.common.model_bundle.population import PopulationFinding, not_known

Decision = Literal["pneumonia", "finding", "normal"]
Verdict = Literal["pneumonia", "finding", "normal", "cannot judge"]
"""`finding` takes the place of `pneumonia` where the model's classes are not only pneumonias (`common.config.classes.positive_word`)."""


class Reason(StrEnum):
    """Why an image is not judged. The value is a fixed word: pages translate it, scripts compare it; `sentence` is plain English."""

    NOT_A_RADIOGRAPH = "not_a_radiograph"
    NOT_THE_CHEST = "not_the_chest"
    NOT_FRONTAL = "not_frontal"
    COLOUR = "colour"
    SHAPE = "shape"
    INVERTED = "inverted"
    TURNED = "turned"
    UNLIKE_REFERENCE = "unlike_reference"
    FAR_FROM_REFERENCE = "far_from_reference"

    @property
    def sentence(self) -> str:
        """The reason in plain English, for tables, reports and pages without a translation."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.NOT_A_RADIOGRAPH: "the file says that this is no radiograph (DICOM Modality)",
    Reason.NOT_THE_CHEST: "the file says that this is not the chest (DICOM Anatomic Region or Body Part Examined)",
    Reason.NOT_FRONTAL: "the file says that this is no frontal view (DICOM View Position, View Code or Patient Orientation)",
    Reason.COLOUR: "a picture in colour",
    Reason.SHAPE: "too long and narrow for a radiograph of the chest",
    Reason.INVERTED: "black and white seem to be exchanged",
    Reason.TURNED: "the image seems to lie on its side or upside down",
    Reason.UNLIKE_REFERENCE: "grey values or layout are unlike those of frontal chest radiographs",
    Reason.FAR_FROM_REFERENCE: "far from all images that the model was checked on",
}


@dataclass(frozen=True, eq=False)
class Prediction:
    """The numbers of an image that can be judged.

    Attributes:
        decision: `pneumonia`, or `finding`, if the probability is at least the threshold of the judgement.
        probability: calibrated P(pneumonia), or of all classes but normal together.
        low, high: its 95 % interval (see `Calibration.interval`).
        classes: calibrated probability of each class of the task; they sum to 1.
        score: the network's own logit of P(pneumonia), before calibration.
        activation_map: float32 [h, w], the class activation map of `score` (Zhou et al. 2016, eq. 2): what each place of the picture
            adds to it, times h * w. None for a network without a feature map.
        image_only: calibrated P(pneumonia) of the image without its clinical values; None where none were given.
    """

    decision: Decision
    probability: float
    low: float
    high: float
    classes: Mapping[str, float]
    score: float
    activation_map: npt.NDArray[np.float32] | None
    image_only: float | None = None

    @property
    def likeliest(self) -> str:
        """The class that the decision speaks of: `normal`, or the most probable of the others."""
        others = {name: value for name, value in self.classes.items() if name != "normal"}
        return "normal" if self.decision == "normal" else max(others, key=lambda name: others[name])


@dataclass(frozen=True, eq=False)
class Judgement:
    """One image, judged. Where the image cannot be judged there is no prediction, and so no number that anybody could read.

    Attributes:
        image: the name that the caller gave the image. It may be a path that names a patient, so it is left out of `repr`.
        model: name of the bundle.
        model_digest: SHA-256 of the bundle's manifest.
        threshold: on the calibrated probability, as the bundle has it; the same for every image.
        calibrated: whether the bundle's probabilities were calibrated.
        reasons: why the image cannot be judged; empty if it can.
        suitability: what the reasons were decided on, by test: p-values in (0, 1]; empty where the bundle has no suitability check.
        features: float32 [D], the classifier's input, for the monitor of drift.
        pixel_statistics: float32 [K], likewise; see `common.model_bundle.image_statistics`.
        prediction: the answer; None if and only if there are `reasons`.
        population: whether the model was judged for such a patient. It is no reason to refuse, and always shown.
    """

    image: str = field(repr=False)
    model: str
    model_digest: str
    threshold: float
    calibrated: bool
    reasons: tuple[Reason, ...]
    suitability: Mapping[str, float]
    features: npt.NDArray[np.float32]
    pixel_statistics: npt.NDArray[np.float32]
    prediction: Prediction | None
    population: PopulationFinding = field(default_factory=lambda: not_known(PatientGroups()))

    def __post_init__(self) -> None:
        if (self.prediction is None) != bool(self.reasons):
            raise ValueError("a judgement has either a prediction or reasons why there is none")

    @property
    def verdict(self) -> Verdict:
        """The decision, or `cannot judge`."""
        return self.prediction.decision if self.prediction else "cannot judge"

    @property
    def explanation(self) -> str:
        """The reasons in plain English; empty if the image can be judged."""
        return "; ".join(reason.sentence for reason in self.reasons)


DEFAULT_REFUSAL_RATE = 0.02
FEATURE_AXES = 32
SUITABILITY_TESTS = ("features", "pixels", "turn")
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
    """[T, n]: for each of `SUITABILITY_TESTS` the scores of n images of other patients, ascending."""

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
        images: float32 [N, S, S] in [0, 1], the network's input before normalisation; of volumes [N, D, S, S], or their `as_pictures`,
            on which layout and turns are tested.
        features: float32 [N, D], the classifier's input.
        pixel_statistics: float32 [N, K]; not looked at, since it counts black padding.
        infos: what the files say of them.
        volumes: whether they are CT volumes.
    """

    images: np.ndarray
    features: np.ndarray
    pixel_statistics: np.ndarray
    infos: Sequence[ImageInfo]
    volumes: bool = False


@dataclass(frozen=True, eq=False)
class _LayoutArrays:
    """`LAYOUT_STATISTICS` [N, K] of N images, and the cells of each as it is and after each of `_TURNS`, [N, 1 + turns, C]."""

    statistics: np.ndarray
    cells: np.ndarray

    def of(self, rows: np.ndarray) -> _LayoutArrays:
        return _LayoutArrays(self.statistics[rows], self.cells[rows])


@dataclass(frozen=True)
class SuitabilityResult:
    """Of one image: why it cannot be judged, empty if it can, and the numbers behind that.

    Attributes:
        reasons: only the file's own account where it speaks against the image, else what the tests found.
        scores: p-value of each of `SUITABILITY_TESTS`, in (0, 1]: about the share of good images that look as strange as this one or
            stranger.
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
    layouts = _layout_arrays(images)
    densities = (
        fit_density(features[fitted], components=FEATURE_AXES, standardize=False),
        fit_density(layouts.statistics[fitted], components=layouts.statistics.shape[1], standardize=True),
        fit_density(layouts.cells[fitted, 0], components=layouts.cells.shape[2], standardize=False),
    )
    scores = np.sort(_scores(densities, features[calibrated], layouts.of(calibrated)), axis=1)
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
    """Finds for each image whether it can be judged.

    Args:
        suitability: from `fit_suitability`; with None only what the files say of themselves decides.
        inputs: N images with their features.

    Returns:
        N results, in order.
    """
    own = [(volume_reasons if inputs.volumes else header_reasons)(info) for info in inputs.infos]
    if suitability is None or not own:
        return [SuitabilityResult(reasons, {}) for reasons in own]
    layouts = _layout_arrays(inputs.images)
    scores = _scores((suitability.features, suitability.pixels, suitability.cells), inputs.features, layouts)
    p_values = _p_values(suitability.calibration.array, scores)
    refused = ~(scores <= suitability.limits[:, None])  # NaN, which a network may give for a strange picture, refuses
    best = _turned_distances(suitability.cells, layouts.cells).argmin(axis=1)
    return [
        SuitabilityResult(
            reasons or _explain(refused[:, row], int(best[row]), volumes=inputs.volumes),
            dict(zip(SUITABILITY_TESTS, p_values[:, row].tolist(), strict=True)),
        )
        for row, reasons in enumerate(own)
    ]


def score_images(suitability: Suitability, images: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Computes the tests' scores of images, the larger the stranger.

    Args:
        suitability: whose densities count; its limits do not.
        images, features: as in `Inputs`.

    Returns:
        float64 [T, N], for each of `SUITABILITY_TESTS`.
    """
    return _scores((suitability.features, suitability.pixels, suitability.cells), features, _layout_arrays(images))


def _explain(refused: np.ndarray, best_turn: int, *, volumes: bool) -> tuple[Reason, ...]:
    """The reasons of the tests that refuse, the most specific one first."""
    turn = list(_TURNS.values())[best_turn][0]
    unlike = Reason.FAR_FROM_REFERENCE if volumes else Reason.UNLIKE_REFERENCE  # of which one speaks of radiographs
    of_test = {"turn": turn, "pixels": unlike, "features": Reason.FAR_FROM_REFERENCE}
    return tuple(dict.fromkeys(reason for name, reason in of_test.items() if refused[SUITABILITY_TESTS.index(name)]))


def _split(patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(indices of all images of one half of the patients, of one image of each of the others, drawn at random)."""
    from pneumofed.common.seeds import numpy_generator  # it imports torch, which those who only check need not have

    generator = numpy_generator("suitability")
    order = generator.permutation(len(patients))
    names = np.asarray(patients)[order]
    everyone = generator.permutation(np.unique(names))
    if len(everyone) < 4:
        raise DataError(f"expected reference images of at least 4 patients, got {len(everyone)}")
    others = everyone[len(everyone) // 2 :]
    first_of = {name: place for place, name in reversed(list(enumerate(names.tolist())))}
    return order[~np.isin(names, others)], order[[first_of[name] for name in others.tolist()]]


def _layout_arrays(images: np.ndarray) -> _LayoutArrays:
    greys = [thumbnail(image) for image in as_pictures(images)]
    statistics = np.stack([statistics_of(grey) for grey in greys])
    cells = np.stack([[cells_of(grey), *(cells_of(turn(grey)) for _, turn in _TURNS.values())] for grey in greys])
    return _LayoutArrays(statistics, cells)


def _turned_distances(density: Density, cells: np.ndarray) -> np.ndarray:
    """float64 [N, turns]."""
    return np.stack([density.distance(cells[:, turn]) for turn in range(1, cells.shape[1])], axis=1)


def _scores(densities: tuple[Density, Density, Density], features: np.ndarray, layouts: _LayoutArrays) -> np.ndarray:
    """float64 [T, N], for each of `SUITABILITY_TESTS`; the larger the stranger. The densities are of features, statistics and cells."""
    known, layout, cells = densities
    turn = cells.distance(layouts.cells[:, 0]) - _turned_distances(cells, layouts.cells).min(axis=1)
    return np.stack([known.distance(features), layout.distance(layouts.statistics), turn])


def _p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(1 + how many calibration scores are at least as large) / (n + 1), float64 [T, N]: Vovk et al. 2005, eq. 2.17."""
    count = calibration.shape[1]
    smaller = np.stack([np.searchsorted(known, new, "left") for known, new in zip(calibration, scores, strict=True)])
    return (1 + count - smaller) / (count + 1)


def _allowed(count: int, refusal_rate: float) -> list[int]:
    """How many calibration images each test may refuse: together at most `refusal_rate` of count + 1."""
    budget = int(refusal_rate * (count + 1) + 1e-9)
    cuts = [budget * test // len(SUITABILITY_TESTS) for test in range(len(SUITABILITY_TESTS), -1, -1)]
    return [high - low for high, low in pairwise(cuts)]


MAX_ASPECT = 2.5
"""Longer side to shorter side. Detectors for the chest are 35 x 43 or 43 x 43 cm (1.23 and 1); a leg or a spine is longer."""
MAX_COLOUR = 0.1
"""Mean distance of the largest to the smallest of red, green and blue, in [0, 1]: a tinted scan of a film, or one with coloured arrows,
stays below; photographs in colour are above."""

_RADIOGRAPHY = frozenset({"CR", "DX", "DR", "RG", "XR", "OT", "SC"})
"""Modality (0008,0060), PS3.3, C.7.3.1.1.1: computed and digital radiography, scanned film (RG), names out of use that archives still
hold (DR, XR), and those that say nothing (OT, SC)."""


def header_reasons(info: ImageInfo) -> tuple[Reason, ...]:
    """What in the file's own account speaks against a frontal chest radiograph; empty where it says nothing."""
    sides = (info.height_px, info.width_px)
    rules = (
        (Reason.NOT_A_RADIOGRAPH, bool(info.modality) and info.modality not in _RADIOGRAPHY),
        (Reason.NOT_THE_CHEST, is_other_part(info.body_part or "")),
        (Reason.NOT_FRONTAL, not is_frontal(info.view or "")),
        (Reason.COLOUR, info.colour > MAX_COLOUR),
        (Reason.SHAPE, max(sides) > MAX_ASPECT * min(sides)),
    )
    return tuple(reason for reason, applies in rules if applies)


def volume_reasons(info: ImageInfo) -> tuple[Reason, ...]:
    """What in a series' own account speaks against a chest CT; that it is a CT at all was found out by reading it."""
    return (Reason.NOT_THE_CHEST,) if is_other_part(info.body_part or "") else ()
