"""Evidence against "nothing has changed" that may be looked at every day: test martingales, and the e-processes of a site.

A test martingale begins at 1, is never negative, and in expectation does not grow while nothing has changed. By Ville's inequality
(Ville 1939; Ramdas et al. 2023, "Game-theoretic statistics and safe anytime-valid inference") it then ever reaches 1 / a
with a probability of at most a, however often one looks. Here it is the wealth of gamblers who bet on conformal p-values (Vovk,
Gammerman & Shafer 2005, "Algorithmic Learning in a Random World", section 7.1; Vovk et al. 2021, "Retrain or not retrain: conformal test
martingales for change-point detection"), each of whom begins to bet on a day of its own, so that a change late in the year is found as
well (the Shiryaev mixture; Shin, Ramdas & Rinaldo 2024, "E-detectors").

`list_tests` says which images are compared with which: those of a scanner with the reference of the bundle, or with its own baseline once
a person has accepted one. `e_processes` computes the factors of one such test, one log factor an image, for each quantity, for refusals and
for corrections by readers; `streams` accumulates the factors over days.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.monitor.reference import MIXES, UNKNOWN_GROUP, Observations, Reference, column_of, stratum_labels

Floats = npt.NDArray[np.float64]
Direction = Literal["higher", "lower", "wider", "narrower"]

YEAR_DAYS = 365
FIRST_DAY_SHARE = 0.5
"""Of the gamblers, those that begin on the first day: a scanner unlike the reference from the outset is the commonest drift."""

TILTS = (0.6, 1.5, 5.0, 15.0, 50.0)
"""A density exp(tilt p) gains most where the mean of p is moved by about 0.05, 0.12, 0.31, 0.43, 0.48."""
DIRECTIONS: tuple[Direction, ...] = ("higher", "lower", "wider", "narrower")
ODDS = (1.5, 3.0, 8.0)

Rows = npt.NDArray[np.int64]

CORRECTIONS, REFUSALS = "corrections", "refusals"
LEAST_ERROR = 0.02
"""A verdict's chance of being wrong is taken as at least this: calibration is not known more finely, and readers differ too."""
ALLOWED_REFUSALS = 0.05
"""Share of images that the model may refuse without anyone being called."""

_DIRECTIONS = tuple(direction for direction in DIRECTIONS for _ in TILTS)
_MORE: tuple[Direction, ...] = ("higher", "higher", "higher")


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


@dataclass(frozen=True)
class Baseline:
    """From `start` on, a scanner is compared with its own images from `first` to `start`, which a person found in order.

    Both are positions in the arrivals, as rows of `Observations`.
    """

    scanner: str
    first: int
    start: int


@dataclass(frozen=True)
class Test:
    """The images of `scanner` in `rows` that are not before `start`, against those before, or the reference if `own_baseline` is not."""

    __test__ = False

    scanner: str
    start: int
    rows: Rows
    own_baseline: bool


@dataclass(frozen=True)
class EProcess:
    """The e-process of one quantity in one test, as log factors of J gamblers at N images.

    Attributes:
        test: what is compared with what.
        quantity: its name.
        rows: int64 [N], the images.
        days: int64 [N], ordinals of the days on which the images became known.
        log_bets: float64 [N, J], log factor of each gambler at each image; each is fair while nothing changes.
        directions: what each of the gamblers bets on.
    """

    test: Test
    quantity: str
    rows: Rows
    days: npt.NDArray[np.int64]
    log_bets: Floats
    directions: tuple[Direction, ...]


def list_tests(found: Observations, baselines: Sequence[Baseline]) -> list[Test]:
    """Lists what is compared with what: one test for each scanner and one for each baseline, in the order in which they began.

    Args:
        found: all judged images, in the order of arrival.
        baselines: accepted by a person, in any order; each ends the test of its scanner before it.
    """
    tests = []
    for scanner in np.unique(found.scanners):
        rows = np.flatnonzero(found.scanners == scanner)
        own = sorted((line for line in baselines if line.scanner == scanner), key=lambda line: line.start)
        starts, firsts = [int(rows[0]), *(line.start for line in own)], [int(rows[0]), *(line.first for line in own)]
        for start, first, end in zip(starts, firsts, [*starts[1:], len(found)], strict=True):
            inside = rows[(rows >= first) & (rows < end)]
            tests.append(Test(str(scanner), start, inside, own_baseline=first < start))
    return sorted(tests, key=lambda test: test.start)


