"""Methods that go through the pixels: by gradients along a path, and by taking parts of the image away. All are Captum's."""

from __future__ import annotations

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import GradientShap, IntegratedGradients, KernelShap, Lime, Occlusion
from sklearn.cluster import KMeans
from torch import Tensor

from client.explain.score import LogOdds, empty

PATH_STEPS = 32
"""Sundararajan et al. 2017, section 5, take 20 to 300 steps."""
SHAP_DRAWS = 32
WINDOWS_TO_A_SIDE = 8
SUPERPIXELS = 64
SURROGATE_DRAWS = 384
"""Six for each superpixel: with fewer the estimates of two seeds agree less."""
COMPACTNESS = 0.3
"""Weight of the distance in the plane, in sides of a superpixel, against the difference in grey (Achanta et al. 2012, eq. 3: m / 100 is
0.1 to 0.4 of their scale of colour)."""
AT_ONCE = 32


def integrated_gradients(score: LogOdds, image: Tensor) -> Tensor:
    """float32 [S, S]: the path from the empty image (Sundararajan et al. 2017, eq. 1); sums to about the difference of the scores."""
    found = IntegratedGradients(score).attribute(image, empty(image), n_steps=PATH_STEPS, internal_batch_size=AT_ONCE)
    return found[0, 0].detach().float()


def gradient_shap(score: LogOdds, image: Tensor) -> Tensor:
    """float32 [S, S]: expected gradients over three empty images, blurred, grey and black (Erion et al. 2021, eq. 3)."""
    baselines = torch.cat([empty(image), torch.full_like(image, float(image.mean())), torch.zeros_like(image)])
    found: Tensor = GradientShap(score).attribute(image, baselines, n_samples=SHAP_DRAWS, stdevs=0.02)
    return found[0, 0].detach().float()


def occlusion(score: LogOdds, image: Tensor) -> Tensor:
    """float32 [S, S]: how far the score falls when the windows over a pixel are emptied, on the average of these windows."""
    window = max(2, image.shape[-1] // WINDOWS_TO_A_SIDE)
    found: Tensor = Occlusion(score).attribute(
        image,
        sliding_window_shapes=(1, window, window),
        strides=(1, window // 2, window // 2),
        baselines=empty(image),
        perturbations_per_eval=AT_ONCE,
    )
    return found[0, 0].detach().float()


def kernel_shap(score: LogOdds, image: Tensor) -> Tensor:
    """float32 [S, S]: Shapley values of superpixels, estimated by weighted regression on random coalitions."""
    return _surrogate(KernelShap(score), image)


def lime(score: LogOdds, image: Tensor) -> Tensor:
    """float32 [S, S]: coefficients of superpixels in a ridge regression with penalty 1, as in the authors' own program.

    Captum's default, a Lasso with penalty 0.01, finds no superpixel at all where the score moves by a tenth of a log-odds.
    """
    return _surrogate(Lime(score, interpretable_model=SkLearnRidge(alpha=1.0)), image)


def superpixels(image: np.ndarray, count: int = SUPERPIXELS) -> np.ndarray:
    """int64 [S, S], 0 to at most `count` - 1: pixels that are near each other in place and grey value.

    k-means over (row, column, grey) from a square grid of centres, as SLIC (Achanta et al. 2012) without its search window. Deterministic.
    """
    side, cells = image.shape[0], int(np.sqrt(count))
    place = (np.indices(image.shape).reshape(2, -1).T + 0.5) * (cells / side * COMPACTNESS)
    points = np.column_stack([place, image.ravel()])
    middle = ((np.arange(cells) + 0.5) * side / cells).astype(int)
    starts = np.add.outer(middle * side, middle).ravel()
    found = KMeans(len(starts), init=points[starts], n_init=1, max_iter=10, algorithm="lloyd").fit_predict(points)
    return np.unique(found, return_inverse=True)[1].reshape(image.shape).astype(np.int64)


def _surrogate(method: KernelShap | Lime, image: Tensor) -> Tensor:
    segments = torch.from_numpy(superpixels(image[0, 0].numpy()))[None, None]
    # Sum over a superpixel is its coefficient, whatever its size.
    area = torch.bincount(segments.ravel()).float()[segments]
    found: Tensor = method.attribute(
        image, baselines=empty(image), feature_mask=segments, n_samples=SURROGATE_DRAWS, perturbations_per_eval=AT_ONCE
    )
    return (found / area)[0, 0].detach().float()
