"""Batched augmentation and normalisation of radiographs: geometry and intensity, and the style by which hospitals differ.

The random parameters are drawn apart from the transform, so that the transform is a plain function of images and parameters.
MONAI's `RandAffine` and its intensity transforms take one image at a time, draw inside the call, and took ten times as long for
a batch of 32 at 128 pixels.

What tells hospitals apart in a radiograph and says nothing of the disease (markers, borders, style) is taken out or changed. An image's
result depends on no other image, which private training needs (a style borrowed from another image of the batch, as MixStyle does, would
carry one patient into the gradient of another). All runs where the batch lies.

A CT volume [N, 1, D, S, S] is turned, moved and enlarged in the axial plane as an image is, all slices alike, and moved and stretched along
the patient's axis too; brightness, contrast and noise are an image's. What is about how radiographs are taken is refused of volumes by
`ExperimentConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label
from torch import Tensor
from torch.nn import functional

from pneumofed.common.config.experiment import AugmentationConfig

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


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training images in [0, 1], by colour; `torchvision.transforms._presets`."""

GREY_MEAN = 0.449
GREY_STD = 0.226
"""Averages over colour of the ImageNet constants: a network with summed first weights sees the range that it was trained on."""

CONTRAST_CENTER = 0.5
"""Middle of the grey scale. Contrast about it and then brightness are a change of the width and centre of the display window
(DICOM PS3.3 C.11.2.1.2), which do not depend on how much black border an image has, as its mean does."""

_AXIS_STREAM = 0xA715
"""Likewise of the shift along a volume's axis."""
_STYLE_STREAM = 0x5717E
"""Makes the seed of the draws of `site_style` from that of the noise: no further number is taken from the generator, so that experiments
without them train on the views that they always had."""


@dataclass(frozen=True)
class AugmentationParameters:
    """What happens to each of N images. Lengths are fractions of the image's side.

    Attributes:
        angle_rad: float32 [N], counter-clockwise.
        shift: float32 [N, 2], to the right and downwards.
        scale: float32 [N], above 1 enlarges.
        flip: bool [N], mirrors left and right.
        contrast: float32 [N], a factor about `CONTRAST_CENTER`.
        brightness: float32 [N], added.
        noise_std: float32 [N].
        noise_seed: of the generator that draws the Gaussian noise of all N images.
        markers: bool [N], erases markers.
        border: float32 [N], width of the border that is erased.
        log_gamma: float32 [N], of `change_style`.
        log_amplitude: float32 [N, C, C], of `change_style`.
        axis_shift: float32 [N], of volumes: along the patient's axis, toward the last slice, as a share of its length.
    """

    angle_rad: Tensor
    shift: Tensor
    scale: Tensor
    flip: Tensor
    contrast: Tensor
    brightness: Tensor
    noise_std: Tensor
    noise_seed: int
    markers: Tensor
    border: Tensor
    log_gamma: Tensor
    log_amplitude: Tensor
    axis_shift: Tensor


def draw_parameters(n: int, cfg: AugmentationConfig, generator: torch.Generator) -> AugmentationParameters:
    """Draws parameters for `n` images, each uniform in the range that `cfg` gives; pure in the generator's state.

    Rotation, shift and brightness lie in [-range, range], scale and contrast in [1 - range, 1 + range], the noise's standard
    deviation in [0, noise_std]. As many numbers are drawn whatever the ranges, so that switching one transform off leaves the
    others as they were. What `common.imaging.augment` does is drawn as its constants say.

    Args:
        n: number of images.
        cfg: ranges.
        generator: of the CPU; is moved on.
    """
    uniform = torch.rand(8, n, generator=generator)
    signed = 2.0 * uniform - 1.0
    noise_seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
    return AugmentationParameters(
        angle_rad=signed[0] * math.radians(cfg.rotation_deg),
        shift=signed[1:3].T * cfg.shift_fraction,
        scale=1.0 + signed[3] * cfg.scale_fraction,
        flip=uniform[4] < cfg.horizontal_flip_probability,
        contrast=1.0 + signed[5] * cfg.contrast,
        brightness=signed[6] * cfg.brightness,
        noise_std=uniform[7] * cfg.noise_std,
        noise_seed=noise_seed,
        axis_shift=(2.0 * torch.rand(n, generator=torch.Generator().manual_seed(noise_seed ^ _AXIS_STREAM)) - 1.0)
        * cfg.shift_fraction,
        **_draw_site_style(n, cfg, noise_seed ^ _STYLE_STREAM),
    )


def _draw_site_style(n: int, cfg: AugmentationConfig, seed: int) -> dict[str, Tensor]:
    """The parameters of `site_style` for `n` images; as many numbers are drawn whatever the settings."""
    uniform = torch.rand(4 + (STYLE_CYCLES + 1) ** 2, n, generator=torch.Generator().manual_seed(seed))
    width = WIDEST_BORDER * uniform[2]
    return {
        "markers": uniform[0] < cfg.erase_markers,
        "border": torch.where(uniform[1] < cfg.erase_borders, width, torch.zeros_like(width)),
        "log_gamma": draw_log_factors(uniform[3], cfg.style),
        "log_amplitude": draw_log_factors(uniform[4:].T, cfg.style).reshape(n, STYLE_CYCLES + 1, STYLE_CYCLES + 1),
    }


