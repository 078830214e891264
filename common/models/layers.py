"""Layers for training under noise: convolutions with standardised weights and the wavelet scattering transform.

`StandardizedConv2d` (Qiao et al. 2019) trains better under noise (De et al. 2022, section 3.2). `Scattering2D` gives image features that
are fixed in advance and so cost no privacy: Mallat 2012; Bruna & Mallat 2013; as the first layer of a private network: Tramèr & Boneh 2021,
section 2.2. It is written here since kymatio 0.3.0, the library for it, no longer imports beside scipy 1.15 and later. The filters are
kymatio's and its numbers come back to within two in a thousand; products are taken only over the part of the spectrum where the next
filter is not zero. A complex spectrum [..., M, M] may also be a pair of real ones, [2, ..., M, M], for ONNX, which has no complex numbers:
Fourier transforms are then products with the matrix of cosines and sines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.models.compute import import_torchvision

_SqueezeExcitation: Any = import_torchvision().ops.misc.SqueezeExcitation

STANDARDIZE_EPSILON = 1e-6
"""Added to a row's squared length, which is about 2 at the first weights, so that a vanishing row does no harm."""

WAVELET_SIGMA = 0.8
"""Deviation in pixels of the finest wavelet's envelope, and of the low-pass filter of scale 1; doubles with each scale."""
WAVELET_FREQUENCY = 0.75 * pi
"""Radians per pixel of the finest wavelet's oscillation; halves with each scale. Both are of `kymatio.scattering2d.filter_bank`."""


WAVELET_CELLS = 8
"""Places to a side that wavelet features are averaged to."""


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and length 1: row o of the weight is used as u_o = (w_o - mean w_o) / length.

    With length^2 = ||w_o - mean w_o||^2 + `STANDARDIZE_EPSILON`. Outputs of white unit input have variance 1, whatever the filter's
    size (Brock et al. 2021, eq. 1, without gain, which the norm layer that follows would undo). State dict and initial weights are
    those of `nn.Conv2d`, so weights of either may be loaded.

    Row o of the weight, flattened to D numbers, gets the gradient J d = s (d - mean d - u (u . d)), with d the gradient of u and
    s = 1 / length. J only shortens but for s: 1 - e e^T - u u^T, e the unit vector along (1, ..., 1) and ||u|| <= 1, has its
    eigenvalues in [-1, 1], even if rounding left u a mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = centred * (centred.square().sum(dim=(1, 2, 3), keepdim=True) + STANDARDIZE_EPSILON).rsqrt()
        return self._conv_forward(x, weight, self.bias)

    @torch.no_grad()
    def standardize_rows(self) -> tuple[Tensor, Tensor]:
        """Computes u, float32 [O, D] in the order (height, width, channel) of a channels-last weight, and s, float32 [O]."""
        rows = self.weight.permute(0, 2, 3, 1).flatten(1)
        centred = rows - rows.mean(dim=1, keepdim=True)
        scale = (centred.square().sum(dim=1) + STANDARDIZE_EPSILON).rsqrt()
        return centred * scale[:, None], scale

    def pull_back(self, gradients: Tensor, sums: torch.dtype = torch.float32) -> Tensor:
        """Computes J d.

        Args:
            gradients: d, float32 [..., O, D] in the order of `standardize_rows`.
            sums: number type of the two sums over D. With float64 the result is wrong by less than ten roundings of s d.
        """
        rows, scale = self.standardize_rows()
        mean = gradients.mean(dim=-1, keepdim=True, dtype=sums).float()
        along = (gradients * rows).sum(dim=-1, keepdim=True, dtype=sums).float()
        return (gradients - mean - along * rows) * scale[:, None]

    def least_loss(self, along_ones: Tensor, along_rows: Tensor, error: Tensor) -> Tensor:
        """Computes what of ||s d||^2 is missing in ||J d||^2 for each row at least, where u . d is known up to an error.

        With D numbers in a row and q = 1 . u, which is 0 but for rounding, it is
        s^2 ((1 . d)^2 / D + (2 - ||u||^2) (u . d)^2 - 2 q (1 . d) (u . d) / D).

        Args:
            along_ones: s (1 . d), float64 [..., O].
            along_rows: s (u . d), float64 [..., O], wrong by no more than `error`.
            error: float64 [..., O].
        """
        rows = self.standardize_rows()[0].double()
        width, size = rows.shape[1], along_rows.abs()
        square = (2.0 - rows.square().sum(dim=1)) * (size - error).clamp_min(0.0).square()
        cross = 2.0 * rows.sum(dim=1).abs() * along_ones.abs() * (size + error) / width
        return along_ones.square() / width + square - cross


