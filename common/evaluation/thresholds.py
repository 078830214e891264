"""Thresholds on P(pneumonia), chosen on validation statistics and applied to other sets unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.config_types import ThresholdPolicyName
from common.evaluation.curves import ratio
from common.evaluation.metrics import metrics
from common.evaluation.statistics import Statistics

HALF = 0.5


@dataclass(frozen=True)
class ChosenThreshold:
    """A threshold and how it came about.

    Attributes:
        value: an image is called pneumonia if its score >= value. In [0, 1], or just above 1 if none is to be.
        policy: the policy asked for.
        reason_of_fallback: why `value` is 0.5 in spite of the policy; None if the policy was followed.
        sensitivity, specificity: on the validation statistics; NaN where a class is missing.
    """

    value: float
    policy: ThresholdPolicyName
    reason_of_fallback: str | None
    sensitivity: float
    specificity: float


@dataclass(frozen=True)
class _Cuts:
    """All ways to cut M occupied bins in two: cut c in 0..M calls the bins from c on positive. Arrays are [M + 1]."""

    sensitivity: npt.NDArray[np.float64]
    specificity: npt.NDArray[np.float64]
    gain: npt.NDArray[np.int64]
    """Youden's J times both class sizes: in whole numbers, so that ties are exact."""
    below: npt.NDArray[np.float64]
    """Highest score that may lie under the cut."""
    above: npt.NDArray[np.float64]
    """Lowest score that may lie over it."""


def choose_threshold(statistics: Statistics, policy: ThresholdPolicyName, target: float = 0.95) -> ChosenThreshold:
    """The threshold that `policy` chooses on `statistics`, in the middle of the gap between the scores that it separates.

    - `half`: 0.5.
    - `youden`: highest J = sensitivity + specificity - 1 (Youden 1950, Cancer 3:32); among equals the widest gap, then the
      highest sensitivity.
    - `sensitivity`: highest specificity of those with sensitivity >= `target`; among equals the highest sensitivity.
    - `specificity`: highest sensitivity of those with specificity >= `target`; among equals the highest specificity.

    Without images of both classes, or if `youden` finds no J above 0, it is 0.5 and `reason_of_fallback` says why.
    """
    positive, total = statistics.n_positive, statistics.n
    if policy == "half":
        return _at_half(statistics, policy, None)
    if positive in (0, total):
        missing = "images" if total == 0 else "pneumonia" if positive == 0 else "normal images"
        return _at_half(statistics, policy, f"validation has no {missing}")
    cuts = _cuts(statistics)
    if policy == "youden" and cuts.gain.max() <= 0:
        return _at_half(statistics, policy, "no threshold is better than chance on validation")
    best = _best(cuts, policy, target)
    value = _middle(float(cuts.below[best]), float(cuts.above[best]))
    return ChosenThreshold(value, policy, None, float(cuts.sensitivity[best]), float(cuts.specificity[best]))


def _at_half(statistics: Statistics, policy: ThresholdPolicyName, reason: str | None) -> ChosenThreshold:
    at_half = metrics(statistics, HALF)
    return ChosenThreshold(HALF, policy, reason, at_half["sensitivity"], at_half["specificity"])


def _cuts(statistics: Statistics) -> _Cuts:
    occupied = statistics.histograms[0].any(axis=0)
    negatives, positives = np.cumsum(np.pad(statistics.histograms[0][:, occupied], ((0, 0), (1, 0))), axis=1)
    found, spared = positives[-1] - positives, negatives
    return _Cuts(
        sensitivity=ratio(found, positives[-1]),
        specificity=ratio(spared, negatives[-1]),
        gain=found * negatives[-1] + spared * positives[-1] - positives[-1] * negatives[-1],
        below=np.append(0.0, statistics.grid.upper[occupied]),
        above=np.append(statistics.grid.lower[occupied], 1.0),
    )


def _best(cuts: _Cuts, policy: ThresholdPolicyName, target: float) -> int:
    sensitivity, specificity = cuts.sensitivity, cuts.specificity
    keys: dict[str, tuple[npt.NDArray, ...]] = {  # the last key weighs most
        "youden": (sensitivity, cuts.above - cuts.below, cuts.gain),
        "sensitivity": (sensitivity, specificity, sensitivity >= target),
        "specificity": (specificity, sensitivity, specificity >= target),
    }
    return int(np.lexsort(keys[policy])[-1])


def _middle(below: float, above: float) -> float:
    """The middle of the gap; `above` where nothing lies between, and just above 1 where a score of 1 must stay under the cut."""
    middle = (below + above) / 2
    if middle > below:
        return middle
    return above if below < 1.0 else float(np.nextafter(1.0, 2.0))
