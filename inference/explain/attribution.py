"""Attribution maps: one image, one method, one map of the evidence (`compute_attribution`).

What is explained is the log-odds of the target for an image in [0, 1] (`LogOdds`). Grad-CAM and Grad-CAM++ weigh feature maps by
gradients (`cam`). The other methods go through the pixels, by gradients along a path or by taking parts of the image away, and are
Captum's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import GradientShap, IntegratedGradients, KernelShap, Lime, Occlusion
from scipy.ndimage import gaussian_filter
from sklearn.cluster import KMeans
from torch import Tensor, nn

from pneumofed.common.seeds import derive_seed
from pneumofed.inference.explain.cam import (
    Cam,
    LogOdds,
    activation_map,
    at_size,
    enlarge,
    grad_cam,
    grad_cam_plus_plus,
    larger_side,
)
from pneumofed.inference.explain.methods import Attribution, Detail, Method, Target

PATH_STEPS = 32
"""Sundararajan et al. 2017, section 5, take 20 to 300 steps."""
SHAP_DRAWS = 32
WINDOWS_TO_A_SIDE = 8
SUPERPIXELS = 64
SURROGATE_DRAWS = 384
"""Six for each superpixel: with fewer the estimates of two seeds agree less."""
SUPERPIXEL_COMPACTNESS = 0.3
"""Weight of the distance in the plane, in sides of a superpixel, against the difference in grey (Achanta et al. 2012, eq. 3: m / 100 is
0.1 to 0.4 of their scale of colour)."""
BATCH_IMAGES = 32

EMPTY_BLUR = 1 / 16
"""Deviation of the Gaussian that makes an image empty, as a share of its side. At 128 px that is 8 px: vessels, fissures and the borders
of ribs are gone, thorax and heart stay, so that what replaces a part fits its surroundings (Fong & Vedaldi 2017, section 4.1)."""


def compute_attribution(
    network: nn.Module,
    image: Tensor,
    method: Method,
    target: Target = "pneumonia",
    *,
    seed: int = 0,
    detail: Detail = "last-layer",
    larger: Tensor | None = None,
) -> Attribution:
    """Computes the map of the evidence for `target` in `image`.

    Guarantees:
        Pure in the arguments on one machine with one number of threads. Network and global generators are left as they were, but that the
        network is in evaluation mode.

    Args:
        network: of `build_model`: takes what `common.imaging.augment.normalize` makes.
        image: float32 [1, 1, S, S] in [0, 1], as `fit_square` makes it.
        method: one of `METHODS`.
        target: a class, or `pneumonia` for all but normal.
        seed: of what SHAP and LIME draw.
        detail: of Grad-CAM and Grad-CAM++; the other methods have one of their own.
        larger: the same image, float32 [1, 1, L, L], L being `cam.larger_side(S)`; None enlarges `image`. Only some details look at it.

    Raises:
        ValueError: `image` is not one image, or there is no such class.
        ConfigError: the network has no finer layer.
    """
    if image.ndim != 4 or image.shape[:2] != (1, 1) or image.shape[2] != image.shape[3]:
        raise ValueError(f"image: expected [1, 1, S, S], got {tuple(image.shape)}")
    score, side = LogOdds(network, target), image.shape[-1]
    with torch.inference_mode():
        found = float(score(image))
    if cam := _CAMS.get(method):
        enlarged = at_size(image, larger_side(side)) if larger is None else larger
        values, cell_px = activation_map(cam, score, image, enlarged, detail)
    else:
        with seeded("explanation", method, seed):
            values = _MAKERS[method](score, image)
        cell_px = _cell_px(method, side)
    shown = np.nan_to_num(enlarge(values, side).numpy())
    return Attribution(shown, method, target, found, cell_px, detail if cam else None)


def empty(image: Tensor) -> Tensor:
    """Blurs `image` float32 [1, 1, S, S], or a volume [1, 1, slices, S, S], until no detail is left: what stands where something was taken
    away."""
    blurred = gaussian_filter(image[0, 0].numpy(), [EMPTY_BLUR * length for length in image.shape[2:]])
    return torch.from_numpy(blurred)[None, None]


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seeds the global generators of torch and numpy, which Captum draws from, with `parts`; restores them afterwards."""
    seed, state = derive_seed(*parts), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(state)


