"""Numbers as a report shows them: each with its interval, and an en dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from pneumofed.common.evaluation.plots import wilson_interval
from pneumofed.common.ops.progress import say_seconds
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import MetricInterval

DASH = "–"
Z_95 = 1.959963984540054  # the 97.5% point of the normal distribution


@dataclass(frozen=True)
class ReportedEstimate:
    """A metric with its interval; None where it is undefined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, found: MetricInterval | None) -> ReportedEstimate:
        """Takes the estimate from a metric's interval; undefined where there is none."""
        return cls(found.value, found.low, found.high) if found else cls()

    @property
    def number(self) -> str:
        return number(self.value)

    @property
    def span(self) -> str:
        """`0.953–0.977`, or `−0.010 to 0.002` where a dash could be read as a minus; empty without an interval."""
        if self.low is None or self.high is None:
            return ""
        return f"{number(self.low)}{' to ' if self.low < 0 or self.high < 0 else DASH}{number(self.high)}"

    @property
    def clear(self) -> bool:
        """Whether the interval of a difference leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def number(value: float | None, digits: int = 3) -> str:
    """Formats a number: `0.966`, with a true minus sign; an en dash where `value` is undefined.

    Args:
        value: None, NaN and infinity are undefined.
        digits: after the decimal point.
    """
    value = _known(value)
    if value is None:
        return DASH
    text = f"{value:.{digits}f}"
    return text.replace("-", "−" if float(text) else "")  # what is rounded to zero has no sign


def whole(value: float | None) -> str:
    """Formats a whole number: `5,216`; an en dash where `value` is undefined."""
    value = _known(value)
    return DASH if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Formats a time: `48 s`, `12 min`, `3 h 05 min`."""
    seconds = _known(seconds)
    return DASH if seconds is None else say_seconds(seconds)


def megabytes(size: float | None) -> str:
    """Formats a size: `1,073 MB`, in units of 10**6 bytes."""
    size = _known(size)
    return DASH if size is None else f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def of_hundred(value: float) -> str:
    """Formats `value` in [0, 1] as a number of 100 images; never all or none of them where it is not exactly so."""
    if 0.995 <= value < 1:
        return "more than 99"
    return "fewer than 1" if 0 < value <= 0.005 else f"{100 * value:.0f}"


def hundred_span(estimate: ReportedEstimate) -> str:
    """Formats the interval in images of 100, rounded outward; empty without an interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{math.floor(100 * estimate.low + 1e-9)}{DASH}{math.ceil(100 * estimate.high - 1e-9)}"


def approximate(found: Metrics) -> dict[str, ReportedEstimate]:
    """Estimates metrics with 95% intervals from the counts in `found`, where no predictions are left.

    Wilson's interval for shares and `auroc_interval`; both take images as independent, while those of one patient are alike.
    """
    tn, fp, fn, tp = (count or 0 for count in (found.tn, found.fp, found.fn, found.tp))
    return {
        "auroc": auroc_interval(found.auroc, tp + fn, tn + fp),
        "accuracy": _share(tp + tn, tp + tn + fp + fn),
        "sensitivity": _share(tp, tp + fn),
        "specificity": _share(tn, tn + fp),
    }


def auroc_interval(area: float | None, positives: int, negatives: int) -> ReportedEstimate:
    """Computes the 95% interval of an AUROC (Newcombe 2006, Statistics in Medicine 25:559, method 5); it has a width at 0 and 1
    too.

    Each limit t solves |t - area| = z * SE(t) for the standard error of Hanley and McNeil 1982 with (m + n) / 2 - 1 for m - 1 and
    n - 1.

    Args:
        area: the AUROC in [0, 1]; None where it is undefined.
        positives: images with pneumonia.
        negatives: images without.

    Returns:
        The estimate; without an interval where a class has no image.
    """
    if area is None or not positives or not negatives:
        return ReportedEstimate(area)
    pairs, extra = positives * negatives, (positives + negatives) / 2 - 1

    def excess(t: float) -> float:
        variance = t * (1 - t) * (1 + extra * ((1 - t) / (2 - t) + t / (1 + t))) / pairs
        return (t - area) ** 2 - Z_95**2 * variance

    inside = min(max(area, 1e-12), 1 - 1e-12)  # at 0 and 1 the equation has a trivial root
    low = brentq(excess, 0.0, inside) if area > 0 else 0.0
    high = brentq(excess, inside, 1.0) if area < 1 else 1.0
    return ReportedEstimate(area, float(low), float(high))


def difference(first: ReportedEstimate, second: ReportedEstimate) -> ReportedEstimate:
    """Computes `first - second` of two independent sets, with its interval from theirs.

    Zou and Donner 2008, Statistics in Medicine 27:1693, eq. 2 ("MOVER"): it needs no normal distribution of either.

    Args:
        first: undefined, or with or without an interval.
        second: the same.

    Returns:
        Undefined where either is; without an interval where either has none.
    """
    if first.value is None or second.value is None:
        return ReportedEstimate()
    value = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return ReportedEstimate(value)
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return ReportedEstimate(value, value - below, value + above)


def mean_over(estimates: Sequence[ReportedEstimate]) -> ReportedEstimate:
    """Computes the mean over independent sets, with its interval from theirs as `difference` has it (Zou and Donner 2008).

    Args:
        estimates: at least one; with a value each.

    Returns:
        Without an interval where one of them has none.
    """
    values = [found.value for found in estimates if found.value is not None]
    mean, below, above = sum(values) / len(values), [], []
    for found in estimates:
        if found.value is None or found.low is None or found.high is None:
            return ReportedEstimate(mean)
        below.append(found.value - found.low)
        above.append(found.high - found.value)
    return ReportedEstimate(mean, mean - math.hypot(*below) / len(values), mean + math.hypot(*above) / len(values))


def _share(hits: int, n: int) -> ReportedEstimate:
    if not n:
        return ReportedEstimate()
    low, high = wilson_interval(np.array([hits / n]), np.array([n]))
    return ReportedEstimate(hits / n, max(0.0, float(low[0])), min(1.0, float(high[0])))


def _known(value: float | None) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