def e_processes(found: Observations, reference: Reference, test: Test) -> Iterator[EProcess]:
    """Computes the e-process of each quantity of `reference` over the judged images, then of the mixes
    of patients, of refusals and of corrections.

    Each value is compared within its stratum: the groups of those of `reference.kinds` that the scanner states. What it states is seen
    from its first image, since no bet may rest on what comes later.

    Args:
        found: all judged images, in the order of arrival.
        reference: of the bundle that judged them; its digest seeds how ties are broken.
        test: the scanner, and what its images are compared with. A patient counts once, with the first image.

    Returns:
        One at a time, quantities in the order of `reference.quantities`, then the mixes, `REFUSALS` and `CORRECTIONS`.
    """
    judged = first_of_each_unit(test.rows[~found.refused[test.rows]], found.units)
    values, of_reference, old = reference.values_of(found.take(judged)), reference.values, judged < test.start
    kinds = _stated_kinds(found, reference, test)
    labels = stratum_labels(found.groups[judged], kinds)
    for quantity in reference.quantities:
        known = values[quantity][old] if test.own_baseline else of_reference[quantity]
        of_known = labels[old] if test.own_baseline else stratum_labels(reference.groups_of(quantity), kinds)
        rng = numpy_generator("drift", "ties", reference.digest, test.scanner, test.start, quantity)
        ranks = conformal_p_values(known, values[quantity][~old], rng, (of_known, labels[~old]))
        yield EProcess(test, quantity, judged[~old], found.days[judged[~old]], bet_on_ranks(ranks), _DIRECTIONS)
    for kind in kinds:
        yield _bet_on_mix(found, reference, test, kind)
    yield _bet_on_refusals(found, test)
    yield _bet_on_corrections(found, test)


def mix_rows(found: Observations, test: Test, kind: str) -> Rows:
    """Selects the first image of each patient whose group is known; those that cannot be judged count too, since they came.

    Args:
        found: all judged images, in the order of arrival.
        test: the scanner; rows before its start are those of its own baseline.
        kind: of groups.
    """
    known = found.groups[test.rows, column_of(kind)] != UNKNOWN_GROUP
    return first_of_each_unit(test.rows[known], found.units)


def _stated_kinds(found: Observations, reference: Reference, test: Test) -> tuple[str, ...]:
    first = found.groups[test.rows[test.rows >= test.start][:1]]
    return tuple(kind for kind in reference.kinds if np.any(first[:, column_of(kind)] != UNKNOWN_GROUP))


def _bet_on_mix(found: Observations, reference: Reference, test: Test, kind: str) -> EProcess:
    """The order of the groups (`KINDS`) is ranked as a value, ties broken at random: more of the young are lower ranks."""
    rows, column = mix_rows(found, test, kind), column_of(kind)
    old = rows < test.start
    known = found.groups[rows[old], column] if test.own_baseline else reference.groups[:, column]
    known = known[known != UNKNOWN_GROUP].astype(np.float64)
    rng = numpy_generator("drift", "ties", reference.digest, test.scanner, test.start, MIXES[kind])
    ranks = conformal_p_values(known, found.groups[rows[~old], column].astype(np.float64), rng)
    return EProcess(test, MIXES[kind], rows[~old], found.days[rows[~old]], bet_on_ranks(ranks), _DIRECTIONS)


def first_of_each_unit(rows: Rows, units: npt.NDArray[np.str_]) -> Rows:
    """Selects those of `rows` whose patient did not come before: images of one patient are alike, and must not count as independent.

    Args:
        rows: int64 [N], positions in the order in which the images count.
        units: str [M], the patient of each image, see `Observations.units`.

    Returns:
        int64 [P], a subset of `rows` in their order.
    """
    return rows[np.sort(np.unique(units[rows], return_index=True)[1])]


def _bet_on_refusals(found: Observations, test: Test) -> EProcess:
    rows = first_of_each_unit(test.rows[test.rows >= test.start], found.units)
    log_bets = bet_on_events(found.refused[rows], np.full(len(rows), ALLOWED_REFUSALS))
    return EProcess(test, REFUSALS, rows, found.days[rows], log_bets, _MORE)


def _bet_on_corrections(found: Observations, test: Test) -> EProcess:
    """In the order of reading, since a bet may only rest on what was known before."""
    read = test.rows[(test.rows >= test.start) & (found.read_order[test.rows] >= 0) & ~found.refused[test.rows]]
    rows = first_of_each_unit(read[np.argsort(found.read_order[read], kind="stable")], found.units)
    at_most = np.clip(found.expected_errors[rows], LEAST_ERROR, 1.0 - LEAST_ERROR)
    log_bets = bet_on_events(found.corrected[rows], at_most)
    return EProcess(test, CORRECTIONS, rows, found.read_days[rows], log_bets, _MORE)
