"""How alike a reconstruction and an image are, and whether it tells whose image it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Images = npt.NDArray[np.float64]

_LARGEST_PSNR = 100.0


def psnr(image: Images, other: Images) -> float:
    """Peak signal-to-noise ratio in dB of two images in [0, 1], 100 at most: -10 log10 of the mean squared difference."""
    error = float(np.mean((image - other) ** 2))
    return min(_LARGEST_PSNR, -10.0 * float(np.log10(max(error, 1e-12))))


def correlations(images: Images, candidates: Images) -> npt.NDArray[np.float64]:
    """Pearson's correlation over pixels of each of `images` [A, S, S] with each of `candidates` [B, S, S], float64 [A, B].

    An image without contrast has none: 0.
    """
    return _standardized(images) @ _standardized(candidates).T


def ranks(found: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of the true candidate among all by correlation, int64 [A], 1 where the reconstruction identifies it.

    Candidates that tie with the true one stand before it.

    Args:
        found: correlations [A, B].
        truth: position of the true candidate of each row.
    """
    of_truth = found[np.arange(len(truth)), truth]
    return (found >= of_truth[:, None]).sum(axis=1)


def match(reconstructions: Images, images: Images) -> npt.NDArray[np.int64]:
    """Which reconstruction stands for each image, int64: the assignment of the largest sum of correlations.

    Who inverts a batch cannot know the order; giving them the best one overstates the attack.
    """
    rows, columns = linear_sum_assignment(correlations(images, reconstructions), maximize=True)
    return columns[np.argsort(rows)].astype(np.int64)


def _standardized(images: Images) -> Images:
    flat = images.reshape(len(images), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 1e-9)
