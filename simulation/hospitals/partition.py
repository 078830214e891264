"""Virtual hospitals: the images of one manifest dealt out by patient (`partition`), and what a partition looks like (`partition_rows`).

flwr-datasets deals single rows of a Hugging Face dataset, so two images of one patient could land in two hospitals; hence our own
by-patient deals. A partition is described by a row of counts for each hospital and a measure of its label skew.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pneumofed.common.data.manifest import LABELS, ImageRecord, Manifest
from pneumofed.common.errors import ConfigError, counted
from pneumofed.common.evaluation.similarity import mean_divergence
from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.hospitals.sources import PartitionKind

MIN_ALPHA, MAX_ALPHA = 1e-3, 1e6
"""Below, one hospital takes all and the draw underflows; above, nothing is left of the skew."""

Strata = Sequence[Sequence[str]]
"""The patients of each class, shuffled."""

Deal = list[list[str]]
"""The patients of each hospital."""


def partition(manifest: Manifest, hospitals: int, kind: str, alpha: float, seed: int) -> list[Manifest]:
    """Deals the patients of a manifest to virtual hospitals, and returns the manifest of each.

    A patient's class is the label of most of their images, of the first in LABELS where two are level. Classes are the labels as
    they stand: bacterial and viral pneumonia are two classes, also for a binary task. The kinds:

    - `iid`: the patients of each class are dealt in turn, so hospitals differ by at most one patient in each class and in all.
    - `dirichlet`: label skew. For each class, shares over the hospitals are drawn from Dir(alpha, ..., alpha) and its patients
      split by them, so both the mix and the size of hospitals differ. This is the per-class split of Yurochkin et al. 2019
      (arXiv:1905.12022) and of Li et al. 2022 (NIID-Bench, arXiv:2102.02079, "distribution-based label imbalance"), not that of
      Hsu et al. 2019 (arXiv:1909.06335), who draw a mix of classes for each hospital of equal size. They draw again while a
      hospital is too small; here a hospital left empty is given a patient of the largest one.
    - `quantity`: sizes in shares from Dir(alpha, ..., alpha) (Li et al. 2022), the same for each class, which keeps the mix.
    - `scanner`: the very deal of `iid` with the same seed; each hospital then gets its own `simulation.phantoms.scanners` profile, so that
      only the feature shift differs between the two runs.

    Guarantees:
        Complete and disjoint; all images of a patient in one hospital; no hospital empty.
        Pure in the arguments, and independent of the order of the rows. Rows come back ordered by patient and path.

    Args:
        manifest: the images to deal.
        hospitals: how many; at least 1.
        kind: a `PartitionKind`, see above.
        alpha: concentration of `dirichlet` and `quantity`, 0.001 to 1e6: the smaller, the more skewed. Not used by the others.
        seed: of the draw.

    Raises:
        ConfigError: an argument is out of its range, or there are more hospitals than patients.
    """
    patients = _group(manifest)
    _check(len(patients), hospitals, kind, alpha)
    rng = numpy_generator("partition", seed)
    deal = _DEALS[kind](_strata(patients, rng), hospitals, alpha, rng)
    _fill_empty(deal)
    return [Manifest(tuple(record for patient in sorted(site) for record in patients[patient])) for site in deal]


@dataclass(frozen=True)
class HospitalCounts:
    """One hospital of a partition: only counts, so it may leave the site.

    Attributes:
        hospital: its number, from 0.
        images: how many.
        patients: how many.
        classes: images of each label that occurs in the partition, in the order of LABELS.
    """

    hospital: int
    images: int
    patients: int
    classes: dict[str, int]


def partition_rows(parts: Sequence[Manifest]) -> list[HospitalCounts]:
    """Counts images, patients and labels of each hospital; all rows have the same labels in the same order."""
    counts = [Counter(part.labels) for part in parts]
    labels = sorted(set().union(*counts), key=lambda label: (LABELS.index(label) if label in LABELS else len(LABELS), label))
    return [
        HospitalCounts(i, len(part), len(set(part.patients)), {label: count[label] for label in labels})
        for i, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]


def label_skew(rows: Sequence[HospitalCounts]) -> float:
    """Computes the label skew: the mean Jensen-Shannon divergence of the hospitals' labels from those of all images, in bits, in [0, 1].

    0 means every hospital has the mix of the whole. Hospitals weigh alike whatever their size; those without images do not count.
    (Lin 1991, IEEE Trans. Inf. Theory 37(1), eq. 4.1.)
    """
    return mean_divergence([list(row.classes.values()) for row in rows])


def _check(patients: int, hospitals: int, kind: str, alpha: float) -> None:
    kinds = get_args(PartitionKind)
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"partition: expected one of {', '.join(kinds)}, got {kind!r}{hint}")
    if kind in ("dirichlet", "quantity") and not (math.isfinite(alpha) and MIN_ALPHA <= alpha <= MAX_ALPHA):
        raise ConfigError(f"alpha: expected a number from {MIN_ALPHA} (most skewed) to {MAX_ALPHA:g}, got {alpha}")
    if hospitals < 1:
        raise ConfigError(f"hospitals: expected at least 1, got {hospitals}")
    if hospitals > patients:
        raise ConfigError(
            f"hospitals: {hospitals} asked for, but the data have {counted(patients, 'patient')}, whose images stay together; "
            f"ask for at most {counted(patients, 'hospital')} or give more data"
        )


def _group(manifest: Manifest) -> dict[str, list[ImageRecord]]:
    """The images of each patient; both patients and images in an order that the rows' order does not change."""
    grouped: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in sorted(manifest.records, key=lambda record: (record.patient, str(record.path), record.label)):
        grouped[record.patient].append(record)
    return dict(grouped)


