"""What a partition looks like: a row a hospital, and a measure of its label skew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import jensenshannon

from common.data.manifest import LABELS, Manifest


@dataclass(frozen=True)
class HospitalRow:
    """One hospital of a partition: counts alone, so it may leave the site.

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


def summarise(parts: Sequence[Manifest]) -> list[HospitalRow]:
    """A row for each hospital; all rows have the same labels in the same order."""
    counts = [Counter(part.labels) for part in parts]
    labels = sorted(set().union(*counts), key=lambda label: (LABELS.index(label) if label in LABELS else len(LABELS), label))
    return [
        HospitalRow(i, len(part), len(set(part.patients)), {label: count[label] for label in labels})
        for i, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]


def label_skew(rows: Sequence[HospitalRow]) -> float:
    """Mean Jensen-Shannon divergence between the hospitals' label distributions and that of all images, in bits, in [0, 1].

    0 means every hospital has the mix of the whole. Hospitals weigh alike whatever their size; those without images do not count.
    (Lin 1991, IEEE Trans. Inf. Theory 37(1), eq. 4.1.)
    """
    counts = np.array([list(row.classes.values()) for row in rows if row.images], dtype=np.float64)
    if not counts.size:
        return 0.0
    pooled = counts.sum(axis=0)
    return float(np.mean([jensenshannon(count, pooled, base=2.0) ** 2 for count in counts]))
