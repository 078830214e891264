"""Which images the model must not judge: what was fitted on the reference images, and the check of new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.config import Section
from common.images import ImageInfo
from common.model_bundle.judgement import Reason

Floats = npt.NDArray[np.float32]

LATERAL_VIEWS = frozenset({"LL", "RL", "LLD", "RLD", "LLO", "RLO"})
"""DICOM View Position (0018,5101), PS3.3 C.8.7.1.1.1 and C.8.11.5: laterals, decubitus and obliques are no frontal views."""
MARGIN = 0.5
"""How far beyond the reference images' range a statistic may lie, as a share of that range."""


class Suitability(Section):
    """What reference images look like: for each pixel statistic the range that they span."""

    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Inputs:
    """N images to check.

    Attributes:
        images: float32 [N, S, S] in [0, 1], the network's input.
        features: float32 [N, D].
        pixel_statistics: float32 [N, K].
        infos: what the files say of them.
    """

    images: Floats
    features: Floats
    pixel_statistics: Floats
    infos: Sequence[ImageInfo]


@dataclass(frozen=True)
class Finding:
    """Of one image: why it cannot be judged, and the numbers behind that."""

    reasons: tuple[Reason, ...]
    scores: Mapping[str, float]


def fit_suitability(images: Floats, features: Floats, pixel_statistics: Floats) -> Suitability:
    """What the reference images (rows as in `Inputs`) look like."""
    low, high = pixel_statistics.min(axis=0), pixel_statistics.max(axis=0)
    return Suitability(low=tuple(map(float, low)), high=tuple(map(float, high)))


def check(suitability: Suitability, inputs: Inputs) -> list[Finding]:
    """One finding for each image of `inputs`, in order."""
    low, high = np.array(suitability.low), np.array(suitability.high)
    outside = np.maximum(low - inputs.pixel_statistics, inputs.pixel_statistics - high) / np.maximum(high - low, 1e-6)
    return [_finding(float(worst), info) for worst, info in zip(outside.max(axis=1), inputs.infos, strict=True)]


def _finding(outside: float, info: ImageInfo) -> Finding:
    reasons = [Reason.NOT_FRONTAL] if info.view in LATERAL_VIEWS else []
    if outside > MARGIN:
        reasons.append(Reason.UNLIKE_REFERENCE)
    return Finding(tuple(reasons), {"outside": outside})