def standardize_weights(model: nn.Module) -> None:
    """Makes every convolution of `model` a `StandardizedConv2d`, in place and with its weights.

    Those of squeeze-and-excitation stay, since no norm layer follows their outputs: a gate needs the freedom to be large.
    """
    gates = {id(part) for module in model.modules() if isinstance(module, _SqueezeExcitation) for part in module.modules()}
    for module in model.modules():
        if type(module) is nn.Conv2d and id(module) not in gates:
            module.__class__ = StandardizedConv2d


class Scattering2D(nn.Module):
    """Order 2 scattering: |x * psi_1| * phi and ||x * psi_1| * psi_2| * phi for all pairs of wavelets, the second one coarser.

    Has no parameter and nothing in its state dict: the filters are a function of the two numbers and the image's size. What comes out
    is stable under small deformations, does not change with shifts that are small against 2^scale pixels, and has one value where the
    image has 4^scale.

    Args:
        scale: J, octaves of wavelets. The feature map has the image's side over 2^J, rounded up.
        orientations: L, directions of the wavelets in the half circle.
    """

    def __init__(self, scale: int, orientations: int = 8) -> None:
        super().__init__()
        self.scale = scale
        self.orientations = orientations
        self.in_real_numbers = False

    @property
    def channels(self) -> int:
        """K = 1 + L J + L^2 J (J - 1) / 2."""
        return 1 + self.orientations * self.scale + self.orientations**2 * self.scale * (self.scale - 1) // 2

    def forward(self, images: Tensor) -> Tensor:
        """Computes the feature map, float32 [N, K, s, s] with s = S / 2^J, rounded up, of `images`, float32 [N, 1, S, S].

        Images are mirrored at their border. Channels are ordered as kymatio's but for the second order, which runs over scales first:
        the mean, then (scale, direction), then (first scale, second scale, first direction, second direction).
        """
        side, step = images.shape[-1], 2**self.scale
        index = _mirrored_positions(side, step, -side % step).to(images.device)
        mirrored = images.float()[:, 0, index][:, :, index]
        return scatter(mirrored, self.scale, self.orientations, in_real_numbers=self.in_real_numbers)[..., 1:-1, 1:-1]


@contextmanager
def real_numbers(network: nn.Module) -> Iterator[None]:
    """Has the scattering of `network` computed in real numbers meanwhile, for a graph that has no complex ones: the same up to rounding."""
    layers = [module for module in network.modules() if isinstance(module, Scattering2D)]
    for layer in layers:
        layer.in_real_numbers = True
    try:
        yield
    finally:
        for layer in layers:
            layer.in_real_numbers = False


def scatter(images: Tensor, scale: int, orientations: int, *, in_real_numbers: bool = False) -> Tensor:
    """Computes the scattering of periodic images; commutes with shifts by 2^J.

    The first layer's directions go one by one, since the second layer's maps of all of them at once would fill the memory.

    Args:
        images: float32 [N, M, M], M a multiple of 2^J.
        scale: J, octaves of wavelets.
        orientations: L, directions of the wavelets in the half circle.
        in_real_numbers: whether spectra are pairs of real numbers.

    Returns:
        float32 [N, K, M / 2^J, M / 2^J], with K as `Scattering2D.channels`.
    """
    transform = _real_spectrum if in_real_numbers else torch.fft.fft2
    spectrum = transform(images.unsqueeze(1))
    zeroth, first, second = [_smooth(spectrum, 0, scale)], [], []
    for j in range(scale):
        layer = transform(_wavelet_modulus(spectrum, 0, j, orientations))
        first.append(_smooth(layer, j, scale))
        for coarser in range(j + 1, scale):
            for direction in layer.split(1, dim=-3):
                deeper = transform(_wavelet_modulus(direction, j, coarser, orientations))
                second.append(_smooth(deeper, coarser, scale))
    return torch.cat(zeroth + first + second, dim=1)


