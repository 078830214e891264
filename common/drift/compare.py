"""Sites against the reference, from their summaries alone: which of them moved, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2_contingency, gamma

from common.drift.label_shift import Prevalence, estimate_prevalence
from common.drift.looks import EMBEDDING
from common.drift.reference import Reference
from common.drift.summary import FIXED_POINT, Counts, Grid, Summary
from common.drift.two_sample import Floats, holm, stability_index


@dataclass(frozen=True)
class SiteDrift:
    """One site against the reference.

    Attributes:
        site: its name.
        patients: whom the summary counts.
        p_values: by quantity and for `EMBEDDING`, adjusted by Holm over everything of all sites, and for the looks of the year.
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
        """The quantities whose p-value is at most `rate`, the clearest first."""
        return sorted((name for name, p in self.p_values.items() if p <= rate), key=lambda name: self.p_values[name])


def compare_sites(summaries: Mapping[str, Summary], reference: Reference, looks: int = 1) -> list[SiteDrift]:
    """Each site of `summaries` by name; where no site has moved, the chance to name any is at most the rate that p-values are held to.

    Args:
        summaries: of one period, which is looked at once.
        reference: of the bundle that they belong to.
        looks: how many such periods a year has; the rate then holds for the year (each look has an equal part of it).
    """
    grid = Grid.of(reference)
    raw = {site: _test(summary, reference, grid) for site, summary in summaries.items()}
    names = [(site, name) for site, p_values in raw.items() for name in p_values]
    adjusted = np.minimum(1.0, looks * holm([raw[site][name] for site, name in names]))
    p_values: dict[str, dict[str, float]] = {site: {} for site in raw}
    for (site, name), p_value in zip(names, adjusted.tolist(), strict=True):
        p_values[site][name] = p_value
    return [_describe(site, summary, p_values[site], reference, grid) for site, summary in summaries.items()]


def _test(summary: Summary, reference: Reference, grid: Grid) -> dict[str, float]:
    known, rows = grid.count(reference.values), grid.kernel_features(reference.rows)
    p_values = {name: _compare_histograms(*_told(known[index], summary, index)) for index, name in enumerate(grid.quantities)}
    p_values[EMBEDDING] = _compare_kernel_means(rows, summary.kernel / FIXED_POINT, summary.patients)
    return p_values


def _told(reference: Counts, summary: Summary, row: int) -> tuple[Counts, Counts]:
    """The two histograms on the bins that were told, with all that was withheld, and the reference there, as one bin more."""
    found = summary.histograms[row]
    told = found > 0
    rest = reference[~told].sum(), summary.withheld[row]
    return np.append(reference[told], rest[0]), np.append(found[told], rest[1])


def _compare_histograms(reference: Counts, found: Counts) -> float:
    """p-value of the chi-squared test of homogeneity, over the bins that hold anything."""
    table = np.stack([reference, found])
    table = table[:, table.sum(axis=0) > 0]
    if found.sum() == 0 or table.shape[1] < 2:
        return 1.0
    return float(chi2_contingency(table, correction=False).pvalue)


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
    index = {name: stability_index(*_told(known[row], summary, row)) for row, name in enumerate(grid.quantities)}
    ranks = {name: _mean_rank(known[row], summary.histograms[row]) for row, name in enumerate(grid.quantities)}
    prevalence = estimate_prevalence(mean, max(square - mean**2, 0.0), summary.patients, reference.separation)
    return SiteDrift(site, summary.patients, p_values, ranks, index, prevalence)


def _mean_rank(reference: Counts, found: Counts) -> float:
    """Chance that a value of `found` is above one of `reference`, ties counting half, as far as the bins tell."""
    if found.sum() == 0 or reference.sum() == 0:
        return 0.5
    below = np.concatenate([[0], np.cumsum(reference)[:-1]]) + reference / 2.0
    return float((found * below).sum() / (found.sum() * reference.sum()))
