"""How alike a reconstruction and an image are, and whether it tells whose image it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d
from scipy.optimize import linear_sum_assignment

Images = npt.NDArray[np.float64]

WINDOW, WINDOW_SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
"""Wang et al. 2004, section III-B: the window, its deviation in pixels, and the constants for images in [0, 1]."""

_LARGEST_PSNR = 100.0


def psnr(image: Images, other: Images) -> float:
    """Peak signal-to-noise ratio in dB of two images in [0, 1], 100 at most: -10 log10 of the mean squared difference."""
    error = float(np.mean((image - other) ** 2))
    return min(_LARGEST_PSNR, -10.0 * float(np.log10(max(error, 1e-12))))


def ssim(image: Images, other: Images) -> float:
    """Mean structural similarity of two images in [0, 1], 11 pixels a side at least; 1 for equal ones (Wang et al. 2004, eq. 13).

    Over the windows that lie inside the image as a whole.
    """
    mean_a, mean_b = _smooth(image), _smooth(other)
    var_a, var_b = _smooth(image**2) - mean_a**2, _smooth(other**2) - mean_b**2
    covariance = _smooth(image * other) - mean_a * mean_b
    light = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return float((light * structure).mean())


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


def _smooth(image: Images) -> Images:
    """Gaussian means of the whole windows, float64 [H - 10, W - 10]."""
    reach = WINDOW // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * WINDOW_SIGMA**2))
    weights /= weights.sum()
    smooth = correlate1d(correlate1d(image, weights, axis=0), weights, axis=1)
    return smooth[reach:-reach, reach:-reach]
