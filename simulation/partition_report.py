"""What a partition looks like: a row a hospital, a measure of its label skew, and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.distance import jensenshannon

from common.data.manifest import LABELS, Manifest
from common.evaluation.figures import FAINT, TEXT_PT, colour_of, legend_above, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {label: colour_of(i) for i, label in enumerate(LABELS)}
_MAX_ANNOTATED = 20


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


def plot_partition(rows: Sequence[HospitalRow]) -> Figure:
    """Stacked bars of the images of each label, a bar a hospital; above it, where there is room, its images and patients."""
    figure, (axes,) = new_figure()
    labels, base = _labels(rows), np.zeros(len(rows))
    for label in labels:
        heights = np.array([row.classes[label] for row in rows], dtype=np.float64)
        axes.bar([row.hospital for row in rows], heights, bottom=base, label=label, color=_COLOURS.get(label, FAINT), width=0.8)
        base += heights
    for row in rows if len(rows) <= _MAX_ANNOTATED else ():
        text = f"{row.images}\n({row.patients})"
        axes.annotate(text, (row.hospital, row.images), (0, 2), textcoords="offset points", ha="center", fontsize=TEXT_PT - 2)
    axes.set(xlabel=f"hospital (label skew {label_skew(rows):.3f} bits)", ylabel="images (patients)")
    axes.set_xticks([row.hospital for row in rows][:: max(1, len(rows) // _MAX_ANNOTATED)])
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    legend_above(figure, max(1, len(labels)))
    return figure


def _labels(rows: Sequence[HospitalRow]) -> list[str]:
    return list(rows[0].classes) if rows else []
