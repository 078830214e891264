"""Counts of suitability scores on a coarse grid: what hospitals send, and the limits that follow from them.

The densities of a `Suitability` may be of any images; what its limits promise is of the patients whose scores they are made from. So each
hospital counts the scores of its own validation patients, one image of each, and the counts add up over hospitals. Rounding a score up
to the end of its bin keeps the order of scores, so that the guarantee of `common.model_bundle.suitability` holds as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pneumofed.common.config.experiment import Section
from pneumofed.common.errors import MessageError
from pneumofed.common.model_bundle.image_statistics import Packed
from pneumofed.common.model_bundle.suitability import SUITABILITY_TESTS, Suitability

SCORE_BINS = 64
"""As few as the coarsest `score_bins` of a policy."""
_HIGHEST, _LOWEST = 9.0, -3.0
SCORE_EDGES: npt.NDArray[np.float64] = np.append(
    np.sinh(np.linspace(_LOWEST, _HIGHEST, SCORE_BINS)).astype(np.float32)[:-1], np.inf
).astype(np.float64)
"""Upper ends of the bins, float64 [SCORE_BINS], exact in float32: equal steps of asinh(score), about a fifth where scores are large. The
last has no end: a limit that falls into it refuses nothing."""
MOST_PATIENTS = 100_000
"""Of one site."""
_MOST_KEPT = 2000
Counts = npt.NDArray[np.int64]


def count_scores(scores: npt.NDArray[np.float64]) -> Counts:
    """Counts scores by bin.

    Args:
        scores: float64 [T, n], one image of each patient; NaN counts as the largest.

    Returns:
        int64 [T, SCORE_BINS].
    """
    bins = np.searchsorted(SCORE_EDGES, np.where(np.isnan(scores), np.inf, scores), "left")
    return np.stack([np.bincount(row, minlength=SCORE_BINS) for row in bins]).astype(np.int64)


def pack_counts(counts: Counts) -> dict[str, list[int]]:
    """Writes the counts as the plain numbers of a message, by test."""
    return {name: row.tolist() for name, row in zip(SUITABILITY_TESTS, counts, strict=True)}


def unpack_counts(numbers: Mapping[str, Any], patients: int) -> Counts:
    """Reads what a site counted.

    Args:
        numbers: as they came, not trusted.
        patients: whom the site says they are about.

    Raises:
        MessageError: other tests or bins, or counts that do not add up to `patients`.
    """
    rows = [numbers.get(name) for name in SUITABILITY_TESTS]
    plain = all(isinstance(row, list) and len(row) == SCORE_BINS and all(type(one) is int for one in row) for row in rows)
    if set(numbers) != set(SUITABILITY_TESTS) or not plain or not 0 <= patients <= MOST_PATIENTS:
        raise MessageError(f"scores: expected {SCORE_BINS} counts for each of {', '.join(SUITABILITY_TESTS)}")
    if any(min(row) < 0 or sum(row) != patients for row in rows if row is not None):
        raise MessageError("scores: expected counts that add up to the number of patients")
    return np.array(rows, np.int64)


class HospitalReference(Section):
    """Suitability densities, and how the hospitals' own validation patients score in them; a file of the run folder."""

    round: Annotated[int, Field(ge=1)]
    """Of the model whose features were taken."""
    suitability: Suitability
    """Fitted on the coordinator's central images."""
    sites: dict[str, dict[str, list[int]]]
    """By site and test, patients by bin; with secure aggregation one entry, their sum, which says of how many hospitals."""

    def patients(self) -> dict[str, int]:
        """Counts the patients of each site."""
        return {site: sum(counts[SUITABILITY_TESTS[0]]) for site, counts in sorted(self.sites.items())}

    @property
    def is_enough(self) -> bool:
        """Whether each test can refuse something at the refusal rate."""
        return sum(self.patients().values()) >= len(SUITABILITY_TESTS) / self.suitability.refusal_rate

    def pooled(self) -> Suitability:
        """Returns the suitability with limits from the hospitals' patients in place of the central ones."""
        counts = sum((self._counts(site) for site in self.sites), np.zeros((len(SUITABILITY_TESTS), SCORE_BINS), np.int64))
        fitted = self.suitability
        scores = np.stack([_thinned(np.repeat(SCORE_EDGES, row)) for row in counts])
        return Suitability(
            refusal_rate=fitted.refusal_rate,
            reference_images=fitted.reference_images,
            features=fitted.features,
            pixels=fitted.pixels,
            cells=fitted.cells,
            calibration=Packed.of(scores),
        )

    def most_refused(self, limits: npt.NDArray[np.float64]) -> dict[str, int]:
        """Bounds how many patients of each site are refused: the tests' refusals added up, as if no image failed two of them.

        Args:
            limits: float64 [T], of a `Suitability`. Patients in the bin that holds a limit count as refused, unless it ends there.
        """
        above = SCORE_EDGES[None, :] > limits[:, None]
        return {site: min(int((self._counts(site) * above).sum()), patients) for site, patients in self.patients().items()}

    def _counts(self, site: str) -> Counts:
        return np.array([self.sites[site][name] for name in SUITABILITY_TESTS], np.int64)


def _thinned(ascending: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """At most `_MOST_KEPT` of the scores: the largest of each block of b, from above.

    With m blocks the k-th from above has at most (k - 1) b scores above it, and ((k - 1) b + 1) / (m b + 1) <= k / (m + 1): the
    guarantee stays.
    """
    block = max(1, -(-len(ascending) // _MOST_KEPT))
    return ascending[::-1][: len(ascending) // block * block : block][::-1]
