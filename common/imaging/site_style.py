"""What tells hospitals apart in a radiograph and says nothing of the disease, taken out or changed: markers, borders, style.

Plain functions of a batch and of parameters for each image, as the rest of augmentation: an image's result depends on no other image, which
private training needs (a style borrowed from another image of the batch, as MixStyle does, would carry one patient into the gradient of
another). They run where the batch lies.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label
from torch import Tensor
from torch.nn import functional

WIDEST_BORDER = 0.12
"""Widest border that is erased, as a share of the side. Collimators, film edges and padding lie there; by eye on the public sets the
lungs begin at about an eighth of the side."""
MARKER_RING = 0.2
"""Width of the ring along the edges in which a marker lies as a whole, as a share of the side."""
MARKER_STROKE = 1 / 24
"""A bright structure narrower than this share of the side in one direction is a stroke; as `inference.explain.focus` has it."""
MARKER_BRIGHTER = 0.25
"""By how much a stroke is brighter than what it stands on; likewise. Most ribs are below 0.2."""
MARKER_HEIGHT, MARKER_WIDTH = 0.14, 0.30
"""Of the largest letter and the longest word, as shares of the side: a rib or a clavicle that is a stroke at all is longer."""
STYLE_CYCLES = 2
"""Highest frequency whose amplitude changes, in cycles a side: half a picture is a dark and a bright part of it. A lung is a third of the
side wide, so that an opacity keeps its contrast with what surrounds it."""
STYLE_OCTAVES = 1.0
"""At full strength gamma and each amplitude lie between a half and twice: a factor of 2 to the power of -1 to 1."""


def erase_borders(images: Tensor, width: Tensor) -> Tensor:
    """Blackens the border of each image, as a collimator does.

    Args:
        images: float32 [N, 1, S, S] in [0, 1]; left as they are.
        width: float32 [N], of the border, as a share of the side, in [0, 0.5]; rounded to whole pixels.

    Returns:
        float32 [N, 1, S, S]; what is not border is as it was.
    """
    keep = _edge_distance(images) >= (width.to(images.device) * images.shape[-1]).round().view(-1, 1, 1, 1)
    return torch.where(keep, images, torch.zeros_like(images))


def erase_markers(images: Tensor) -> Tensor:
    """Replaces small thin bright things near the edges, such as side markers and burnt-in letters, by what they stand on.

    A stroke is where the white top-hat, the image minus its grey opening (Serra 1982; Soille 2003, section 4.5), is above
    `MARKER_BRIGHTER`. Strokes with the rim of one pixel that the scaling blurred make connected components; those that are small and
    lie in the ring as a whole take the opening's grey. No hole stays behind that would itself tell where a marker was. Markers that are
    grey, blurred or large stay, and short pieces of bright bone at the very edge may go.

    Args:
        images: float32 [N, 1, S, S] in [0, 1]; left as they are. On a GPU the components are found on the CPU.

    Returns:
        float32 [N, 1, S, S]; what is no marker is as it was.
    """
    reach = max(1, round(MARKER_STROKE * images.shape[-1] / 2))
    opened = _dilate(-_dilate(-images, reach), reach)
    strokes = (images - opened > MARKER_BRIGHTER).to(images.dtype)
    candidates = (_dilate(strokes, 1) > 0).cpu().numpy()
    markers = np.stack([_small_near_edges(one) for one in candidates[:, 0]])
    return torch.where(torch.from_numpy(markers).unsqueeze(1).to(images.device), opened, images)


def change_style(images: Tensor, log_gamma: Tensor, log_amplitude: Tensor) -> Tensor:
    """Changes each image's tone curve and the amplitudes of its lowest frequencies, as if another device had taken it.

    The amplitudes of the low frequencies carry the style, the phases and the rest the content (Yang and Soatto 2020, "FDA: Fourier Domain
    Adaptation for Semantic Segmentation", CVPR, equation 3, who take them from an image of the other domain). A hospital has its own
    images only, so the amplitudes are multiplied by drawn factors instead. The mean grey stays.

    Args:
        images: float32 [N, 1, S, S] in [0, 1]; left as they are.
        log_gamma: float32 [N], natural logarithm of the exponent.
        log_amplitude: float32 [N, STYLE_CYCLES + 1, STYLE_CYCLES + 1], natural logarithm of the factor by cycles down and across,
            whatever the direction; that of the mean is not used.

    Returns:
        float32 [N, 1, S, S] in [0, 1].
    """
    side = images.shape[-1]
    toned = images.clamp(0.0, 1.0) ** log_gamma.to(images).exp().view(-1, 1, 1, 1)
    spectrum = torch.fft.rfft2(toned)
    factor = torch.ones(len(images), 1, side, side // 2 + 1, dtype=images.dtype, device=images.device)
    low = log_amplitude.to(images).exp().unsqueeze(1)
    across = slice(0, STYLE_CYCLES + 1)
    factor[:, :, across, across] = low
    factor[:, :, -STYLE_CYCLES:, across] = low[:, :, 1:].flip(2)  # negative frequencies: the image stays real
    factor[:, :, 0, 0] = 1.0
    changed: Tensor = torch.fft.irfft2(spectrum * factor, s=(side, side))
    return changed.clamp(0.0, 1.0)


def draw_log_factors(uniform: Tensor, strength: float) -> Tensor:
    """Turns numbers uniform in [0, 1] into logarithms of factors, uniform in the logarithm between 2^-strength and 2^strength.

    Args:
        uniform: of any shape.
        strength: in [0, 1]; 0 gives factors of 1.
    """
    return (2.0 * uniform - 1.0) * (strength * STYLE_OCTAVES * math.log(2.0))


def _small_near_edges(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The 8-connected components of `mask` [S, S] that are no larger than a word and lie in the ring along one edge as a whole."""
    side, kept = len(mask), np.zeros_like(mask)
    ring = round(MARKER_RING * side)
    numbered, _ = label(mask, np.ones((3, 3)))
    for number, (rows, columns) in enumerate(find_objects(numbered), start=1):
        is_small = rows.stop - rows.start <= MARKER_HEIGHT * side and columns.stop - columns.start <= MARKER_WIDTH * side
        if is_small and any(span.stop <= ring or span.start >= side - ring for span in (rows, columns)):
            kept[rows, columns] |= numbered[rows, columns] == number
    return kept


def _edge_distance(images: Tensor) -> Tensor:
    """Pixels between each place and the nearest edge, 0 at the edge itself; [S, S]."""
    line = torch.arange(images.shape[-1], device=images.device)
    nearest = torch.minimum(line, line.flip(0))
    return torch.minimum(nearest[:, None], nearest[None, :])


def _dilate(images: Tensor, reach: int) -> Tensor:
    """The largest value at most `reach` pixels away in each direction; beyond the edges there is nothing."""
    return functional.max_pool2d(images, 2 * reach + 1, stride=1, padding=reach)
