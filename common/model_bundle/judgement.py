"""What a model bundle says of one image: the one record from which every table, report, page and database row is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

Decision = Literal["pneumonia", "normal"]
Verdict = Literal["pneumonia", "normal", "cannot judge"]


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
    Reason.NOT_THE_CHEST: "the file says that this is not the chest (DICOM Body Part Examined)",
    Reason.NOT_FRONTAL: "the file says that this is no frontal view (DICOM View Position)",
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
        decision: `pneumonia` if the probability is at least the threshold of the judgement.
        probability: calibrated P(pneumonia).
        low, high: its 95 % interval (see `Calibration.interval`).
        classes: calibrated probability of each class of the task; they sum to 1.
        score: the network's own logit of P(pneumonia), before calibration.
        activation_map: float32 [h, w], the class activation map of `score` (Zhou et al. 2016, eq. 2): what each place of the picture
            adds to it, times h * w. None for a network without a feature map.
    """

    decision: Decision
    probability: float
    low: float
    high: float
    classes: Mapping[str, float]
    score: float
    activation_map: npt.NDArray[np.float32] | None


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
        pixel_statistics: float32 [K], likewise; see `common.model_bundle.pixel_statistics`.
        prediction: the answer; None if and only if there are `reasons`.
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
