"""`explain`: one image, one method, one map."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from client.explain.cam import grad_cam, grad_cam_plus_plus
from client.explain.methods import Attribution, Method, Target
from client.explain.pixels import (
    SUPERPIXELS,
    WINDOWS_TO_A_SIDE,
    gradient_shap,
    integrated_gradients,
    kernel_shap,
    lime,
    occlusion,
)
from client.explain.score import LogOdds, seeded

_MAKERS: dict[Method, Callable[[LogOdds, Tensor], Tensor]] = {
    "grad-cam": grad_cam,
    "grad-cam++": grad_cam_plus_plus,
    "integrated-gradients": integrated_gradients,
    "gradient-shap": gradient_shap,
    "occlusion": occlusion,
    "kernel-shap": kernel_shap,
    "lime": lime,
}


def explain(network: nn.Module, image: Tensor, method: Method, target: Target = "pneumonia", *, seed: int = 0) -> Attribution:
    """The evidence for `target` in `image`.

    Guarantees:
        Pure in the arguments on one machine with one number of threads. Network and global generators are left as they were, but that the
        network is in evaluation mode.

    Args:
        network: of `build_model`: takes what `common.transforms.normalize` makes.
        image: float32 [1, 1, S, S] in [0, 1], as `fit_square` makes it.
        method: one of `METHODS`.
        target: a class, or `pneumonia` for all but normal.
        seed: of what SHAP and LIME draw.

    Raises:
        ValueError: `image` is not one image, or there is no such class.
    """
    if image.ndim != 4 or image.shape[:2] != (1, 1) or image.shape[2] != image.shape[3]:
        raise ValueError(f"image: expected [1, 1, S, S], got {tuple(image.shape)}")
    score, side = LogOdds(network, target), image.shape[-1]
    with torch.inference_mode():
        found = float(score(image))
    with seeded("explanation", method, seed):
        values = _MAKERS[method](score, image)
    shown = np.nan_to_num(enlarge(values, side).numpy())
    return Attribution(shown, method, target, found, _cell_px(method, side, values.shape[-1]))


def enlarge(values: Tensor, side: int) -> Tensor:
    """`values` [h, w] as float32 [side, side], bilinear between the middles of the cells."""
    if values.shape == (side, side):
        return values.float()
    return functional.interpolate(values[None, None].float(), (side, side), mode="bilinear", align_corners=False)[0, 0]


def _cell_px(method: Method, side: int, cells: int) -> float:
    if method == "occlusion":
        return side / WINDOWS_TO_A_SIDE
    return side / SUPERPIXELS**0.5 if method in ("kernel-shap", "lime") else side / cells