def wavelet_count(scattering: Scattering2D) -> int:
    """Counts the features D of `wavelet_features`."""
    return scattering.channels * WAVELET_CELLS**2


def wavelet_features(scattering: Scattering2D, x: Tensor) -> Tensor:
    """Computes float32 [N, D] of length 1 a row.

    Args:
        scattering: the transform.
        x: normalised float32 [N, C, S, S]; channels are averaged.
    """
    cells = functional.adaptive_avg_pool2d(scattering(x.mean(dim=1, keepdim=True)), WAVELET_CELLS)
    return functional.normalize(functional.group_norm(cells, group_count(scattering.channels)).flatten(1))


def zero_classifier(features: int, classes: int) -> nn.Linear:
    """Builds a classifier that begins with zeros: its loss is convex, and random first weights would be noise under noise.

    Args:
        features: D.
        classes: number of logits.
    """
    classifier = nn.Linear(features, classes)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return classifier


def group_count(channels: int) -> int:
    """Chooses the number of groups: 32, or the largest divisor of `channels` below; 32 is the default of Wu & He 2018, section 3.1."""
    return next(groups for groups in range(min(32, channels), 0, -1) if channels % groups == 0)


def morlet(side: int, j: int, orientations: int) -> np.ndarray:
    """Computes the Fourier transforms, which are real, of the Morlet wavelets of one scale in all directions.

    psi(u) = g(u) (exp(i xi.u) - beta) with an elliptic Gaussian g and beta such that the mean is zero (Bruna & Mallat 2013,
    section 2.1).

    Args:
        side: of the grid, in pixels.
        j: the wavelet is 2^j times as wide as the finest one; may be below 0 by no more than the grid is finer than the wavelet needs.
        orientations: L, directions in the half circle.

    Returns:
        float32 [L, side, side].
    """
    sigma, frequency, slant = WAVELET_SIGMA * 2.0**j, WAVELET_FREQUENCY / 2.0**j, 4.0 / orientations
    filters = []
    for number in range(orientations):
        angle = (orientations - orientations // 2 - 1 - number) * pi / orientations
        wave = _gaussian(side, sigma, slant, angle, frequency)
        envelope = _gaussian(side, sigma, slant, angle, 0.0)
        filters.append(wave - wave[0, 0] / envelope[0, 0] * envelope)
    return np.stack(filters).astype(np.float32)


def low_pass(side: int, scale: int) -> np.ndarray:
    """Computes the Fourier transform of the Gaussian that averages over about 2^scale pixels; 1 at frequency 0.

    Args:
        side: of the grid, in pixels.
        scale: octaves; each doubles the Gaussian's width.

    Returns:
        float32 [side, side].
    """
    return _gaussian(side, WAVELET_SIGMA * 2.0 ** (scale - 1), 1.0, 0.0, 0.0).astype(np.float32)


def _gaussian(side: int, sigma: float, slant: float, angle: float, frequency: float) -> np.ndarray:
    """exp(-sigma^2 (a^2 + b^2 / slant^2) / 2), a along `angle` from `frequency` on, b across; summed over the periods of the grid."""
    grid = 2.0 * pi * np.fft.fftfreq(side)
    periods = 2.0 * pi * np.arange(-1, 2)
    row = (grid[:, None] + periods)[:, None, :, None]
    column = (grid[:, None] + periods)[None, :, None, :]
    along = np.cos(angle) * row + np.sin(angle) * column - frequency
    across = np.cos(angle) * column - np.sin(angle) * row
    return np.exp(-0.5 * sigma**2 * (along**2 + (across / slant) ** 2)).sum(axis=(2, 3))


def _wavelet_modulus(spectrum: Tensor, level: int, j: int, orientations: int) -> Tensor:
    """|u * psi_j| [N, L, M', M'] at every 2^j-th pixel; `spectrum` [N, 1, M, M] is that of u at every 2^level-th."""
    fine = max(j - 1, 0)
    kept = _crop_spectrum(spectrum, fine - level)
    folded = _fold_spectrum(kept * _morlet(kept.shape[-1], j - fine, orientations, kept.device), j - fine)
    return torch.fft.ifft2(folded).abs() if folded.is_complex() else _from_real_spectrum(folded).square().sum(dim=0).sqrt()


def _smooth(spectrum: Tensor, level: int, scale: int) -> Tensor:
    """u * phi [N, C, M', M'] at every 2^scale-th pixel; `spectrum` [N, C, M, M] is that of u at every 2^level-th."""
    fine = max(scale - 2, level)
    kept = _crop_spectrum(spectrum, fine - level)
    folded = _fold_spectrum(kept * _low_pass(kept.shape[-1], scale - fine, kept.device), scale - fine)
    return torch.fft.ifft2(folded).real if folded.is_complex() else _from_real_spectrum(folded)[0]


def _real_spectrum(maps: Tensor) -> Tensor:
    """The Fourier transform [2, N, C, M, M] of real maps [N, C, M, M], real part first: F x F with F = cos - i sin."""
    cosine, sine = _fourier(maps.shape[-1], maps.device)
    along_cosine, along_sine = maps @ cosine, maps @ sine
    real = cosine @ along_cosine - sine @ along_sine
    return torch.stack([real, -(cosine @ along_sine) - sine @ along_cosine])


def _from_real_spectrum(spectrum: Tensor) -> Tensor:
    """The inverse transform of pairs [2, N, C, M, M], as such pairs."""
    cosine, sine = _fourier(spectrum.shape[-1], spectrum.device)
    along_cosine, along_sine = spectrum @ cosine, spectrum @ sine
    rows_real, rows_imaginary = along_cosine[0] - along_sine[1], along_sine[0] + along_cosine[1]
    real = cosine @ rows_real - sine @ rows_imaginary
    imaginary = sine @ rows_real + cosine @ rows_imaginary
    return torch.stack([real, imaginary]) / spectrum.shape[-1] ** 2


def _crop_spectrum(spectrum: Tensor, octaves: int) -> Tensor:
    """The spectrum of every 2^octaves-th value of a map that has nothing above the frequencies that are kept."""
    if octaves == 0:
        return spectrum
    side = spectrum.shape[-1]
    half = side >> (octaves + 1)
    rows = torch.cat([spectrum[..., :half, :], spectrum[..., side - half :, :]], dim=-2)
    return torch.cat([rows[..., :half], rows[..., side - half :]], dim=-1) / 4**octaves


def _fold_spectrum(spectrum: Tensor, octaves: int) -> Tensor:
    """The spectrum of every 2^octaves-th value of any map: the mean over its periods, halved side by side, which is quicker."""
    for _ in range(octaves):
        upper, lower = spectrum.chunk(2, dim=-2)
        left, right = (upper + lower).chunk(2, dim=-1)
        spectrum = left + right
    return spectrum / 4**octaves if octaves else spectrum


def _mirrored_positions(side: int, margin: int, rest: int) -> Tensor:
    """Positions 0 .. side - 1 with `margin` more before and `margin + rest` more behind, mirrored as often as it takes."""
    position = torch.arange(-margin, side + margin + rest, device="cpu") % (2 * (side - 1))
    return torch.minimum(position, 2 * (side - 1) - position)


@lru_cache(maxsize=64)
def _morlet(side: int, j: int, orientations: int, device: torch.device) -> Tensor:
    return _to_tensor(morlet(side, j, orientations), device)


@lru_cache(maxsize=64)
def _low_pass(side: int, scale: int, device: torch.device) -> Tensor:
    return _to_tensor(low_pass(side, scale), device)


@lru_cache(maxsize=64)
def _fourier(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi j k / M, each float32 [M, M]."""
    angles = 2.0 * np.pi / side * (np.outer(np.arange(side), np.arange(side)) % side)
    return _to_tensor(np.cos(angles).astype(np.float32), device), _to_tensor(np.sin(angles).astype(np.float32), device)


def _to_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    """Kept by the cache, so it must not be a tensor of the inference mode that the caller may be in: autograd refuses those."""
    with torch.inference_mode(mode=False):
        return torch.from_numpy(values).to(device)
