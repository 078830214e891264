"""Epsilon of so many steps of the Poisson-subsampled Gaussian mechanism, composed over rounds, runs and settings.

A `Mechanism` is data; epsilon is derived from all of them together, never added up. Neighbouring data sets differ by one unit added
or removed. Two accountants, both of Opacus, both upper bounds:

    rdp    Renyi differential privacy of the sampled Gaussian (Mironov, Talwar and Zhang 2019, section 3.3) and its conversion
           (Balle et al. 2020, theorem 21)
    prv    numerical composition of privacy random variables (Gopi, Lee and Wutschitz 2021), its upper end; tighter by some tenths.
           Where every step takes all units there is a closed form, which is exact (`_gaussian`)

Opacus and SciPy are imported by what computes: a `Mechanism` by itself is data, and whoever only names one must not wait a second.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from pneumofed.common.errors import ConfigError

AccountantName = Literal["prv", "rdp"]

NOISE_TOLERANCE = 1.0e-3
"""`noise_for` gives at most this share more noise than the smallest that it could find, plus one rounding step."""
LARGEST_NOISE = 1.0e4
_NOISE_STEP = 1.0e-4
_WHOLE_ORDERS: tuple[float, ...] = (*range(2, 64), 72, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)
_FRACTIONAL_ORDERS = (1.01, 1.02, 1.05, *(order / 10 for order in range(11, 110) if order % 10))
"""Opacus' own orders, continued to both sides. 1024 is the last whose binomial coefficients fit a double."""
_WHOLE_ORDERS_FROM_NOISE = 30.0
"""Above it the series of the fractional orders takes thousands of terms, and large orders are the best ones anyway."""
_EPSILON_ERROR = 2.0e-3
"""Of the numerical composition, as a share of epsilon."""
_SMALL_EPSILON = 0.05
_LARGEST_MESH = 1 << 21
"""Points of the numerical composition: 16 MB an array. Where the error would need more, the error grows in its place."""
_LARGEST_ERROR = 0.1
_DELTA_ERROR = 1.0e-3
_ROOT_ERROR = 1.0e-9
"""Added to the closed form's epsilon, as a share and in all: more than the search for its root may be off."""


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
    """Computes an upper bound of epsilon of all mechanisms together, in any order.

    0 for nothing, infinity where a step has no noise. `prv` falls back on `rdp` where the numerical composition cannot be had:
    noise so small, or steps so many, that its mesh would not fit the memory, or a delta that drowns in its rounding errors.

    Args:
        mechanisms: everything that was done with the same units; equal steps may be listed apart or together.
        delta: in (0, 1).
        accountant: which of the two bounds, see the top of this module.

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

    from scipy.optimize import brentq

    def spent(noise: float) -> float:
        return epsilon((*before, Mechanism(planned[0], noise, planned[1])), delta, accountant)

    def excess(part: float) -> float:
        return math.log(min(max(spent(low * 2.0 ** (part / 1024)), 1.0e-20), 1.0e20) / target_epsilon)

    low = _bracket(lambda noise: spent(noise) <= target_epsilon)
    part = math.ceil(brentq(excess, 0.0, 1024.0, xtol=0.5)) if excess(0.0) > 0.0 else 0
    while excess(part) > 0.0:
        part += 1
    while part and excess(part - 1) <= 0.0:
        part -= 1
    high = low * 2.0 ** (part / 1024)  # the smallest of those that differ by less than NOISE_TOLERANCE
    rounded = math.ceil(high / _NOISE_STEP) * _NOISE_STEP
    return rounded if spent(rounded) <= target_epsilon else high


def _bracket(is_within: Callable[[float], bool]) -> float:
    """A noise that is not enough, or next to none, and twice of which is."""
    low = 0.5
    while not is_within(2.0 * low):
        low *= 2.0
        if 2.0 * low > LARGEST_NOISE:
            raise ConfigError("no noise keeps to the epsilon: it has been spent already, or is too small for this delta")
    while is_within(low) and low > _NOISE_STEP:
        low /= 2.0
    return low


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
        # The best order is an extreme one, which still bounds; the mean's integral is checked by Opacus.
        warnings.simplefilter("ignore")
        if accountant == "prv" and all(mechanism.sampling_rate == 1.0 for mechanism in mechanisms):
            return _gaussian(mechanisms, delta)
        found = _prv(mechanisms, delta) if accountant == "prv" else math.inf
        return found if math.isfinite(found) else _rdp(mechanisms, delta, _all_orders(mechanisms))


def _gaussian(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Of steps that take all units: they compose to one Gaussian mechanism (Dong, Roth and Su 2022, corollary 3.3).

    With mu^2 the sum of 1 / noise^2, delta = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu) (Balle and Wang 2018, theorem
    8), which falls with epsilon. The bracket's end has less: there the first term by itself is delta at most.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    mu = math.sqrt(sum(mechanism.steps / mechanism.noise_multiplier**2 for mechanism in mechanisms))

    def excess(value: float) -> float:
        first, second = log_ndtr(mu / 2.0 - value / mu), value + log_ndtr(-mu / 2.0 - value / mu)
        return float(np.exp(first) - np.exp(second)) - delta

    if excess(0.0) <= 0.0:
        return 0.0
    root = float(brentq(excess, 0.0, mu * (mu / 2.0 + math.sqrt(-2.0 * math.log(delta)) + 1.0)))
    return root * (1.0 + _ROOT_ERROR) + _ROOT_ERROR


def _rdp(mechanisms: Iterable[Mechanism], delta: float, orders: tuple[float, ...]) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    curve = sum(one.steps * _rdp_of_step(one.sampling_rate, one.noise_multiplier, orders) for one in mechanisms)
    bound = float(get_privacy_spent(orders=list(orders), rdp=curve, delta=delta)[0])
    return math.inf if math.isnan(bound) else max(bound, 0.0)


@lru_cache(maxsize=1024)
def _rdp_of_step(rate: float, noise: float, orders: tuple[float, ...]) -> np.ndarray:
    """Renyi divergence of one step at each of the orders, float64 [orders]."""
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=list(orders)))


def _all_orders(mechanisms: Iterable[Mechanism]) -> tuple[float, ...]:
    only_whole = any(mechanism.noise_multiplier > _WHOLE_ORDERS_FROM_NOISE for mechanism in mechanisms)
    return tuple(sorted((*(() if only_whole else _FRACTIONAL_ORDERS), *_WHOLE_ORDERS)))


def _prv(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    """The upper end of the numerical composition, as Opacus' `PRVAccountant` has it; infinity where it cannot be had."""
    from opacus.accountants.analysis import prv

    delta_error = _DELTA_ERROR * delta
    bound, width = _rdp(mechanisms, delta, _WHOLE_ORDERS), _half_width(mechanisms, delta_error)
    if not math.isfinite(width):
        return math.inf
    steps = [mechanism.steps for mechanism in mechanisms]
    per_mesh = math.sqrt(sum(steps) * math.log(12.0 / delta_error) / 2.0)
    error = max(_EPSILON_ERROR * max(bound, _SMALL_EPSILON), 2.0 * width / _LARGEST_MESH * per_mesh)
    if error > _LARGEST_ERROR * max(bound, 1.0):
        return math.inf
    domain = prv.Domain.create_aligned(-width, width, error / per_mesh)
    try:
        variables = [prv.PoissonSubsampledGaussianPRV(one.sampling_rate, one.noise_multiplier) for one in mechanisms]
        parts = [prv.discretize(prv.TruncatedPrivacyRandomVariable(one, domain.t_min, domain.t_max), domain) for one in variables]
        found = float(prv.compose_heterogeneous(parts, steps).compute_epsilon(delta, delta_error, error)[2])
    except (RuntimeError, ValueError, IndexError):
        return math.inf
    return max(found, 0.0)


def _half_width(mechanisms: tuple[Mechanism, ...], delta_error: float) -> float:
    """Half the domain of the privacy loss outside of which lies too little mass to matter (Gopi et al., remark 5.6)."""
    single = delta_error / (8.0 * sum(mechanism.steps for mechanism in mechanisms))
    ones = [_rdp([replace(mechanism, steps=1)], single, _WHOLE_ORDERS) for mechanism in mechanisms]
    return max(_rdp(mechanisms, delta_error / 4.0, _WHOLE_ORDERS), *ones) + 3.0
