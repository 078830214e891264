"""How alike two pictures are to the eye: structural similarity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d

Images = npt.NDArray[np.float64]

WINDOW, WINDOW_SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
"""Wang et al. 2004, section III-B: the window, its deviation in pixels, and the constants for images in [0, 1]."""


def ssim(image: Images, other: Images) -> float:
    """Computes the mean structural similarity of two images; 1 for equal ones (Wang et al. 2004, eq. 13).

    Over the windows that lie inside the image as a whole.

    Args:
        image: float64 [H, W] in [0, 1], 11 pixels a side at least.
        other: of the same shape; the measure is symmetric.
    """
    mean_a, mean_b = _smooth(image), _smooth(other)
    var_a, var_b = _smooth(image**2) - mean_a**2, _smooth(other**2) - mean_b**2
    covariance = _smooth(image * other) - mean_a * mean_b
    light = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return float((light * structure).mean())


def _smooth(image: Images) -> Images:
    """Gaussian means of the whole windows, float64 [H - 10, W - 10]."""
    reach = WINDOW // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * WINDOW_SIGMA**2))
    weights /= weights.sum()
    smooth = correlate1d(correlate1d(image, weights, axis=0), weights, axis=1)
    return smooth[reach:-reach, reach:-reach]