def integrated_gradients(score: LogOdds, image: Tensor) -> Tensor:
    """Integrates the gradient along the path from the empty image, float32 [S, S] (Sundararajan et al. 2017, eq. 1).

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].

    Returns:
        Sums to about the difference of the two scores, the closer the larger `PATH_STEPS` is.
    """
    found = IntegratedGradients(score).attribute(image, empty(image), n_steps=PATH_STEPS, internal_batch_size=BATCH_IMAGES)
    return found[0, 0].detach().float()


def gradient_shap(score: LogOdds, image: Tensor) -> Tensor:
    """Computes expected gradients over three empty images, blurred, grey and black, float32 [S, S] (Erion et al. 2021, eq. 3).

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1]. Pure only inside `seeded`.
    """
    baselines = torch.cat([empty(image), torch.full_like(image, float(image.mean())), torch.zeros_like(image)])
    found: Tensor = GradientShap(score).attribute(image, baselines, n_samples=SHAP_DRAWS, stdevs=0.02)
    return found[0, 0].detach().float()


def occlusion(score: LogOdds, image: Tensor) -> Tensor:
    """Computes how far the score falls when the windows over a pixel are emptied, on the average of these windows, float32 [S, S].

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].
    """
    window = max(2, image.shape[-1] // WINDOWS_TO_A_SIDE)
    found: Tensor = Occlusion(score).attribute(
        image,
        sliding_window_shapes=(1, window, window),
        strides=(1, window // 2, window // 2),
        baselines=empty(image),
        perturbations_per_eval=BATCH_IMAGES,
    )
    return found[0, 0].detach().float()


def kernel_shap(score: LogOdds, image: Tensor) -> Tensor:
    """Estimates the Shapley values of superpixels by weighted regression on random coalitions, float32 [S, S].

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1]. Pure only inside `seeded`.
    """
    return _surrogate(KernelShap(score), image)


def lime(score: LogOdds, image: Tensor) -> Tensor:
    """Computes the coefficients of superpixels in a ridge regression with penalty 1, as in the authors' own program, float32 [S, S].

    Captum's default, a Lasso with penalty 0.01, finds no superpixel at all where the score moves by a tenth of a log-odds.

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1]. Pure only inside `seeded`.
    """
    return _surrogate(Lime(score, interpretable_model=SkLearnRidge(alpha=1.0)), image)


def superpixels(image: np.ndarray, count: int = SUPERPIXELS) -> np.ndarray:
    """Groups pixels that are near each other in place and grey value, int64 [S, S] from 0 to at most `count` - 1.

    k-means over (row, column, grey) from a square grid of centres, as SLIC (Achanta et al. 2012) without its search window. Deterministic.

    Args:
        image: float32 [S, S] in [0, 1].
        count: of superpixels, at least 1; rounded down to a square number.
    """
    side, cells = image.shape[0], int(np.sqrt(count))
    place = (np.indices(image.shape).reshape(2, -1).T + 0.5) * (cells / side * SUPERPIXEL_COMPACTNESS)
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
        image, baselines=empty(image), feature_mask=segments, n_samples=SURROGATE_DRAWS, perturbations_per_eval=BATCH_IMAGES
    )
    return (found / area)[0, 0].detach().float()


_CAMS: dict[Method, Cam] = {"grad-cam": grad_cam, "grad-cam++": grad_cam_plus_plus}
_MAKERS: dict[Method, Callable[[LogOdds, Tensor], Tensor]] = {
    "integrated-gradients": integrated_gradients,
    "gradient-shap": gradient_shap,
    "occlusion": occlusion,
    "kernel-shap": kernel_shap,
    "lime": lime,
}


def _cell_px(method: Method, side: int) -> float:
    if method == "occlusion":
        return side / WINDOWS_TO_A_SIDE
    return side / SUPERPIXELS**0.5 if method in ("kernel-shap", "lime") else 1.0
