"""What a site tells the coordinator of its images, so that the coordinator sees which site moved: counts and sums that merge.

For each quantity a histogram on the deciles of the bundle's reference; for the embedding the sum of random features of a Gaussian kernel
(Rahimi & Recht 2007), whose mean tells the maximum mean discrepancy. Everything is a whole number, so merging is exact and its
result depends on no order. Nothing else leaves the site: no image's row, no patient, no day, no scanner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from common.drift.bets import first_of_each_unit
from common.drift.observations import Observations
from common.drift.reference import Reference
from common.drift.two_sample import BINS, Floats, bin_counts, decile_edges
from common.errors import DataError, MessageError
from common.seeds import numpy_generator

Counts = npt.NDArray[np.int64]

KERNEL_FEATURES = 64
FIXED_POINT = 2**24
"""Units in 1.0: the mean of rounded numbers is within 3e-8 of the true one."""
MIN_PATIENTS = 50
"""A site with fewer tells nothing: with 64 sums over 50 patients no row can be solved for."""
MIN_COUNT = 5
"""Counts from 1 to 4 are withheld, as official statistics do (Hundepool et al. 2012, "Statistical Disclosure Control")."""
MAX_PATIENTS = 2**24
TALLIES = ("patients", "images", "refused", "read", "corrected")


@dataclass(frozen=True)
class Grid:
    """How a bundle's reference is counted, the same for all who hold the bundle.

    Attributes:
        quantities: names of the Q scalars.
        edges: float64 [Q, 9], inner edges of ten bins.
        frequencies: float64 [E, 64], of the random features.
        phases: float64 [64].
    """

    digest: str
    quantities: tuple[str, ...]
    edges: Floats
    frequencies: Floats
    phases: Floats

    @classmethod
    def of(cls, reference: Reference) -> Grid:
        """Of the bundle that `reference` belongs to."""
        rng = numpy_generator("drift", "kernel features", reference.digest)
        frequencies = rng.standard_normal((reference.rows.shape[1], KERNEL_FEATURES)) / reference.embedding.bandwidth
        edges = np.stack([decile_edges(values) for values in reference.values.values()])
        phases = rng.uniform(0.0, 2.0 * np.pi, KERNEL_FEATURES)
        return cls(reference.digest, reference.quantities, edges, frequencies, phases)

    def kernel_features(self, rows: Floats) -> Floats:
        """float64 [N, 64] in [-1, 1] of embedded `rows` [N, E]: their mean product is half the kernel value."""
        return np.cos(rows @ self.frequencies + self.phases)

    def count(self, values: Mapping[str, Floats]) -> Counts:
        """int64 [Q, 10]: histogram of each quantity."""
        return np.stack([bin_counts(values[name], edges) for name, edges in zip(self.quantities, self.edges, strict=True)])


@dataclass(frozen=True, eq=False)
class Summary:
    """Mergeable statistics of a set of judged images, all int64; a commutative monoid under `+`.

    Attributes:
        digest: of the bundle whose `Grid` this is on.
        histograms: [Q, 10], patients by decile of the reference.
        withheld: [Q], patients of bins that hold fewer than `MIN_COUNT`, which are then told as empty.
        kernel: [64], sums of the kernel features, in units of 2**-24.
        sums: [2], of the probabilities and of their squares, likewise.
        tallies: [5], see `TALLIES`; `read` and `corrected` of images, as are `images` and `refused`.
        expected_corrections: [], of the images read, in units of 2**-24.
    """

    digest: str
    histograms: Counts
    withheld: Counts
    kernel: Counts
    sums: Counts
    tallies: Counts
    expected_corrections: Counts

    @classmethod
    def of(cls, found: Observations, reference: Reference, grid: Grid) -> Summary:
        """Of `found`, a patient counting once; nothing is withheld yet."""
        rows = first_of_each_unit(np.flatnonzero(~found.refused), found.units)
        judged, read = found.take(rows), found.take((found.read_order >= 0) & ~found.refused)
        scores = judged.probabilities
        tallies = (len(rows), len(found), found.refused.sum(), len(read), read.corrected.sum())
        return cls(
            digest=reference.digest,
            histograms=grid.count(reference.values_of(judged)),
            withheld=np.zeros(len(grid.quantities), np.int64),
            kernel=_fixed(grid.kernel_features(judged.embedding)).sum(axis=0),
            sums=np.array([_fixed(scores).sum(), _fixed(np.square(scores)).sum()]),
            tallies=np.array(tallies, np.int64),
            expected_corrections=np.asarray(_fixed(read.expected_errors).sum()),
        )

    def __add__(self, other: Summary) -> Summary:
        """Of both sets of images together; exact if they share no patient.

        Raises:
            DataError: they belong to different bundles.
        """
        if self.digest != other.digest:
            raise DataError("drift summaries: expected all of one bundle, got two; compare each bundle's sites apart")
        return Summary(self.digest, *(np.asarray(mine + its) for mine, its in zip(self._numbers, other._numbers, strict=True)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Summary):
            return NotImplemented
        pairs = zip(self._numbers, other._numbers, strict=True)
        return self.digest == other.digest and all(np.array_equal(mine, its) for mine, its in pairs)

    __hash__ = None  # type: ignore[assignment]

    @property
    def patients(self) -> int:
        return int(self.tallies[TALLIES.index("patients")])

    def for_release(self) -> Summary:
        """As it may leave the site: bins with fewer than `MIN_COUNT` patients are emptied and only their total is told.

        Raises:
            DataError: there are fewer than `MIN_PATIENTS` patients.
        """
        if self.patients < MIN_PATIENTS:
            raise DataError(
                f"{self.patients} patients were judged in this time, and fewer than {MIN_PATIENTS} could be told apart; share a longer time"
            )
        few = self.histograms < MIN_COUNT
        withheld = self.withheld + np.where(few, self.histograms, 0).sum(axis=1)
        return Summary(self.digest, np.where(few, 0, self.histograms), withheld, *self._numbers[2:])

    def to_numbers(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = {name: np.asarray(value).tolist() for name, value in zip(_FIELDS, self._numbers, strict=True)}
        return {"bundle": self.digest, **values}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, object], grid: Grid) -> Summary:
        """What `to_numbers` wrote at another party.

        Raises:
            MessageError: it belongs to another bundle, or no set of images can have these numbers.
        """
        if set(numbers) != {"bundle", *_FIELDS} or numbers["bundle"] != grid.digest:
            raise MessageError(
                "drift summary: expected one of the bundle that is compared with; ask the site which bundle it runs"
            )
        shapes = ((len(grid.quantities), BINS), (len(grid.quantities),), (KERNEL_FEATURES,), (2,), (len(TALLIES),), ())
        values = [_checked(numbers[name], shape) for name, shape in zip(_FIELDS, shapes, strict=True)]
        summary = cls(grid.digest, *values)
        summary._check()
        return summary

    @cached_property
    def _numbers(self) -> tuple[Counts, ...]:
        return (self.histograms, self.withheld, self.kernel, self.sums, self.tallies, self.expected_corrections)

    def _check(self) -> None:
        """Refuses what contradicts itself, so that a wrong file cannot pass for a quiet or a drifting site."""
        patients, images, refused, read, corrected = self.tallies.tolist()
        unsigned = (self.histograms, self.withheld, self.sums, self.tallies)
        whole = patients * FIXED_POINT
        if (
            any(np.any(values < 0) for values in unsigned)
            or not (patients <= images <= MAX_PATIENTS and corrected <= read <= images and refused <= images)
            or np.any(self.histograms.sum(axis=1) + self.withheld != patients)
            or np.any(np.abs(self.kernel) > whole)
            or not self.sums[1] <= self.sums[0] + patients <= whole + 2 * patients
            or not 0 <= self.expected_corrections <= read * FIXED_POINT
        ):
            raise MessageError("drift summary: its numbers contradict each other; ask the site to write the file again")


_FIELDS = ("histograms", "withheld", "kernel", "sums", "tallies", "expected_corrections")


def _fixed(values: Floats) -> Counts:
    return np.rint(values * FIXED_POINT).astype(np.int64)


def _checked(values: object, shape: tuple[int, ...]) -> Counts:
    try:
        found = np.array(values)
    except ValueError:
        found = np.empty(0)
    if found.shape != shape or found.dtype != np.int64:
        raise MessageError(f"drift summary: expected whole numbers of shape {shape}; all parties must run the same version")
    if np.any(np.abs(found) > MAX_PATIENTS * FIXED_POINT):
        raise MessageError("drift summary: a number is larger than any set of images can give")
    return found
