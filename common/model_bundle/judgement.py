"""What a model bundle says of one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

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
class Judgement:
    """One image, judged.

    Attributes:
        probability: calibrated P(pneumonia).
        low, high: its 95 % interval (see `Calibration.interval`).
        classes: calibrated probability of each class of the task; they sum to 1.
        verdict: the decision at the operating point, or `cannot judge`.
        reasons: why it cannot be judged; empty if it can.
        suitability_scores: what the reasons were decided on, by name; empty where the bundle has no suitability check.
        score: the network's own logit of P(pneumonia), before calibration.
        features: float32 [D], the classifier's input.
        pixel_statistics: float32 [K], see `common.model_bundle.pixel_statistics`.
        activation_map: float32 [h, w], the class activation map of `score` (Zhou et al. 2016, eq. 2): what each place of the picture
            adds to it, times h * w. None for a network without a feature map.
    """

    probability: float
    low: float
    high: float
    classes: Mapping[str, float]
    verdict: Verdict
    reasons: tuple[Reason, ...]
    suitability_scores: Mapping[str, float]
    score: float
    features: npt.NDArray[np.float32]
    pixel_statistics: npt.NDArray[np.float32]
    activation_map: npt.NDArray[np.float32] | None
