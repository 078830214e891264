"""What a site shares with the coordinator, who sees which site has moved: counts and sums that merge.

`Summary` has for each quantity a histogram on the deciles of the bundle's reference, and for the embedding the sum of random features of a
Gaussian kernel (Rahimi & Recht 2007), whose mean gives the maximum mean discrepancy. Everything is a whole number, so merging is exact and
its result depends on no order. Nothing else leaves the site: no image's row, no patient, no day, no scanner.

`compare_sites` tests each site against the reference from its summary only; `write_share` and `read_share` are the file between the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc
from scipy.stats import gamma

from pneumofed.common.errors import DataError, MessageError
from pneumofed.common.evaluation.similarity import stability_index
from pneumofed.common.files import atomic_write
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.monitor.e_processes import first_of_each_unit
from pneumofed.inference.monitor.reference import Observations, Reference
from pneumofed.inference.monitor.streams import EMBEDDING
from pneumofed.inference.monitor.two_sample import (
    DECILE_BINS,
    Floats,
    Prevalence,
    bin_counts,
    decile_edges,
    estimate_prevalence,
    holm,
)

Counts = npt.NDArray[np.int64]

KERNEL_FEATURES = 64
FIXED_POINT = 2**24
"""Units in 1.0: the mean of rounded numbers is within 3e-8 of the true one."""
MIN_PATIENTS = 50
"""A site with fewer shares nothing: with 64 sums over 50 patients no row can be solved for."""
MIN_COUNT = 5
"""Counts from 1 to 4 are withheld, as official statistics do (Hundepool et al. 2012, "Statistical Disclosure Control")."""
MAX_PATIENTS = 2**24
TALLIES = ("patients", "images", "refused", "read", "corrected")

_FIELDS = ("histograms", "withheld", "kernel", "sums", "tallies", "expected_corrections")

SHARE_FORMAT = "pneumofed drift summary 1"
MAX_SHARE_BYTES = 1_000_000


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
        """Builds the grid of the bundle that `reference` belongs to."""
        rng = numpy_generator("drift", "kernel features", reference.digest)
        frequencies = rng.standard_normal((reference.rows.shape[1], KERNEL_FEATURES)) / reference.embedding.bandwidth
        edges = np.stack([decile_edges(values) for values in reference.values.values()])
        phases = rng.uniform(0.0, 2.0 * np.pi, KERNEL_FEATURES)
        return cls(reference.digest, reference.quantities, edges, frequencies, phases)

    def kernel_features(self, rows: Floats) -> Floats:
        """Computes features float64 [N, 64] in [-1, 1] of embedded `rows` [N, E]: their mean product is half the kernel value."""
        return np.cos(rows @ self.frequencies + self.phases)

    def count(self, values: Mapping[str, Floats]) -> Counts:
        """Counts the histogram of each quantity, int64 [Q, 10]."""
        return np.stack([bin_counts(values[name], edges) for name, edges in zip(self.quantities, self.edges, strict=True)])


@dataclass(frozen=True, eq=False)
class Summary:
    """Mergeable statistics of a set of judged images, all int64; a commutative monoid under `+`.

    Attributes:
        digest: of the bundle whose `Grid` this is on.
        histograms: [Q, 10], patients by decile of the reference.
        withheld: [Q], patients of bins that hold fewer than `MIN_COUNT`, which are then shared as empty.
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
        """Computes the summary of `found`, a patient counting once; nothing is withheld yet.

        Args:
            found: images of one period, judged by the bundle of `reference`.
            reference: whose quantities are counted.
            grid: of `reference`.
        """
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
        """Makes the summary that may leave the site: bins with fewer than `MIN_COUNT` patients are emptied and only their total is shared.

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
        """Returns plain values for JSON."""
        values = {name: np.asarray(value).tolist() for name, value in zip(_FIELDS, self._numbers, strict=True)}
        return {"bundle": self.digest, **values}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, object], grid: Grid) -> Summary:
        """Reads what `to_numbers` wrote at another party, and checks that it is possible.

        Args:
            numbers: plain values of JSON, not trusted.
            grid: of the bundle that the summary is compared with.

        Raises:
            MessageError: it belongs to another bundle, or no set of images can have these numbers.
        """
        if set(numbers) != {"bundle", *_FIELDS} or numbers["bundle"] != grid.digest:
            raise MessageError(
                "drift summary: expected one of the bundle that is compared with; ask the site which bundle it runs"
            )
        shapes = ((len(grid.quantities), DECILE_BINS), (len(grid.quantities),), (KERNEL_FEATURES,), (2,), (len(TALLIES),), ())
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


@dataclass(frozen=True)
class SiteDrift:
    """One site against the reference.

    Attributes:
        site: its name.
        patients: whom the summary counts.
        p_values: by quantity and for `EMBEDDING`, adjusted by Holm over everything of all sites, and for the periods of the year.
        rank: by quantity, the mean position in the reference, 0.5 where nothing has moved, higher where values are.
        stability_index: by quantity.
        prevalence: of pneumonia, if nothing but the share has changed.
    """

    site: str
    patients: int
    p_values: dict[str, float]
    rank: dict[str, float]
    stability_index: dict[str, float]
    prevalence: Prevalence | None

    def moved(self, rate: float) -> list[str]:
        """Lists the quantities whose p-value is at most `rate`, the clearest first."""
        return sorted((name for name, p in self.p_values.items() if p <= rate), key=lambda name: self.p_values[name])


def compare_sites(summaries: Mapping[str, Summary], reference: Reference, periods: int = 1) -> list[SiteDrift]:
    """Tests each site of `summaries`; where no site has moved, the chance to name any is at most the rate that p-values are held to.

    Args:
        summaries: of one period, which is looked at once.
        reference: of the bundle that they belong to.
        periods: how many of them a year has; the rate then holds for the year (each period has an equal part of it).
    """
    grid = Grid.of(reference)
    raw = {site: _test(summary, reference, grid) for site, summary in summaries.items()}
    names = [(site, name) for site, p_values in raw.items() for name in p_values]
    adjusted = np.minimum(1.0, periods * holm([raw[site][name] for site, name in names]))
    p_values: dict[str, dict[str, float]] = {site: {} for site in raw}
    for (site, name), p_value in zip(names, adjusted.tolist(), strict=True):
        p_values[site][name] = p_value
    return [_describe(site, summary, p_values[site], reference, grid) for site, summary in summaries.items()]


def _test(summary: Summary, reference: Reference, grid: Grid) -> dict[str, float]:
    known, rows = grid.count(reference.values), grid.kernel_features(reference.rows)
    p_values = {name: _compare_histograms(known[index], summary, index) for index, name in enumerate(grid.quantities)}
    p_values[EMBEDDING] = _compare_kernel_means(rows, summary.kernel / FIXED_POINT, summary.patients)
    return p_values


def _released_bins(reference: Counts, summary: Summary, row: int) -> tuple[Counts, Counts]:
    """The two histograms on the bins that were shared, with all that was withheld, and the reference there, as one bin more."""
    found = summary.histograms[row]
    shared = found > 0
    rest = reference[~shared].sum(), summary.withheld[row]
    return np.append(reference[shared], rest[0]), np.append(found[shared], rest[1])


def _compare_histograms(reference: Counts, summary: Summary, row: int) -> float:
    """p-value of the chi-squared test of homogeneity, over the bins that hold anything.

    Which counts are withheld depends on the sample: their common bin holds few because it was made of few, and its own degrees of freedom
    would call that a move. Those of the whole table count, as far as it is known: to merge bins can only lower the statistic.
    """
    table = np.stack(_released_bins(reference, summary, row))
    table = table[:, table.sum(axis=0) > 0]
    if table[1].sum() == 0 or table.shape[1] < 2:
        return 1.0
    bins = max(table.shape[1], np.sum((reference > 0) | (summary.histograms[row] > 0)))
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return float(chdtrc(bins - 1, (np.square(table - expected) / expected).sum()))


def _compare_kernel_means(reference: Floats, total: Floats, n: int) -> float:
    """p-value of the squared distance between mean kernel features, half the squared maximum mean discrepancy.

    Without drift it is, for many images, a weighted sum of chi-squared variables whose weights are the eigenvalues of the covariance
    (Gretton et al. 2012, theorem 12); a gamma law of the same mean and variance stands for it (Satterthwaite 1946).
    """
    if n == 0:
        return 1.0
    covariance = np.cov(reference, rowvar=False) * (1.0 / n + 1.0 / len(reference))
    mean, variance = float(np.trace(covariance)), 2.0 * float(np.square(covariance).sum())
    distance = float(np.square(total / n - reference.mean(axis=0)).sum())
    return float(gamma.sf(distance, mean**2 / variance, scale=variance / mean))


def _describe(site: str, summary: Summary, p_values: dict[str, float], reference: Reference, grid: Grid) -> SiteDrift:
    known, n = grid.count(reference.values), max(summary.patients, 1)
    mean, square = (summary.sums / FIXED_POINT / n).tolist()
    index = {name: stability_index(*_released_bins(known[row], summary, row)) for row, name in enumerate(grid.quantities)}
    ranks = {name: _mean_rank(known[row], summary.histograms[row]) for row, name in enumerate(grid.quantities)}
    prevalence = estimate_prevalence(mean, max(square - mean**2, 0.0), summary.patients, reference.separation)
    return SiteDrift(site, summary.patients, p_values, ranks, index, prevalence)


def _mean_rank(reference: Counts, found: Counts) -> float:
    """Chance that a value of `found` is above one of `reference`, ties counting half, as far as the bins show."""
    if found.sum() == 0 or reference.sum() == 0:
        return 0.5
    below = np.concatenate([[0], np.cumsum(reference)[:-1]]) + reference / 2.0
    return float((found * below).sum() / (found.sum() * reference.sum()))


def write_share(path: Path, site: str, period: tuple[date, date], summary: Summary) -> None:
    """Writes the summary of `site` to `path`, as JSON that a person can read before it is sent.

    Args:
        path: replaced if it exists.
        site: name under which the coordinator knows the site.
        period: first and last day, both included.
        summary: of `Summary.for_release`, so that small counts are withheld already.

    Raises:
        OSError: the file cannot be written.
    """
    content = {"format": SHARE_FORMAT, "site": site, "first": str(period[0]), "last": str(period[1]), **summary.to_numbers()}
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_share(path: Path, reference: Reference) -> tuple[str, tuple[date, date], Summary]:
    """Reads the file that `write_share` wrote at a site.

    Args:
        path: not trusted; files above `MAX_SHARE_BYTES` are refused unread.
        reference: of the bundle that the site has to have judged with.

    Returns:
        Name of the site, (first day, last day), and the summary.

    Raises:
        MessageError: it is no such file, of another bundle, or contradicts itself.
    """
    try:
        if path.stat().st_size > MAX_SHARE_BYTES:
            raise MessageError(f"{path.name} is too large for a drift summary")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.pop("format", None) != SHARE_FORMAT:
            raise MessageError(f"{path.name} is no drift summary of this version; ask the site to write it again")
        site, first, last = str(content.pop("site")), *(date.fromisoformat(content.pop(key)) for key in ("first", "last"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MessageError(f"{path.name} cannot be read as a drift summary ({type(error).__name__})") from None
    return site, (first, last), Summary.from_numbers(content, Grid.of(reference))
