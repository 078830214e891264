"""Lower bounds for "new minus old", and whether they show that a new model is not worse by more than a margin.

Non-inferiority: the new model passes if the one-sided lower confidence bound of the difference lies above -margin. Where several
comparisons must all pass, each is made at the full level: the test that all hypotheses are rejected together has that level itself
(intersection-union test: Berger 1982, Technometrics 24:295, theorem 1).

Two bounds are computed and the lower one counts. The first is the usual one, difference - z * standard error. It collapses where both
models make no error on few images: then nothing varies, and five images would prove anything. The second does not: score limits, for
areas those of Newcombe 2006 (Statistics in Medicine 25:559, method 5) combined for a difference as in Zou and Donner 2008 (Statistics
in Medicine 27:1693), for shares those of Tango 1998 (Statistics in Medicine 17:891), both with patients for images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from common.evaluation.paired import PairedAreas, PairedRates

PLANNED_AREA = 0.95
"""AUROC of both models that is assumed where a class is missing, so that none can be observed."""
_STEPS = 60
_MOST = 1e7


class Verdict(StrEnum):
    """What a comparison shows."""

    NOT_WORSE = "not worse"
    WORSE = "worse"
    """The observed difference itself is beyond the margin: more cases help only if they are kinder."""
    TOO_FEW = "not enough data to tell"


@dataclass(frozen=True)
class Outcome:
    """One comparison against its margin.

    Attributes:
        difference: new minus old; NaN where it cannot be computed.
        lower: its one-sided lower bound; -1 where nothing is known.
        factor: how many times the patients of each class would be needed to pass, were the difference to stay as observed;
            1 where it passes, None where no number helps.
    """

    difference: float
    lower: float
    margin: float
    verdict: Verdict
    factor: float | None


def judge_areas(areas: PairedAreas, patients: tuple[int, int], margin: float, alpha: float) -> Outcome:
    """Whether the new model's AUROC is not worse; `patients` with pneumonia and without."""
    known = not math.isnan(areas.difference)
    return _judge(areas.difference, margin, lambda factor: area_bound(areas, patients, alpha, factor) if known else -1.0)


def judge_rates(rates: PairedRates, margin: float, alpha: float) -> Outcome:
    """Whether the new model's sensitivity or specificity is not worse."""
    return _judge(rates.difference, margin, lambda factor: rate_bound(rates, alpha, factor) if rates.images else -1.0)


def area_bound(areas: PairedAreas, patients: tuple[int, int], alpha: float, factor: float = 1.0) -> float:
    """One-sided lower bound of the AUROC difference at level `alpha`; with `factor` as of so many times the patients."""
    z, (sick, well) = _z(alpha), (count * factor for count in patients)
    if sick <= 0 or well <= 0:
        return -1.0
    usual = areas.difference - z * math.sqrt(areas.variance / factor) if math.isfinite(areas.variance) else math.inf
    below = areas.new - area_limit(areas.new, sick, well, z, upper=False)
    above = area_limit(areas.old, sick, well, z, upper=True) - areas.old
    spread = below**2 + above**2 - 2.0 * areas.correlation * below * above
    return max(-1.0, min(usual, areas.difference - math.sqrt(max(spread, 0.0))))


def area_limit(area: float, sick: float, well: float, z: float, *, upper: bool) -> float:
    """The limit t of an observed `area` with (t - area)^2 = z^2 V(t), Newcombe 2006, method 5.

    V(t) = t (1 - t) (1 + (N* - 1) ((1 - t) / (2 - t) + t / (1 + t))) / (sick * well) with N* = (sick + well) / 2: the variance of
    Hanley and McNeil 1982, whose exponential scores make it a careful one.
    """

    def excess(t: float) -> float:
        middle = (sick + well) / 2.0 - 1.0
        variance = t * (1.0 - t) * (1.0 + middle * ((1.0 - t) / (2.0 - t) + t / (1.0 + t))) / (sick * well)
        return (t - area) ** 2 - z * z * variance

    return _root(excess, area, 1.0) if upper else _root(excess, area, 0.0)


def rate_bound(rates: PairedRates, alpha: float, factor: float = 1.0) -> float:
    """One-sided lower bound of the difference of two shares at level `alpha`; with `factor` as of so many times the patients."""
    z = _z(alpha)
    usual = rates.difference - z * math.sqrt(rates.variance / factor) if math.isfinite(rates.variance) else math.inf
    scale = factor * rates.patients / rates.images
    return max(-1.0, min(usual, tango_limit(rates.gained * scale, rates.lost * scale, rates.patients * factor, z)))


def tango_limit(gained: float, lost: float, n: float, z: float) -> float:
    """The lower score limit of (gained - lost) / n for `n` pairs (Tango 1998, section 3); without any change it is -z^2 / (n + z^2)."""
    observed = (gained - lost) / n

    def excess(delta: float) -> float:
        b = (2.0 * n - gained + lost) * delta - gained - lost
        q = (math.sqrt(max(b * b + 8.0 * n * lost * delta * (1.0 - delta), 0.0)) - b) / (4.0 * n)
        variance = n * max(2.0 * q + delta * (1.0 - delta), 0.0)
        return (gained - lost - n * delta) ** 2 - z * z * variance

    return _root(excess, observed, -1.0)


def patients_needed(outcome: Outcome, patients: tuple[int, int], alpha: float) -> tuple[int, int] | None:
    """Patients with pneumonia and without that would be needed to pass, or None where no number helps.

    Where a class is missing so far, as many of each as two models of AUROC `PLANNED_AREA` would need.
    """
    if math.isnan(outcome.difference) or min(patients) == 0:
        same = PairedAreas(PLANNED_AREA, PLANNED_AREA, *[math.nan] * 3)
        planned = judge_areas(same, (1, 1), outcome.margin, alpha).factor or 1.0
        return max(patients[0], math.ceil(planned)), max(patients[1], math.ceil(planned))
    if outcome.factor is None:
        return None
    return math.ceil(patients[0] * outcome.factor), math.ceil(patients[1] * outcome.factor)


def _judge(difference: float, margin: float, bound: Callable[[float], float]) -> Outcome:
    lower = bound(1.0)
    if lower > -margin:
        return Outcome(difference, lower, margin, Verdict.NOT_WORSE, 1.0)
    if difference <= -margin:
        return Outcome(difference, lower, margin, Verdict.WORSE, None)
    if math.isnan(difference):
        return Outcome(difference, lower, margin, Verdict.TOO_FEW, None)
    low, high = 0.0, math.log(_MOST)
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if bound(math.exp(middle)) > -margin else (middle, high)
    return Outcome(difference, lower, margin, Verdict.TOO_FEW, math.exp(high))


def _root(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `excess`, at most 0 at `inside`, rises above 0 on the way to `outside`; `outside` if it does not."""
    for _ in range(_STEPS):
        middle = (inside + outside) / 2.0
        if excess(middle) > 0.0:
            outside = middle
        else:
            inside = middle
    return outside


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1.0 - alpha)
