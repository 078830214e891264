"""Epsilon of so many steps of the Poisson-subsampled Gaussian mechanism, composed over rounds, runs and settings.

A `Mechanism` is data; epsilon is derived from all of them together, never added up. Neighbouring data sets differ by one unit added
or removed. Two accountants, both of Opacus, both upper bounds:

    rdp    Renyi differential privacy of the sampled Gaussian (Mironov, Talwar and Zhang 2019, section 3.3) and its conversion
           (Balle et al. 2020, theorem 21)
    prv    numerical composition of privacy random variables (Gopi, Lee and Wutschitz 2021), its upper end; tighter by some tenths
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant

from common.errors import ConfigError

AccountantName = Literal["prv", "rdp"]

NOISE_TOLERANCE = 1.0e-3
"""`noise_for` gives at most this share more noise than the smallest that it could find, plus one rounding step."""
LARGEST_NOISE = 1.0e4
_NOISE_STEP = 1.0e-4
_ORDERS_WHOLE = [*range(2, 64), 72, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024]
_ORDERS_BETWEEN = [1.01, 1.02, 1.05, *(order / 10 for order in range(11, 110) if order % 10)]
"""Opacus' own orders, continued to both sides. 1024 is the last whose binomial coefficients fit a double."""
_WHOLE_ORDERS_FROM_NOISE = 30.0
"""Above it the series of the fractional orders takes thousands of terms, and large orders are the best ones anyway."""
_EPSILON_ERROR = 2.0e-3
"""Of the numerical composition, as a share of the epsilon of `rdp`."""
_LARGEST_MESH = 1 << 21
"""Points of the numerical composition: 16 MB an array. Where the error would need more, the error grows in its place."""
_LARGEST_ERROR = 0.1
_DELTA_ERROR = 1.0e-3


@dataclass(frozen=True, order=True)
class Mechanism:
    """So many steps of the Poisson-subsampled Gaussian mechanism.

    Each step draws each unit with `sampling_rate`, sums vectors of length C at most and adds Gaussian noise of standard deviation
    `noise_multiplier` * C. A rate of 1 is the plain Gaussian mechanism, which also stands for noised counts. No noise is no privacy.

    Raises:
        ConfigError: a rate outside (0, 1], a noise that is negative or no number, fewer than 0 steps.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sampling_rate <= 1.0:
            raise ConfigError(f"the sampling rate must be in (0, 1], got {self.sampling_rate}")
        if not (self.noise_multiplier >= 0.0 and math.isfinite(self.noise_multiplier)):
            raise ConfigError(f"the noise multiplier must be 0 or more, got {self.noise_multiplier}")
        if self.steps < 0:
            raise ConfigError(f"the number of steps must be 0 or more, got {self.steps}")


def epsilon(mechanisms: Sequence[Mechanism], delta: float, accountant: AccountantName) -> float:
    """Epsilon at `delta` of all `mechanisms` together, in any order: an upper bound.

    0 for nothing, infinity where a step has no noise. `prv` answers with the smaller of both bounds, and so falls back on `rdp` where
    the numerical composition cannot be had: noise so small, or steps so many, that its mesh would not fit the memory, or a delta that
    drowns in its rounding errors.

    Raises:
        ConfigError: delta is not in (0, 1).
    """
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta must be in (0, 1), got {delta}")
    return _epsilon(_together(mechanisms), delta, accountant)


@lru_cache(maxsize=256)
def noise_for(
    target_epsilon: float,
    delta: float,
    planned: tuple[float, int],
    accountant: AccountantName,
    before: tuple[Mechanism, ...] = (),
) -> float:
    """The smallest noise multiplier with which `before` and what is `planned` together stay within `target_epsilon`.

    Pure in its arguments, so that every round of a run finds the same noise. Rounded up to 0.0001 and never below what the target
    needs: `epsilon` of the result is `target_epsilon` at most.

    Args:
        target_epsilon: not to be exceeded.
        delta: in (0, 1).
        planned: sampling rate and number of steps.
        accountant: composes.
        before: mechanisms that were spent earlier.

    Raises:
        ConfigError: no noise up to 10,000 is enough, since `before` has spent the target already.
    """

    def is_within(noise: float) -> bool:
        return epsilon((*before, Mechanism(planned[0], noise, planned[1])), delta, accountant) <= target_epsilon

    low, high = _bracket(is_within)
    while high > low * (1.0 + NOISE_TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_within(middle) else (middle, high)
    rounded = math.ceil(high / _NOISE_STEP) * _NOISE_STEP
    return rounded if is_within(rounded) else high


def _bracket(is_within: Callable[[float], bool]) -> tuple[float, float]:
    """Two noises of which the second is enough and the first is not, or is next to none."""
    low = high = 1.0
    while not is_within(high):
        low, high = high, 2.0 * high
        if high > LARGEST_NOISE:
            raise ConfigError("no noise keeps to the epsilon: it has been spent already, or is too small for this delta")
    while low == high or (is_within(low) and low > _NOISE_STEP):
        low, high = low / 2.0, low
    return low, high


def _together(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal steps counted together, sorted: composition knows no order, and each kind of step costs the same once."""
    steps: Counter[tuple[float, float]] = Counter()
    for mechanism in mechanisms:
        steps[mechanism.sampling_rate, mechanism.noise_multiplier] += mechanism.steps
    return tuple(Mechanism(rate, noise, number) for (rate, noise), number in sorted(steps.items()) if number)


