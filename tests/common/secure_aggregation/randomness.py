"""The tests of randomness that the threat model states; each fails for random bytes once in a million times."""

from __future__ import annotations

import numpy as np
from scipy.stats import chisquare, ks_2samp, norm

LEVEL = 1e-6


def looks_random(data: bytes) -> bool:
    """Chi-square of the bytes' values, of their pairs at even places, and serial correlation at lags 1 to 8."""
    values = np.frombuffer(data, np.uint8)
    pairs = values[: len(values) // 2 * 2].reshape(-1, 2) >> 4
    counts = (np.bincount(values, minlength=256), np.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256))
    return min(chisquare(count).pvalue for count in counts) > LEVEL and not correlated(values, values)


def correlated(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether byte sequences of one length have a linear correlation, at lags 0 to 8 (1 to 8 of a sequence with itself)."""
    lags = range(1 if first is second else 0, 9)
    x, y = ((part.astype(np.float64) - part.mean()) / part.std() for part in (first, second))
    found = [float(x[lag:] @ y[: len(y) - lag]) / (len(y) - lag) ** 0.5 for lag in lags]
    return bool(2 * norm.sf(max(np.abs(found))) * len(found) < LEVEL)


def same_distribution(first: bytes, second: bytes) -> bool:
    """Two-sample Kolmogorov-Smirnov over 32-bit words."""
    return bool(ks_2samp(*(np.frombuffer(data, np.uint32) for data in (first, second))).pvalue > LEVEL)
