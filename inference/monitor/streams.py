"""Evidence over time, with one guarantee for all of it, and tests of single days.

`watch` accumulates the e-processes of each scanner's images against the reference or the scanner's own baseline. While nothing changes,
the chance that any alarm is ever raised at a site within a year is at most `FALSE_ALARM_RATE`, over all scanners, all quantities and all
days, however they depend on one another: each stream's evidence is a test martingale (`inference.monitor.e_processes`) that alarms at 1 /
(its share of `FALSE_ALARM_RATE`), and the shares sum to at most one (Bonferroni). The k-th scanner (or new baseline) of a year has the
share 1 / (k (k + 1)), so that scanners need not be known in advance. "Nothing changes" means: reference and arriving images, one a
patient, are exchangeable (within each group of patients, where both sides state groups); for corrections, that verdicts err as often as
the calibrated probability says.

`daily_tests` tests one scanner on one day: what moved on that day, without memory of other days. No alarm rests on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumofed.common.evaluation.similarity import stability_index
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.monitor.e_processes import (
    YEAR_DAYS,
    Baseline,
    Direction,
    EProcess,
    Rows,
    Test,
    accumulate,
    change_day,
    e_processes,
    first_of_each_unit,
    list_tests,
)
from pneumofed.inference.monitor.reference import PROBABILITY, Observations, Reference
from pneumofed.inference.monitor.two_sample import (
    Floats,
    Prevalence,
    bin_counts,
    compare_rows,
    compare_values,
    decile_edges,
    estimate_prevalence,
    holm,
)

FALSE_ALARM_RATE = 0.05
"""Chance of any false alarm at a site within a year."""

MIN_DAY_PATIENTS = 8
"""With fewer a day is counted and not tested: no test of so few could show much."""
MAX_KERNEL_ROWS = 500
"""Of a day and of what it is compared with, in the kernel test, whose cost grows with their square."""
EMBEDDING = "embedding"


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
        """Valid at any time and adjusted for all that is watched in the year: `FALSE_ALARM_RATE` or less where there is an alarm."""
        return float(min(1.0, FALSE_ALARM_RATE * np.exp(self.log_limit - self.log_evidence.max())))


def watch(found: Observations, reference: Reference, baselines: Sequence[Baseline] = ()) -> list[Stream]:
    """Computes every stream of every year of `found`: years count from its first day, scanners stand in the order of their first images.

    Args:
        found: all judged images, in the order of arrival.
        reference: of the bundle that judged them.
        baselines: accepted by a person; see `list_tests`.
    """
    streams = []
    quantities = len(reference.quantities) + len(reference.kinds) + 2
    for rank, test in enumerate(list_tests(found, baselines), 1):
        log_limit = float(np.log(quantities * rank * (rank + 1) / FALSE_ALARM_RATE))
        streams += [
            stream
            for process in e_processes(found, reference, test)
            for stream in _by_year(process, int(found.days[0]), log_limit)
        ]
    return streams


def _by_year(process: EProcess, first_day: int, log_limit: float) -> list[Stream]:
    """Every year begins anew, with a promise of its own."""
    years = (process.days - first_day) // YEAR_DAYS
    return [_follow(process, years == year, int(year), log_limit) for year in np.unique(years)]


def _follow(process: EProcess, inside: npt.NDArray[np.bool_], year: int, log_limit: float) -> Stream:
    days, log_bets = process.days[inside], process.log_bets[inside]
    course = accumulate(log_bets, days - days[0])
    raised = course.log_wealth >= log_limit
    decisive = int(raised.argmax()) if raised.any() else int(course.log_wealth.argmax())
    leader = int(course.leader[decisive])
    since = change_day(log_bets[: decisive + 1, leader], days[: decisive + 1])
    return Stream(
        scanner=process.test.scanner,
        quantity=process.quantity,
        year=year,
        days=days,
        rows=process.rows[inside],
        log_evidence=course.log_wealth,
        log_limit=log_limit,
        direction=process.directions[leader],
        since=since,
        test=process.test,
    )


@dataclass(frozen=True)
class DailyTest:
    """One scanner on one day, tested by itself.

    Attributes:
        day: ordinal.
        scanner: the group.
        images: that arrived.
        patients: whose first image was judged; each counts once.
        refused: images that the model would not judge.
        read: images whose verdict a reader accepted or changed.
        corrected: those that were changed.
        expected_corrections: of them, by the calibrated probabilities.
        p_values: by quantity and for `EMBEDDING`, adjusted together by Holm; empty with too few patients.
        stability_index: of the probabilities; None with too few patients.
        prevalence: of pneumonia, if nothing but the share has changed; None where it cannot be estimated.
    """

    day: int
    scanner: str
    images: int
    patients: int
    refused: int
    read: int
    corrected: int
    expected_corrections: float
    p_values: dict[str, float]
    stability_index: float | None
    prevalence: Prevalence | None


def daily_tests(found: Observations, reference: Reference, tests: Sequence[Test], since: int = 0) -> list[DailyTest]:
    """Tests each scanner on each day by itself, in the order of `tests` and days.

    Args:
        found: all judged images, in the order of arrival.
        reference: of the bundle that judged them.
        tests: of `list_tests`.
        since: ordinal of the first day that is tested.
    """
    return [seen for test in tests for seen in _test_days(found, reference, test, since)]


def _test_days(found: Observations, reference: Reference, test: Test, since: int) -> Iterator[DailyTest]:
    known, rows = (
        _ComparedWith.of(found, reference, test),
        test.rows[(test.rows >= test.start) & (found.days[test.rows] >= since)],
    )
    for day in np.unique(found.days[rows]):
        today = rows[found.days[rows] == day]
        judged = first_of_each_unit(today[~found.refused[today]], found.units)
        read = today[(found.read_order[today] >= 0) & ~found.refused[today]]
        scores, enough = found.probabilities[judged], len(judged) >= MIN_DAY_PATIENTS
        yield DailyTest(
            day=int(day),
            scanner=test.scanner,
            images=len(today),
            patients=len(judged),
            refused=int(found.refused[today].sum()),
            read=len(read),
            corrected=int(found.corrected[read].sum()),
            expected_corrections=float(found.expected_errors[read].sum()),
            p_values=_compare(found, judged, reference, known, (test.scanner, int(day))) if enough else {},
            stability_index=_stability(known.values[PROBABILITY], scores) if enough else None,
            prevalence=estimate_prevalence(float(scores.mean()), float(scores.var()), len(scores), reference.separation)
            if enough
            else None,
        )


@dataclass(frozen=True)
class _ComparedWith:
    """What a scanner is compared with: the reference, or its own baseline."""

    values: dict[str, Floats]
    rows: Floats

    @classmethod
    def of(cls, found: Observations, reference: Reference, test: Test) -> _ComparedWith:
        if not test.own_baseline:
            return cls(reference.values, reference.rows)
        before = test.rows[(test.rows < test.start) & ~found.refused[test.rows]]
        baseline = found.take(first_of_each_unit(before, found.units))
        return cls(reference.values_of(baseline), baseline.embedding)


def _compare(
    found: Observations, judged: Rows, reference: Reference, known: _ComparedWith, day: tuple[str, int]
) -> dict[str, float]:
    today = found.take(judged)
    p_values = {name: compare_values(known.values[name], values) for name, values in reference.values_of(today).items()}
    rng = numpy_generator("drift", "look", reference.digest, *day)
    p_values[EMBEDDING] = compare_rows(
        known.rows[:MAX_KERNEL_ROWS], today.embedding[:MAX_KERNEL_ROWS], reference.embedding.bandwidth, rng
    )
    return dict(zip(p_values, holm(list(p_values.values())).tolist(), strict=True))


def _stability(reference: Floats, found: Floats) -> float:
    edges = decile_edges(reference)
    return stability_index(bin_counts(reference, edges), bin_counts(found, edges))
