"""The map for the reading room: Grad-CAM without a gradient and without torch, from what the ONNX graph gives with the probability."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from client.explain.focus import Focus, judge_focus
from client.explain.lungs import find_lungs
from client.explain.markers import LARGEST_PX, find_markers
from client.explain.methods import Attribution
from client.explain.placing import place_on_image


def quick_map(activation_map: np.ndarray, score: float, side: int) -> Attribution:
    """Grad-CAM of P(pneumonia) from `Prediction.activation_map` float32 [h, w] and `Prediction.score`; well under a millisecond.

    The activation map is sum_k v_k A_k with v the gradient of the score by the features (Zhou et al. 2016, eq. 2). The features are
    averages of the maps A, so the gradient by each place of map k is v_k / (h w), and so is its mean: this is Grad-CAM
    (Selvaraju et al. 2017, eq. 1-2) times h w. For a network without averages there is no activation map, and none is to be had here.

    Args:
        activation_map: of one image.
        score: its log-odds of pneumonia.
        side: of the square that the network saw.
    """
    values = Image.fromarray(np.maximum(activation_map, 0.0).astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    return Attribution(np.asarray(values), "grad-cam", "pneumonia", score, side / activation_map.shape[-1])


def quick_focus(pixels: np.ndarray, activation_map: np.ndarray, fit: Literal["pad", "crop"]) -> Focus:
    """Where the weight of the map lies in the image that it was made of; about 0.15 s, most of it the search for the lungs.

    Asked of the image at the resolution at which marks are looked for, so that its cost does not grow with the detector's.

    Args:
        pixels: float32 [H, W] in [0, 1].
        activation_map: `Prediction.activation_map` float32 [h, w]; what is above zero speaks for pneumonia.
        fit: how the network's square was made.
    """
    small = _reduced(pixels)
    side = max(small.shape) if fit == "pad" else min(small.shape)
    values = quick_map(activation_map, 0.0, side).values
    shape = (small.shape[0], small.shape[1])
    placed = place_on_image(values, shape, fit)
    return judge_focus(placed, find_lungs(small), find_markers(small), side / activation_map.shape[-1] / 2)


def _reduced(pixels: np.ndarray) -> np.ndarray:
    scale = LARGEST_PX / max(pixels.shape)
    if scale >= 1:
        return pixels
    height, width = (max(1, round(scale * length)) for length in pixels.shape)
    image = Image.fromarray(np.ascontiguousarray(pixels, np.float32))
    return np.clip(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)), 0.0, 1.0)