def _strata(patients: dict[str, list[ImageRecord]], rng: np.random.Generator) -> Strata:
    by_class: dict[str, list[str]] = defaultdict(list)
    for patient, records in patients.items():
        by_class[_class_of(records)].append(patient)
    return [[by_class[label][i] for i in rng.permutation(len(by_class[label]))] for label in sorted(by_class, key=_label_order)]


def _class_of(records: Sequence[ImageRecord]) -> str:
    counts = Counter(record.label for record in records)
    return min(counts, key=lambda label: (-counts[label], _label_order(label)))


def _label_order(label: str) -> tuple[int, str]:
    return (LABELS.index(label) if label in LABELS else len(LABELS), label)


def _deal_in_turn(strata: Strata, hospitals: int, alpha: float, rng: np.random.Generator) -> Deal:
    order = [patient for stratum in strata for patient in stratum]
    return [order[hospital::hospitals] for hospital in range(hospitals)]


def _deal_by_label_skew(strata: Strata, hospitals: int, alpha: float, rng: np.random.Generator) -> Deal:
    return _deal_by_shares(strata, [rng.dirichlet(np.full(hospitals, alpha)) for _ in strata])


def _deal_by_size_skew(strata: Strata, hospitals: int, alpha: float, rng: np.random.Generator) -> Deal:
    return _deal_by_shares(strata, [rng.dirichlet(np.full(hospitals, alpha))] * len(strata))


def _deal_by_shares(strata: Strata, shares: Sequence[NDArray[np.float64]]) -> Deal:
    """Each stratum cut at its cumulative `shares` [hospitals]: every part is within one patient of its share."""
    deal: Deal = [[] for _ in shares[0]]
    for stratum, share in zip(strata, shares, strict=True):
        ends = np.rint(np.cumsum(share)[:-1] * len(stratum)).astype(int)
        cuts = [0, *ends.tolist(), len(stratum)]
        for hospital, (start, end) in enumerate(pairwise(cuts)):
            deal[hospital] += stratum[start:end]
    return deal


def _fill_empty(deal: Deal) -> None:
    """Gives each empty hospital a patient of the then largest one, which has two or more while there are enough."""
    for site in deal:
        if not site:
            site.append(max(deal, key=len).pop())


_DEALS: dict[str, Callable[[Strata, int, float, np.random.Generator], Deal]] = {
    "iid": _deal_in_turn,
    "scanner": _deal_in_turn,
    "dirichlet": _deal_by_label_skew,
    "quantity": _deal_by_size_skew,
}
