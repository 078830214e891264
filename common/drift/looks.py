"""One scanner on one day against its reference: what moved on that day, without memory of other days."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.drift.bets import Rows, Test, first_of_each_unit
from common.drift.label_shift import Prevalence, estimate_prevalence
from common.drift.observations import Observations
from common.drift.reference import PROBABILITY, Reference
from common.drift.two_sample import Floats, bin_counts, compare_rows, compare_values, decile_edges, holm, stability_index
from common.seeds import numpy_generator

LEAST_PATIENTS = 8
"""With fewer a day is counted and not tested: no test of so few could tell much."""
MOST_ROWS = 500
"""Of a day and of what it is compared with, in the kernel test, whose cost grows with their square."""
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Look:
    """A scanner's day.

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
        prevalence: of pneumonia, if nothing but the share has changed; None where it cannot be told.
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


def daily_looks(found: Observations, reference: Reference, tests: Sequence[Test], since: int = 0) -> list[Look]:
    """A look at each day from the ordinal `since` on at each scanner, in the order of `tests` and days."""
    return [seen for test in tests for seen in _look_at(found, reference, test, since)]


def _look_at(found: Observations, reference: Reference, test: Test, since: int) -> Iterator[Look]:
    known, rows = _Known.of(found, reference, test), test.rows[(test.rows >= test.start) & (found.days[test.rows] >= since)]
    for day in np.unique(found.days[rows]):
        today = rows[found.days[rows] == day]
        judged = first_of_each_unit(today[~found.refused[today]], found.units)
        read = today[(found.read_order[today] >= 0) & ~found.refused[today]]
        scores, enough = found.probabilities[judged], len(judged) >= LEAST_PATIENTS
        yield Look(
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
class _Known:
    """What a scanner is compared with: the reference, or its own baseline."""

    values: dict[str, Floats]
    rows: Floats

    @classmethod
    def of(cls, found: Observations, reference: Reference, test: Test) -> _Known:
        if not test.own_baseline:
            return cls(reference.values, reference.rows)
        before = test.rows[(test.rows < test.start) & ~found.refused[test.rows]]
        baseline = found.take(first_of_each_unit(before, found.units))
        return cls(reference.values_of(baseline), baseline.embedding)


def _compare(found: Observations, judged: Rows, reference: Reference, known: _Known, day: tuple[str, int]) -> dict[str, float]:
    today = found.take(judged)
    p_values = {name: compare_values(known.values[name], values) for name, values in reference.values_of(today).items()}
    rng = numpy_generator("drift", "look", reference.digest, *day)
    p_values[EMBEDDING] = compare_rows(known.rows[:MOST_ROWS], today.embedding[:MOST_ROWS], reference.embedding.bandwidth, rng)
    return dict(zip(p_values, holm(list(p_values.values())).tolist(), strict=True))


def _stability(reference: Floats, found: Floats) -> float:
    edges = decile_edges(reference)
    return stability_index(bin_counts(reference, edges), bin_counts(found, edges))
