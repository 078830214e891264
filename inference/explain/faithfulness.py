"""Whether a map can be believed: what it marks matters to the network, and the map depends on what the network has learnt.

Deletion and insertion curves (Petsiuk et al. 2018, section 4.2) exchange cells of the image in the order of the map (`curves`). What is
deleted must be replaced by something. The paper takes a constant or a blurred image, of which a network trained on photographs says
"nothing". A network that separates pneumonia from normal has no such class, and calls an empty image one or the other; if it calls it what
the image is called anyway, deletion changes nothing and the curve means nothing. So the reference is an argument: the blurred image where
it serves, else a radiograph of the other class (as Goyal et al. 2019, "Counterfactual Visual Explanations", section 3).

Parameter randomisation (Adebayo et al. 2018) compares the map with that of a network whose weights are drawn anew from the output on
(`sanity_check`, `randomised`). `mean_interval` gives means over images with their intervals.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from pneumofed.common.evaluation.bootstrap import Bootstrap, ConfidenceInterval, resample_patients
from pneumofed.common.evaluation.similarity import ssim
from pneumofed.common.models.build import classifier_of
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.explain.attribution import compute_attribution, seeded
from pneumofed.inference.explain.cam import LogOdds
from pneumofed.inference.explain.methods import Detail, Method, Target

CELLS_PER_SIDE = 16
"""Cells to a side that are exchanged as a whole, by map and at random alike: single pixels in random order are noise, which disturbs a
network more than any region that it looks at, so that a random order of pixels would seem to beat every map."""
CURVE_STEPS = 8
RANDOM_ORDERS = 2

SanityVerdict = Literal["depends on the weights", "does not depend on the weights", "open"]

LARGEST_CORRELATION = 0.5
"""Rank correlation with the map of a random network below which a map counts as the network's own: a quarter of the variance of its
ranks, or less, comes without any learning. Ours; the paper shows curves and sets no number."""
LEAST_PAIRS = 6

CASCADE_PARTS = 4

MIN_INTERVAL_PATIENTS = 5
"""Resamples of fewer hardly differ from each other, and their interval would claim a precision that is not there."""


@dataclass(frozen=True)
class Curves:
    """Probability of the target over the share of the image that was exchanged, 0 to 1 in `CURVE_STEPS` steps; float64 [STEPS + 1] each.

    Attributes:
        deletion: from image to reference, the cells of the highest evidence first; a small area is good.
        insertion: from reference to image; a large area is good.
    """

    deletion: NDArray[np.float64]
    insertion: NDArray[np.float64]

    @property
    def deletion_area(self) -> float:
        return area(self.deletion)

    @property
    def insertion_area(self) -> float:
        return area(self.insertion)


def curves(score: LogOdds, image: Tensor, values: np.ndarray, reference: Tensor) -> Curves:
    """Computes the curves of the map `values`, its highest cells exchanged first.

    Args:
        score: the log-odds whose probability the curves show.
        image: float32 [1, 1, S, S] in [0, 1], S at least `CELLS_PER_SIDE`.
        values: the map, float32 [S, S].
        reference: of the shape of `image`: what stands where cells are taken away.
    """
    return _exchange(score, image, reference, np.argsort(-by_cell(values), kind="stable"))


def random_curves(score: LogOdds, image: Tensor, reference: Tensor, seed: int = 0) -> Curves:
    """Computes the mean curves of `RANDOM_ORDERS` random orders: what a map without any knowledge has.

    Args:
        score: the log-odds whose probability the curves show.
        image: float32 [1, 1, S, S] in [0, 1], S at least `CELLS_PER_SIDE`.
        reference: of the shape of `image`, as for the map that is compared.
        seed: of the orders.
    """
    rng = numpy_generator("deletion", seed)
    found = [_exchange(score, image, reference, rng.permutation(CELLS_PER_SIDE**2)) for _ in range(RANDOM_ORDERS)]
    return Curves(*(np.mean([getattr(one, name) for one in found], axis=0) for name in ("deletion", "insertion")))


def area(curve: np.ndarray) -> float:
    """Computes the area under a curve of evenly spaced points over [0, 1], by trapezoids."""
    return float(np.trapezoid(curve, dx=1.0 / (len(curve) - 1)))


def by_cell(values: np.ndarray) -> NDArray[np.float64]:
    """Averages the map in each of `CELLS_PER_SIDE` x `CELLS_PER_SIDE` cells, row by row."""
    cell = _cells(values.shape[0]).ravel()
    return np.bincount(cell, values.ravel()) / np.bincount(cell)


@torch.inference_mode()
def _exchange(score: LogOdds, image: Tensor, reference: Tensor, order: np.ndarray) -> Curves:
    turn = np.empty(CELLS_PER_SIDE**2)
    turn[order] = np.arange(CELLS_PER_SIDE**2)
    place = torch.from_numpy(turn[_cells(image.shape[-1])])
    taken = torch.stack([place < CELLS_PER_SIDE**2 * step // CURVE_STEPS for step in range(CURVE_STEPS + 1)])[:, None]
    both = torch.cat([torch.where(taken, reference, image), torch.where(taken, image, reference)])
    return Curves(*torch.sigmoid(score(both).double()).numpy().reshape(2, CURVE_STEPS + 1))


def _cells(side: int) -> NDArray[np.int64]:
    """Number of the cell of each pixel, int64 [S, S]."""
    part = np.arange(side) * CELLS_PER_SIDE // side
    return (part[:, None] * CELLS_PER_SIDE + part).astype(np.int64)


@dataclass(frozen=True)
class Likeness:
    """How alike two maps of one image are; NaN where a map is constant, since that has no order.

    Attributes:
        rank: Spearman's correlation over pixels.
        absolute_rank: the same of the absolute values, which a change of sign does not change (their section 4, "ABS").
        structure: SSIM of the absolute values, each map scaled to 1 at most.
    """

    rank: float
    absolute_rank: float
    structure: float


@dataclass(frozen=True)
class Sanity:
    """The outcome for one method.

    Attributes:
        method: that was checked.
        verdict: by the interval of the larger of the two correlations: below `LARGEST_CORRELATION`, above, or neither.
        rank: mean over pairs of a trained and a random network's map.
        absolute_rank: likewise.
        structure: likewise.
        pairs: number of them.
        constant: pairs left out since a map was constant.
    """

    method: Method
    verdict: SanityVerdict
    rank: ConfidenceInterval
    absolute_rank: ConfidenceInterval
    structure: ConfidenceInterval
    pairs: int
    constant: int

    def as_json(self) -> dict[str, Any]:
        """Returns all of it for JSON, with the sentence."""
        return {**vars(self), "sentence": self.sentence()}

    def sentence(self) -> str:
        """Words the verdict with its number, for the radiologist."""
        worst = max(self.rank, self.absolute_rank, key=lambda found: found["value"])
        number = f"rank correlation {show_interval(worst)}, {self.pairs} pairs of maps"
        if self.verdict == "depends on the weights":
            return f"The map depends on what the network has learnt: with random weights it is another one ({number})."
        if self.verdict == "does not depend on the weights":
            return f"The map does not depend on the weights: do not use. Without any learning it is nearly the same ({number})."
        if not self.pairs:
            return "Whether the map depends on the weights could not be told: the maps to compare were empty."
        return f"Whether the map depends on the weights could not be told ({number})."


def sanity_check(
    network: nn.Module,
    images: Sequence[Tensor],
    method: Method,
    target: Target = "pneumonia",
    *,
    seed: int = 0,
    detail: Detail = "last-layer",
    larger: Sequence[Tensor | None] | None = None,
) -> Sanity:
    """Checks whether maps depend on the weights: compares those of the network with those of a network with all weights drawn anew.

    Args:
        network: of `build_model`, trained.
        images: float32 [1, 1, S, S] in [0, 1] each; with few of them several random networks are drawn, `LEAST_PAIRS` pairs at
            least.
        method: that makes the maps.
        target: what the maps are evidence for.
        seed: of the random weights, and of what SHAP and LIME draw.
        detail: of the maps, as in `compute_attribution`.
        larger: the same images for it.
    """
    networks = [randomised(network, 1.0, seed + number) for number in range(math.ceil(LEAST_PAIRS / max(1, len(images))))]
    found: list[Likeness] = []
    for image, enlarged in zip(images, larger or [None] * len(images), strict=True):
        own, *others = (
            compute_attribution(one, image, method, target, seed=seed, detail=detail, larger=enlarged).values
            for one in (network, *networks)
        )
        found += [likeness(own, other) for other in others]
    return conclude(method, found)


def conclude(method: Method, found: Sequence[Likeness], patients: Sequence[str] | None = None) -> Sanity:
    """Judges a method by its pairs of maps.

    Args:
        method: that made the maps.
        found: one likeness for each pair of a trained and a random network's map.
        patients: of each pair; without them every pair is somebody else's.
    """
    rank, absolute, structure = (
        mean_interval([getattr(one, name) for one in found], patients) for name in ("rank", "absolute_rank", "structure")
    )
    constant = sum(math.isnan(one.rank) for one in found)
    pairs = len(found) - constant
    return Sanity(
        method, _verdict(max(rank, absolute, key=lambda one: one["value"]), pairs), rank, absolute, structure, pairs, constant
    )


def likeness(first: np.ndarray, second: np.ndarray) -> Likeness:
    """Measures how alike two maps of one image are.

    Args:
        first: float32 [S, S], S at least 11, the window of SSIM.
        second: of the same shape.
    """
    absolute = [_scaled(np.abs(values)) for values in (first, second)]
    rank = spearman(first, second)
    structure = math.nan if math.isnan(rank) else ssim(*absolute)
    return Likeness(rank, spearman(*absolute), structure)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Computes Spearman's rank correlation in [-1, 1], ties at their mean rank; NaN where one of the two is constant.

    Args:
        first: any shape.
        second: of as many values.
    """
    a, b = (rankdata(values.ravel()) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 0 else math.nan


def _scaled(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64) / max(float(values.max()), 1e-30)


def _verdict(worst: ConfidenceInterval, pairs: int) -> SanityVerdict:
    if pairs < LEAST_PAIRS:
        return "open"
    if worst["high"] < LARGEST_CORRELATION:
        return "depends on the weights"
    return "does not depend on the weights" if worst["low"] > LARGEST_CORRELATION else "open"


def randomised(network: nn.Module, share: float, seed: int) -> nn.Module:
    """Copies `network` with random weights in its last `share` of layers: their cascade, section 3.1.

    Share 0 draws only the classifier, 1 everything. Convolutions and linear layers are drawn by He et al. 2015, eq. 10, which keeps the
    variance of the signal through the depth; norms become the identity, their statistics included.

    Args:
        network: of `build_model`; left as it is.
        share: in [0, 1] of the layers before the classifier, which is always drawn anew.
        seed: of the weights.
    """
    copied = copy.deepcopy(network).eval()
    layers = [
        module for module in copied.modules() if module is not classifier_of(copied) and hasattr(module, "reset_parameters")
    ]
    with seeded("randomised network", seed):
        _draw(classifier_of(copied))
        for module in layers[len(layers) - round(share * len(layers)) :]:
            _draw(module)
    return copied


def cascade(network: nn.Module, seed: int) -> Iterator[tuple[float, nn.Module]]:
    """Yields (share of layers that are random, network), from the classifier only to all of them, in `CASCADE_PARTS` equal parts.

    Args:
        network: of `build_model`; left as it is.
        seed: of the weights.
    """
    for part in range(CASCADE_PARTS + 1):
        yield part / CASCADE_PARTS, randomised(network, part / CASCADE_PARTS, seed)


def _draw(module: nn.Module) -> None:
    module.reset_parameters()  # type: ignore[operator]
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def mean_interval(values: Sequence[float], patients: Sequence[str] | None = None, seed: int = 0) -> ConfidenceInterval:
    """Computes the mean of `values` with its 95 % interval by the percentile bootstrap over patients; NaN values are left out.

    The interval is NaN for fewer than `MIN_INTERVAL_PATIENTS`.

    Args:
        values: one an image.
        patients: of each image; without them every image is somebody else.
        seed: of the draws.
    """
    known = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(known)
    names = np.arange(len(known)) if patients is None else np.array(patients)
    people, number = np.unique(names[defined], return_inverse=True)
    if len(people) < MIN_INTERVAL_PATIENTS:
        mean = float(known[defined].mean()) if len(people) else math.nan
        return ConfidenceInterval(value=mean, low=math.nan, high=math.nan, resamples=0)
    sums, counts = np.bincount(number, known[defined]), np.bincount(number)
    draws = np.concatenate(list(resample_patients(len(people), Bootstrap(seed=seed), rows=1000)))
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return ConfidenceInterval(value=float(known[defined].mean()), low=float(low), high=float(high), resamples=len(means))


def show_interval(found: ConfidenceInterval, digits: int = 2) -> str:
    """Writes the mean with its interval, or that there is none.

    Args:
        found: of `mean_interval`; NaN where a number is not known.
        digits: after the decimal point.
    """
    if math.isnan(found["value"]):
        return "not known"
    known = not math.isnan(found["low"])
    interval = f"{found['low']:.{digits}f} to {found['high']:.{digits}f}" if known else "too few for an interval"
    return f"{found['value']:.{digits}f} ({interval})"
