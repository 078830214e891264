"""Means over images with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.evaluation.bootstrap import Bootstrap, Interval, draw_patients


def mean_interval(values: Sequence[float], patients: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """The mean of `values` with its 95 % interval by the percentile bootstrap over patients; NaN values are left out.

    Args:
        values: one an image.
        patients: of each image; without them every image is somebody else.
        seed: of the draws.
    """
    known = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(known)
    names = np.arange(len(known)) if patients is None else np.array(patients)
    people, number = np.unique(names[defined], return_inverse=True)
    if not len(people):
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), resamples=0)
    sums, counts = np.bincount(number, known[defined]), np.bincount(number)
    draws = np.concatenate(list(draw_patients(len(people), Bootstrap(seed=seed), rows=1000)))
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value=float(known[defined].mean()), low=float(low), high=float(high), resamples=len(means))