@lru_cache(maxsize=1024)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float, accountant: AccountantName) -> float:
    if not mechanisms:
        return 0.0
    if any(mechanism.noise_multiplier == 0.0 for mechanism in mechanisms):
        return math.inf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of an extreme order, which is still a bound, and of integrals that are checked by their sum
        bound = _rdp(mechanisms, delta)
        return min(bound, _prv(mechanisms, delta, bound)) if accountant == "prv" else bound


def _history(mechanisms: tuple[Mechanism, ...]) -> list[tuple[float, float, int]]:
    return [(mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.steps) for mechanism in mechanisms]


def _rdp(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    accountant = RDPAccountant()
    accountant.history = _history(mechanisms)
    few = any(mechanism.noise_multiplier > _WHOLE_ORDERS_FROM_NOISE for mechanism in mechanisms)
    bound = float(accountant.get_epsilon(delta, alphas=_ORDERS_WHOLE if few else sorted([*_ORDERS_BETWEEN, *_ORDERS_WHOLE])))
    return math.inf if math.isnan(bound) else max(bound, 0.0)


def _prv(mechanisms: tuple[Mechanism, ...], delta: float, bound: float) -> float:
    """The upper end of the numerical composition; infinity where it cannot be had."""
    error = _epsilon_error(mechanisms, delta, bound)
    if error > _LARGEST_ERROR * max(bound, 1.0):
        return math.inf
    accountant = PRVAccountant()
    accountant.history = _history(mechanisms)
    try:
        found = float(accountant.get_epsilon(delta, eps_error=error, delta_error=_DELTA_ERROR * delta))
    except (RuntimeError, ValueError, MemoryError):
        return math.inf
    return max(found, 0.0) if math.isfinite(found) else math.inf


def _epsilon_error(mechanisms: tuple[Mechanism, ...], delta: float, bound: float) -> float:
    """The error to ask for: a share of `bound`, more where the mesh would grow too fine (mesh size as in Gopi et al., theorem 5.5)."""
    if not math.isfinite(bound):
        return math.inf
    steps = sum(mechanism.steps for mechanism in mechanisms)
    per_mesh = math.sqrt(steps * math.log(12.0 / (_DELTA_ERROR * delta)) / 2.0)
    width = 2.0 * (_rdp(mechanisms, _DELTA_ERROR * delta / 4.0) + 4.0)
    return max(_EPSILON_ERROR * bound, width / _LARGEST_MESH * per_mesh)
