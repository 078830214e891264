"""The watch: each scanner's images against the reference or its own baseline, with one promise for all of it.

While nothing changes, the chance that any alarm is ever raised at a site within a year is at most `RATE`, over all scanners, all
quantities and all days, however they depend on one another: each stream's evidence is a test martingale (`common.drift.evidence`)
that alarms at 1 / (its share of `RATE`), and the shares sum to at most one (Bonferroni). The k-th scanner (or new baseline) of a year has
the share 1 / (k (k + 1)), so that scanners need not be known in advance. "Nothing changes" means: reference and arriving images, one
a patient, are exchangeable; for corrections, that verdicts err as often as the calibrated probability says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.drift.bets import Baseline, Bets, Test, bet, list_tests
from common.drift.evidence import YEAR_DAYS, Direction, Floats, accumulate, change_day
from common.drift.observations import Observations
from common.drift.reference import Reference

RATE = 0.05
"""Chance of any false alarm at a site within a year."""


@dataclass(frozen=True)
class Stream:
    """One quantity of one scanner within one year of watching.

    Attributes:
        scanner: the group.
        quantity: its name.
        year: of watching, counted from 0.
        days: int64 [N], ordinals of the days of its values.
        log_evidence: float64 [N], log of the test martingale after each.
        log_limit: an alarm is raised where `log_evidence` reaches it.
        direction: where the quantity moved, by the gambler who held most at the alarm, or else where the evidence was greatest.
        since: ordinal of the day from which on it seems to have moved.
        rows: int64 [N], the images of its values.
        test: what is compared with what.
    """

    scanner: str
    quantity: str
    year: int
    days: npt.NDArray[np.int64]
    log_evidence: Floats
    log_limit: float
    direction: Direction
    since: int
    rows: npt.NDArray[np.int64]
    test: Test

    @property
    def alarm(self) -> int | None:
        """Position in `days` of the value that raised the alarm; None without one."""
        raised = self.log_evidence >= self.log_limit
        return int(raised.argmax()) if raised.any() else None

    @property
    def p_value(self) -> float:
        """Valid at any time and adjusted for all that is watched in the year: `RATE` or less where there is an alarm."""
        return float(min(1.0, RATE * np.exp(self.log_limit - self.log_evidence.max())))


def watch(found: Observations, reference: Reference, baselines: Sequence[Baseline] = ()) -> list[Stream]:
    """Every stream of every year of `found`: years count from its first day, scanners stand in the order of their first images."""
    streams = []
    quantities = len(reference.quantities) + 2
    for rank, test in enumerate(list_tests(found, baselines), 1):
        log_limit = float(np.log(quantities * rank * (rank + 1) / RATE))
        streams += [stream for bets in bet(found, reference, test) for stream in _by_year(bets, int(found.days[0]), log_limit)]
    return streams


def _by_year(bets: Bets, first_day: int, log_limit: float) -> list[Stream]:
    """Every year begins anew, with a promise of its own."""
    years = (bets.days - first_day) // YEAR_DAYS
    return [_follow(bets, years == year, int(year), log_limit) for year in np.unique(years)]


def _follow(bets: Bets, inside: npt.NDArray[np.bool_], year: int, log_limit: float) -> Stream:
    days, log_bets = bets.days[inside], bets.log_bets[inside]
    course = accumulate(log_bets, days - days[0])
    raised = course.log_wealth >= log_limit
    decisive = int(raised.argmax()) if raised.any() else int(course.log_wealth.argmax())
    leader = int(course.leader[decisive])
    since = change_day(log_bets[: decisive + 1, leader], days[: decisive + 1])
    return Stream(
        scanner=bets.test.scanner,
        quantity=bets.quantity,
        year=year,
        days=days,
        rows=bets.rows[inside],
        log_evidence=course.log_wealth,
        log_limit=log_limit,
        direction=bets.directions[leader],
        since=since,
        test=bets.test,
    )
