"""Evidence against "nothing has changed" that may be looked at every day: test martingales.

A test martingale begins at 1, is never negative, and in expectation does not grow while nothing has changed. By Ville's inequality
(Ville 1939; Ramdas et al. 2023, "Game-theoretic statistics and safe anytime-valid inference") it then ever reaches 1 / a
with a probability of at most a, however often one looks. Here it is the wealth of gamblers who bet on conformal p-values (Vovk,
Gammerman & Shafer 2005, "Algorithmic Learning in a Random World", section 7.1; Vovk et al. 2021, "Retrain or not retrain: conformal test
martingales for change-point detection"), each of whom begins to bet on a day of its own, so that a change late in the year is found as
well (the Shiryaev mixture; Shin, Ramdas & Rinaldo 2024, "E-detectors").
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Direction = Literal["higher", "lower", "wider", "narrower"]

YEAR_DAYS = 365
FIRST_DAY_SHARE = 0.5
"""Of the gamblers, those that begin on the first day: a scanner unlike the reference from the outset is the commonest drift."""

TILTS = (0.6, 1.5, 5.0, 15.0, 50.0)
"""A density exp(tilt p) gains most where the mean of p is moved by about 0.05, 0.12, 0.31, 0.43, 0.48."""
DIRECTIONS: tuple[Direction, ...] = ("higher", "lower", "wider", "narrower")
ODDS = (1.5, 3.0, 8.0)


@dataclass(frozen=True)
class Course:
    """The evidence of one stream after each of its N values.

    Attributes:
        log_wealth: float64 [N], natural logarithm of the martingale.
        leader: int64 [N], the gambler who then holds most.
    """

    log_wealth: Floats
    leader: npt.NDArray[np.int64]


Labels = npt.NDArray[np.int64]


def conformal_p_values(
    reference: Floats, stream: Floats, rng: np.random.Generator, strata: tuple[Labels, Labels] | None = None
) -> Floats:
    """Computes conformal p-values, float64 [N] in (0, 1]: the share of reference and earlier stream below each value, ties broken by `rng`.

    Where reference and stream together are exchangeable, these are independent and uniform, exactly and for any reference size (Vovk,
    Gammerman & Shafer 2005, chapter 2, smoothed conformal predictors): the stream so far belongs to what the next value is compared with.
    A value near 1 is higher than the others.

    Args:
        reference: float64 [M], what the stream is compared with; may be empty.
        stream: float64 [N], in the order of arrival.
        rng: draws one uniform number for each value; with the same state the p-values are the same.
        strata: int64 ([M], [N]), the stratum of each value. A value is then compared only with those of its own stratum, which makes the
            p-values independent and uniform where each stratum by itself is exchangeable, however many come of each (Mondrian conformal
            predictors, section 4.5 of the same book). A stratum that the reference does not have is compared with its own earlier values.
    """
    of_reference, of_stream = strata or (np.zeros(len(reference), np.int64), np.zeros(len(stream), np.int64))
    lists = {label: sorted(reference[of_reference == label].tolist()) for label in np.unique(of_stream).tolist()}
    ties, p_values = rng.uniform(size=len(stream)), np.empty(len(stream))
    for index, (value, label) in enumerate(zip(stream.tolist(), of_stream.tolist(), strict=True)):
        known = lists[label]
        below, equal = bisect_left(known, value), bisect_right(known, value) - bisect_left(known, value)
        p_values[index] = (below + (1.0 - ties[index]) * (equal + 1)) / (len(known) + 1)
        insort(known, value)
    return p_values


def bet_on_ranks(p_values: Floats) -> Floats:
    """Computes log densities on [0, 1] at `p_values`, float64 [N, 20], so each bet is fair while these are uniform.

    Five gamblers for each of `DIRECTIONS`, in its order: tilted to high p, to low p, to both ends, and to the middle.
    """
    outward = np.abs(2.0 * p_values - 1.0)
    return np.concatenate([_tilted(values) for values in (p_values, 1.0 - p_values, outward, 1.0 - outward)], axis=1)


def direction_of(gambler: int) -> Direction:
    """Returns what the gambler of `bet_on_ranks` bets on."""
    return DIRECTIONS[gambler // len(TILTS)]


def bet_on_events(events: npt.NDArray[np.bool_], at_most: Floats) -> Floats:
    """Computes log likelihood ratios, float64 [N, 3], of odds that are 1.5, 3 and 8 times those of `at_most`.

    Fair or worse while each event's probability, given the past, is not above `at_most`.

    Args:
        events: bool [N], whether each came true, in the order of time.
        at_most: float64 [N] in (0, 1), the largest probability of each event that is still no drift.
    """
    bets = []
    for odds in ODDS:
        raised = odds * at_most / (1.0 - at_most + odds * at_most)
        bets.append(np.where(events, np.log(raised / at_most), np.log1p(-raised) - np.log1p(-at_most)))
    return np.stack(bets, axis=1)


def accumulate(log_bets: Floats, days: npt.NDArray[np.int64]) -> Course:
    """Computes the mixture over gamblers (columns of `log_bets` [N, J]) and days of beginning, a test martingale if each bet is fair.

    Args:
        log_bets: each gambler's log factor at each value.
        days: int64 [N], not decreasing, in [0, 365): day of each value, counted from the first of its year.
    """
    wealth, leader = np.empty(len(days)), np.empty(len(days), np.int64)
    gamblers = log_bets.shape[1]
    active, begun = np.full(gamblers, -np.inf), 0.0
    for day in np.unique(days):
        rows = slice(*np.searchsorted(days, [day, day + 1]))
        beginning = _begun(int(day - days[0])) - begun
        begun += beginning
        held = np.logaddexp(active, np.log(beginning / gamblers)) if beginning > 0 else active
        course = held + np.cumsum(log_bets[rows], axis=0)
        idle = np.full((len(course), 1), np.log(max(1.0 - begun, 1e-300)))
        wealth[rows] = np.logaddexp.reduce(np.concatenate([course, idle], axis=1), axis=1)
        leader[rows] = course.argmax(axis=1)
        active = course[-1]
    return Course(wealth, leader)


def change_day(log_bets: Floats, days: npt.NDArray[np.int64]) -> int:
    """Estimates the day of the change: from it on the bets have gained most up to their end.

    Args:
        log_bets: float64 [N], log factors of one gambler.
        days: int64 [N], day of each bet, not decreasing.

    Returns:
        One of `days`; 0 where there is no bet.
    """
    before = np.concatenate([[0.0], np.cumsum(log_bets)[:-1]])
    return int(days[int(before.argmin())]) if len(days) else 0


def _begun(day: int) -> float:
    """The share of gamblers that began on `day` or before."""
    return FIRST_DAY_SHARE + (1.0 - FIRST_DAY_SHARE) * min(day, YEAR_DAYS - 1) / (YEAR_DAYS - 1)


def _tilted(values: Floats) -> Floats:
    """Log of tilt exp(tilt v) / (exp(tilt) - 1), a density on [0, 1], for each of `TILTS`; float64 [N, 5]."""
    tilts = np.array(TILTS)
    return np.log(tilts / -np.expm1(-tilts)) - tilts * (1.0 - values[:, None])