def augment(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    """Erases markers, changes the style, erases borders, mirrors and moves, changes contrast and brightness, and adds noise.

    In this order; deterministic. What moves in from outside is black. A step that is off for all images (angle 0 and scale 1, ...) is
    left out, so that images come back bit for bit where everything is off. The noise is drawn on the device of `images`, each kind of
    which draws its own.

    Args:
        images: float32 [N, 1, S, S] in [0, 1], or volumes [N, 1, D, S, S]. On a GPU all work is done there.
        parameters: of the same N; of volumes without markers, borders and style.

    Returns:
        float32 of the shape of `images`, in [0, 1], on their device; `images` are left as they were.
    """
    images = _change_site_style(images, parameters)
    images = _mirror(images, parameters)
    images = _move_volumes(images, parameters) if images.ndim == 5 else _move(images, parameters)
    images = _change_grey_levels(images, parameters)
    return _add_noise(images, parameters).clamp(0.0, 1.0)


def to_model_input(pixels: np.ndarray | Tensor) -> Tensor:
    """Converts uint8 `pixels` [N, S, S] to float32 [N, 1, S, S] in [0, 1], and volumes [N, D, S, S] to [N, 1, D, S, S]; always a copy."""
    if isinstance(pixels, Tensor):
        return pixels.to(torch.float32, copy=True).div_(255.0).unsqueeze(1)
    return torch.from_numpy(np.array(pixels, dtype=np.float32)).div_(255.0).unsqueeze(1)


def normalize(images: Tensor, in_channels: int) -> Tensor:
    """Normalises images to about zero mean and unit deviation, as the network expects them.

    With one channel the grey constants are used; with three the image is repeated and each copy takes ImageNet's constants of its
    colour, as torchvision's weights expect.

    Args:
        images: float32 [N, 1, S, S] in [0, 1], or volumes [N, 1, D, S, S], whose networks have one channel.
        in_channels: of the network, 1 or 3.

    Returns:
        float32 [N, in_channels, S, S], or [N, 1, D, S, S], on the device of `images`.
    """
    if in_channels == 1:
        return (images - GREY_MEAN) / GREY_STD
    mean = images.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = images.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (images - mean) / std


def _change_site_style(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    if parameters.markers.any():
        rows = parameters.markers.nonzero().squeeze(1).to(images.device)
        images = images.index_copy(0, rows, erase_markers(images[rows]))
    if parameters.log_gamma.any() or parameters.log_amplitude.any():
        images = change_style(images, parameters.log_gamma, parameters.log_amplitude)
    return erase_borders(images, parameters.border) if parameters.border.any() else images


def _mirror(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    if not parameters.flip.any():
        return images
    return torch.where(_per_image(parameters.flip, images), images.flip(-1), images)


def _move(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    if not (parameters.angle_rad.any() or parameters.shift.any() or (parameters.scale != 1.0).any()):
        return images
    theta = _inverse_map(parameters).to(images)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _move_volumes(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    """As `_move`, each slice in the axial plane, and along the axis: interpolation in three dimensions is one along each of them.

    The slices of a volume are the channels of one image, which all move alike.
    """
    moved = _move(images[:, 0], parameters)
    if parameters.axis_shift.any() or (parameters.scale != 1.0).any():
        weights = _axis_weights(images.shape[2], parameters.axis_shift, parameters.scale).to(moved)
        moved = torch.bmm(weights, moved.flatten(2)).view_as(moved)
    return moved.unsqueeze(1)


def _axis_weights(slices: int, shift: Tensor, scale: Tensor) -> Tensor:
    """float32 [N, D, D]: row z holds by how much each slice enters slice z of the moved volume; what lies outside is black.

    Linear interpolation at the inverse of z -> scale z + shift about the middle, as `grid_sample` has it without aligned corners.
    """
    position = (torch.arange(slices) + 0.5) / slices - 0.5
    source = ((position[None, :] - shift[:, None]) / scale[:, None] + 0.5) * slices - 0.5
    return (1.0 - (source[:, :, None] - torch.arange(slices)[None, None, :]).abs()).clamp_min(0.0)


def _inverse_map(parameters: AugmentationParameters) -> Tensor:
    """float32 [N, 2, 3]: for each output position the input position, in coordinates from -1 to 1, x right and y down.

    The content moves by x -> scale R x + 2 shift, with R the rotation; its inverse is x -> R^T (x - 2 shift) / scale.
    """
    cos = parameters.angle_rad.cos() / parameters.scale
    sin = parameters.angle_rad.sin() / parameters.scale
    inverse = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    offset = -2.0 * inverse @ parameters.shift.unsqueeze(2)
    return torch.cat([inverse, offset], dim=2)


def _change_grey_levels(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    factor = _per_image(parameters.contrast, images)
    offset = CONTRAST_CENTER * (1.0 - factor) + _per_image(parameters.brightness, images)
    return images * factor + offset


def _add_noise(images: Tensor, parameters: AugmentationParameters) -> Tensor:
    if not parameters.noise_std.any():
        return images
    generator = torch.Generator(images.device).manual_seed(parameters.noise_seed)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images + noise * _per_image(parameters.noise_std, images)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.device).view(-1, *(1 for _ in images.shape[1:]))
