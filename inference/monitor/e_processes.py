"""The e-processes of a site: evidence of change in each quantity of each scanner, one log factor an image.

`list_tests` says which images are compared with which: those of a scanner with the reference of the bundle, or with its own baseline once
a person has accepted one. `e_processes` computes the factors of one such test, for each quantity, for refusals and for corrections by
readers; `evidence` has the mathematics and `streams` accumulates the factors over days.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.monitor.evidence import (
    DIRECTIONS,
    TILTS,
    Direction,
    Floats,
    bet_on_events,
    bet_on_ranks,
    conformal_p_values,
)
from pneumofed.inference.monitor.reference import Observations, Reference
from pneumofed.inference.monitor.strata import MIXES, UNKNOWN_GROUP, column_of, stratum_labels

Rows = npt.NDArray[np.int64]

CORRECTIONS, REFUSALS = "corrections", "refusals"
LEAST_ERROR = 0.02
"""A verdict's chance of being wrong is taken as at least this: calibration is not known more finely, and readers differ too."""
ALLOWED_REFUSALS = 0.05
"""Share of images that the model may refuse without anyone being called."""

_DIRECTIONS = tuple(direction for direction in DIRECTIONS for _ in TILTS)
_MORE: tuple[Direction, ...] = ("higher", "higher", "higher")


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
