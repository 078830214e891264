"""What a partition looks like: a row a hospital, a measure of its label skew, and a picture."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.spatial.distance import jensenshannon

from common.data.manifest import LABELS, Manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"normal": "#56B4E9", "pneumonia": "#D55E00", "bacterial": "#E69F00", "viral": "#009E73"}
"""Okabe and Ito's palette, told apart by colour-blind readers."""
_OTHER_COLOUR = "#999999"


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


def plot_partition(rows: Sequence[HospitalRow], title: str = "Images per hospital") -> Figure:
    """Stacked bars of the label counts, a bar a hospital, with the images' and patients' numbers above where there is room."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(14.0, 3.0 + 0.55 * len(rows)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    places, base = np.arange(len(rows)), np.zeros(len(rows))
    for label in rows[0].classes:
        heights = np.array([row.classes[label] for row in rows], dtype=np.float64)
        axes.bar(places, heights, bottom=base, label=label, color=_COLOURS.get(label, _OTHER_COLOUR), width=0.8)
        base += heights
    if len(rows) <= 20:
        for row in rows:
            axes.annotate(f"{row.images}\n({row.patients})", (row.hospital, row.images), ha="center", va="bottom", fontsize=7)
    axes.set(xlabel="hospital", ylabel="images", title=f"{title} (patients in brackets), label skew {label_skew(rows):.3f} bits")
    axes.set_xticks(places if len(rows) <= 30 else places[:: len(rows) // 15])
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def render_figure(figure: Figure, format: Literal["png", "svg"]) -> bytes:
    """The bytes of `figure` as PNG (150 dpi) or SVG; the same figure gives the same bytes."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "pneumofed"}):
        figure.savefig(buffer, format=format, dpi=150, metadata={"Date": None} if format == "svg" else {"Software": None})
    return buffer.getvalue()
