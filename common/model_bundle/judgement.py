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
    """Why an image is not judged. The value is a fixed word: pages translate it, scripts compare it."""

    NOT_A_RADIOGRAPH = "not_a_radiograph"
    NOT_FRONTAL = "not_frontal"
    UNLIKE_REFERENCE = "unlike_reference"


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
