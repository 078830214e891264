"""Means over images with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from common.evaluation.bootstrap import Bootstrap, Interval, draw_patients

LEAST_PATIENTS = 5
"""Resamples of fewer hardly differ from each other, and their interval would claim a precision that is not there."""


def mean_interval(values: Sequence[float], patients: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """The mean of `values` with its 95 % interval by the percentile bootstrap over patients; NaN values are left out.

    The interval is NaN for fewer than `LEAST_PATIENTS`.

    Args:
        values: one an image.
        patients: of each image; without them every image is somebody else.
        seed: of the draws.
    """
    known = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(known)
    names = np.arange(len(known)) if patients is None else np.array(patients)
    people, number = np.unique(names[defined], return_inverse=True)
    if len(people) < LEAST_PATIENTS:
        mean = float(known[defined].mean()) if len(people) else math.nan
        return Interval(value=mean, low=math.nan, high=math.nan, resamples=0)
    sums, counts = np.bincount(number, known[defined]), np.bincount(number)
    draws = np.concatenate(list(draw_patients(len(people), Bootstrap(seed=seed), rows=1000)))
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(known[defined].mean()), low=float(low), high=float(high), resamples=len(means))


def show_interval(found: Interval, digits: int = 2) -> str:
    """The mean with its interval, or that there is none."""
    if math.isnan(found["value"]):
        return "not known"
    known = not math.isnan(found["low"])
    interval = f"{found['low']:.{digits}f} to {found['high']:.{digits}f}" if known else "too few for an interval"
    return f"{found['value']:.{digits}f} ({interval})"
