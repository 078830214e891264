"""Numbers of an image's grey levels that tell one scanner or processing from another, and nothing of a patient."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NAMES = (
    "mean",
    "deviation",
    "quantile_01",
    "quantile_10",
    "quantile_25",
    "quantile_50",
    "quantile_75",
    "quantile_90",
    "quantile_99",
    "black_share",
    "white_share",
    "entropy_bits",
    "gradient",
    "laplacian",
    "left_right_difference",
    "border_mean",
)
"""The columns, in order."""

_QUANTILES = (0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99)
_LEVELS = 32


def pixel_statistics(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 [N, K], K as in `NAMES`, of model inputs `images` float32 [N, S, S] in [0, 1].

    Shares are of pixels at most 0.02 and at least 0.98; the entropy is of a histogram of 32 levels; `gradient` and `laplacian` are
    mean absolute differences (sharpness and noise); `left_right_difference` is the mean grey of the left half minus that of the
    right one; `border_mean` that of the outermost tenth of the picture.
    """
    return np.stack([_of_image(image) for image in images]) if len(images) else np.empty((0, len(NAMES)), np.float32)


def _of_image(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    half, edge = image.shape[1] // 2, max(1, image.shape[0] // 10)
    across, down = np.diff(image, axis=1), np.diff(image, axis=0)
    inner = image[edge:-edge, edge:-edge]
    return np.array(
        [
            image.mean(),
            image.std(),
            *np.quantile(image, _QUANTILES),
            (image <= 0.02).mean(),
            (image >= 0.98).mean(),
            _entropy_bits(image),
            (np.abs(across).mean() + np.abs(down).mean()) / 2,
            (np.abs(np.diff(across, axis=1)).mean() + np.abs(np.diff(down, axis=0)).mean()) / 2,
            image[:, :half].mean() - image[:, half:].mean(),
            (image.sum() - inner.sum()) / (image.size - inner.size),
        ],
        dtype=np.float32,
    )


def _entropy_bits(image: npt.NDArray[np.float32]) -> float:
    counts = np.bincount(np.minimum((image * _LEVELS).astype(np.int64), _LEVELS - 1).ravel(), minlength=_LEVELS)
    shares = counts[counts > 0] / image.size
    return float(-(shares * np.log2(shares)).sum())
