"""The heat map of a judged image, drawn over the image, with a band below that says what it is and is not."""

from __future__ import annotations

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from pneumofed.common.model_bundle.population import PopulationFinding
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.suitability import Judgement, Prediction

SIDES_PX = 512, 1024
"""Least and greatest longer side of the picture: words can be read at the first, and at the second it is a twentieth of a detector's
pixels to store."""
STATEMENT = "AI result, not for primary diagnosis"
_OPACITY = 0.55
_HOT, _WARM = np.array([0.85, 0.0, 0.0], np.float32), np.array([1.0, 0.8, 0.0], np.float32)


def draw_heat(pixels: np.ndarray, judgement: Judgement, predictor: Predictor) -> np.ndarray:
    """Draws `pixels` float32 [H, W] in [0, 1] with the heat over it and the words in a band below, uint8 [H + band, W, 3].

    The band covers no anatomy. Warm is what speaks for pneumonia, relative to the strongest place of the map in either direction, so
    that an image in which everything speaks against it stays nearly grey.

    Args:
        pixels: of the whole image.
        judgement: of the same image.
        predictor: that judged it.

    Raises:
        ValueError: the image cannot be judged, or the network has no activation map.
    """
    found = judgement.prediction
    if found is None or found.activation_map is None:
        raise ValueError("there is no activation map")
    grey = _resize(pixels)
    heat = place_map(found.activation_map, grey.shape, predictor.manifest.preprocessing.fit)
    opacity = _OPACITY * heat[..., None]
    colour = _WARM + (_HOT - _WARM) * heat[..., None]
    picture = np.rint(255 * (grey[..., None] * (1 - opacity) + colour * opacity)).astype(np.uint8)
    return np.concatenate([picture, _band(words(found, predictor, judgement.population), grey.shape[1])])


def place_map(activation_map: np.ndarray, shape: tuple[int, ...], fit: str) -> np.ndarray:
    """Places `activation_map` over the image that the network's square was made of, float32 [H, W] in [0, 1].

    The inverse of `fit_square`: what lay over black padding is left out, what was cropped away is 0. What speaks against pneumonia is
    0, and 1 is the largest absolute value of the map.

    Args:
        activation_map: float32 [h, w] over the square; above zero speaks for pneumonia.
        shape: (H, W) of the image.
        fit: how the square was made, `pad` or `crop`.
    """
    strength = np.maximum(activation_map, 0) / max(float(np.abs(activation_map).max()), 1e-12)
    side = max(shape) if fit == "pad" else min(shape)
    square = np.asarray(
        PIL.Image.fromarray(strength.astype(np.float32)).resize((side, side), PIL.Image.Resampling.BILINEAR), np.float32
    )
    height, width = shape
    if fit == "pad":
        top, left = (side - height) // 2, (side - width) // 2
        return np.clip(square[top : top + height, left : left + width], 0, 1)
    placed = np.zeros(shape, np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    placed[top : top + side, left : left + side] = np.clip(square, 0, 1)
    return placed


def words(found: Prediction, predictor: Predictor, population: PopulationFinding) -> tuple[str, ...]:
    """Words what stands below the picture; of the patient no more than a group that the model was not judged for.

    Args:
        found: for the image in the picture.
        predictor: that it comes from.
        population: whether the model was judged for such a patient; a line of its own warns where it was not.
    """
    side = "at or above" if found.decision == "pneumonia" else "below"
    phantom = " (trained on PHANTOMS: says nothing about patients)" if predictor.manifest.card.phantom else ""
    return (
        STATEMENT,
        *(f"not judged for this population: {one}" for one in population.outside_words),
        f"pneumonia {_percent(found.probability)}, 95 % interval {_percent(found.low)} to {_percent(found.high)}",
        f"{side} the threshold {_percent(predictor.manifest.threshold.value)}; warm: speaks for pneumonia",
        f"{predictor.manifest.name} {predictor.bundle.digest[:16]}{phantom}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _resize(pixels: np.ndarray) -> np.ndarray:
    longer = max(pixels.shape)
    target = min(max(longer, SIDES_PX[0]), SIDES_PX[1])
    height, width = (max(1, round(length * target / longer)) for length in pixels.shape)
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels, np.float32))
    return np.clip(np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR)), 0, 1)


def _band(lines: tuple[str, ...], width: int) -> np.ndarray:
    """White words on black, uint8 [h, width, 3], as large as the longest line allows."""
    longest = max(ImageFont.load_default(100).getlength(line) for line in lines)
    size = max(5, min(24, int(96 * width / longest)))
    font, step = ImageFont.load_default(size), round(1.3 * size)
    band = PIL.Image.new("RGB", (width, step * len(lines) + size // 2), "black")
    draw = ImageDraw.Draw(band)
    for number, line in enumerate(lines):
        draw.text((size // 3, number * step + size // 6), line, "white", font)
    return np.asarray(band)
