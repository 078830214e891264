"""The map for the reading room: Grad-CAM without a gradient and without torch, from what the ONNX graph gives with the probability."""

from __future__ import annotations

import numpy as np
from PIL import Image

from client.explain.methods import Attribution


def quick_map(activation_map: np.ndarray, score: float, side: int) -> Attribution:
    """Grad-CAM of P(pneumonia) from `Judgement.activation_map` float32 [h, w] and `Judgement.score`; well under a millisecond.

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
