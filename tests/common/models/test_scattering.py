"""Scattering: kymatio's numbers, the slow way by its definition, covariance, stability, and a network that trains its head alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.config.choices import ModelName
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.models.build import build_model, classifier_of, set_trainable
from pneumofed.common.models.layers import WAVELET_FREQUENCY, Scattering2D, low_pass, morlet, real_numbers, scatter
from pneumofed.common.wire.parameter_layout import ArraysLayout

quick = settings(max_examples=15, deadline=None)


def image(side: int, seed: int = 0) -> torch.Tensor:
    """Smooth structure with noise, float32 [1, side, side]."""
    rng = np.random.default_rng(seed)
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    waves = np.sin(2 * np.pi * 3 * row / side) * np.cos(2 * np.pi * 5 * column / side)
    return torch.from_numpy((0.5 + 0.3 * waves + 0.1 * rng.standard_normal((side, side))).astype(np.float32))[None]


def by_definition(x: np.ndarray, scale: int, orientations: int) -> np.ndarray:
    """Obviously right, but slow: every product over the whole grid, and only the last result is subsampled."""
    low, step = low_pass(x.shape[-1], scale), 2**scale
    wavelets = [morlet(x.shape[-1], j, orientations) for j in range(scale)]

    def modulus(u: np.ndarray, wavelet: np.ndarray) -> np.ndarray:
        return np.abs(np.fft.ifft2(np.fft.fft2(u) * wavelet))

    def smooth(u: np.ndarray) -> np.ndarray:
        return np.fft.ifft2(np.fft.fft2(u) * low).real[::step, ::step]

    layers = [[modulus(x, wavelet) for wavelet in wavelets[j]] for j in range(scale)]
    out = [smooth(x), *(smooth(u) for layer in layers for u in layer)]
    for j in range(scale):
        for coarser in range(j + 1, scale):
            out += [smooth(modulus(u, wavelet)) for u in layers[j] for wavelet in wavelets[coarser]]
    return np.stack(out)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_it_is_what_the_definition_says(scale: int) -> None:
    x = image(64)
    fast, slow = scatter(x, scale, 8)[0].numpy(), by_definition(x[0].numpy(), scale, 8)
    assert fast.shape == slow.shape == (Scattering2D(scale).channels, 64 >> scale, 64 >> scale)
    errors = np.linalg.norm(fast - slow, axis=(1, 2)) / np.linalg.norm(slow, axis=(1, 2))
    assert np.linalg.norm(fast - slow) < 0.01 * np.linalg.norm(slow)  # what lies beyond the part of the spectrum that is kept
    assert np.median(errors) < 0.02


KYMATIO = {
    0: 0.443151,
    1: 0.0281949,
    4: 0.0868847,
    9: 0.0343340,
    12: 0.1143073,
    16: 0.0272738,
    17: 0.00203622,
    40: 0.00882929,
    80: 0.00283832,
}
"""Channel -> mean over the map of `kymatio.torch.Scattering2D(J=2, shape=(32, 32), L=8)`, kymatio 0.3.0, for the picture below."""


def test_the_numbers_are_those_of_kymatio() -> None:
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    x = (torch.sin(row * row / 40.0) * torch.cos(column / 3.0) + column / 32.0)[None, None]
    means = Scattering2D(2)(x)[0].mean(dim=(1, 2))
    torch.testing.assert_close(means[[*KYMATIO]], torch.tensor([*KYMATIO.values()]), rtol=1e-2, atol=0.0)


@quick
@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 3))
def test_a_shift_by_whole_cells_shifts_the_map(down: int, right: int, scale: int) -> None:
    x, step = image(32), 2**scale
    moved = scatter(x.roll((down * step, right * step), dims=(1, 2)), scale, 4)
    torch.testing.assert_close(moved, scatter(x, scale, 4).roll((down, right), dims=(2, 3)), rtol=1e-4, atol=1e-6)


def test_a_shift_by_one_pixel_changes_little_and_the_less_the_larger_the_scale() -> None:
    x = image(64)
    changes = []
    for scale in (1, 2, 3, 4):
        before, after = scatter(x, scale, 4), scatter(x.roll(1, dims=2), scale, 4)
        changes.append(float((after - before).norm() / before.norm()))
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 0.05 < float((x.roll(1, dims=2) - x).norm() / x.norm())


def test_a_quarter_turn_moves_the_directions_on_by_half() -> None:
    """Turned images have turned wavelets: with 4 directions in the half circle a quarter turn is two steps."""
    x = image(32)
    x = x - x.mean()
    turned = torch.roll(torch.rot90(x, 1, dims=(1, 2)), 1, dims=1)  # about the pixel at the origin
    first, after = (scatter(picture, 2, 4)[0, 1:9].unflatten(0, (2, 4)).mean(dim=(2, 3)) for picture in (x, turned))
    torch.testing.assert_close(after, first.roll(2, dims=1), rtol=1e-3, atol=1e-6)


@quick
@given(st.floats(0.1, 10.0), st.floats(-2.0, 2.0))
def test_contrast_scales_it_and_brightness_moves_the_mean_alone(contrast: float, brightness: float) -> None:
    x = image(32)
    before, after = scatter(x, 2, 4), scatter(contrast * x + brightness, 2, 4)
    before[:, 0] = before[:, 0] + brightness / contrast
    torch.testing.assert_close(after, contrast * before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_wavelets_cover_the_frequencies_and_add_next_to_no_energy(scale: int) -> None:
    """Littlewood-Paley: 1 - a <= |phi|^2 + sum (|psi(w)|^2 + |psi(-w)|^2) / 2 <= 1 + b (Bruna & Mallat 2013, eq. 4)."""
    energy = np.square(low_pass(64, scale))
    for j in range(scale):
        wavelets = np.square(morlet(64, j, 8)).sum(axis=0)
        energy += 0.5 * (wavelets + np.roll(np.flip(wavelets), 1, axis=(0, 1)))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    assert energy.max() < 1.05
    assert energy.min() > 0.1  # in the corners of the square of frequencies, where there is little to see
    assert energy[radius < WAVELET_FREQUENCY / (2 * np.pi)].min() > 0.4


def test_wavelets_have_no_mean_and_the_low_pass_keeps_it() -> None:
    assert all(np.abs(morlet(32, j, 8)[:, 0, 0]).max() < 1e-6 for j in range(3))
    assert low_pass(32, 3)[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize(("side", "scale"), [(32, 1), (33, 3), (47, 4), (32, 6)])
def test_every_image_size_is_taken(side: int, scale: int) -> None:
    features = Scattering2D(scale, 2)(torch.rand(2, 1, side, side))
    assert features.shape == (2, Scattering2D(scale, 2).channels, -(-side // 2**scale), -(-side // 2**scale))
    assert torch.isfinite(features).all()


def test_a_constant_image_has_its_value_and_no_waves() -> None:
    features = Scattering2D(3)(torch.full((1, 1, 40, 40), 0.7))
    torch.testing.assert_close(features[:, 0], torch.full((1, 5, 5), 0.7))
    assert features[:, 1:].abs().max() < 1e-5


def test_filters_made_in_inference_mode_serve_training_too() -> None:
    with torch.inference_mode():
        Scattering2D(2, 3)(torch.rand(1, 1, 36, 36))
    x = torch.rand(1, 1, 36, 36, requires_grad=True)
    Scattering2D(2, 3)(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_only_the_head_travels_and_is_trained() -> None:
    model = build_model(ModelConfig(name="scattering", scattering_scale=2), "binary", 0)
    layout = ArraysLayout.of(model)
    assert {entry.name for entry in layout.entries} == {"head.weight", "head.bias"}
    assert layout.statistic_count == 0
    assert all(set_trainable(model, freeze) == ("head.weight", "head.bias") for freeze in ("none", "last_block", "head_only"))


def features_of(images: torch.Tensor, name: ModelName = "scattering") -> torch.Tensor:
    model = build_model(ModelConfig(name=name, scattering_scale=2), "binary", 0).eval()
    seen: list[torch.Tensor] = []
    classifier_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    return seen[0]


@quick
@given(st.integers(0, 100), st.floats(0.8, 1.25))
def test_features_have_one_length_and_hardly_know_the_contrast(seed: int, contrast: float) -> None:
    """Mean square 1: no image's gradient is longer than another's of the same miss."""
    x = 5.0 * image(40, seed)[None]
    before, after = features_of(torch.cat([x, contrast * x]))
    torch.testing.assert_close(torch.stack([before, after]).square().mean(dim=1), torch.ones(2))
    assert before @ after > 0.95 * len(before)


def test_two_kinds_of_features_have_one_length() -> None:
    features = features_of(torch.stack([5.0 * image(40, seed) for seed in range(3)]), "imagenet_wavelets")
    learnt, wavelets = features[:, :1280], features[:, 1280:]
    for kind in (learnt, wavelets):
        torch.testing.assert_close(kind.square().sum(dim=1), torch.full((3,), features.shape[1] / 2))
    torch.testing.assert_close(learnt.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)


@quick
@given(st.integers(9, 70), st.integers(1, 3), st.integers(0, 100))
def test_in_real_numbers_it_is_the_same(side: int, scale: int, seed: int) -> None:
    layer, x = Scattering2D(scale, 4), image(side, seed)[None]
    expected = layer(x)
    with real_numbers(layer):
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(layer(x), expected)


def test_an_image_is_judged_alone() -> None:
    model = build_model(ModelConfig(name="scattering"), "binary", 0).train()
    torch.nn.init.normal_(classifier_of(model).weight, generator=torch.Generator().manual_seed(0))
    batch = torch.stack([image(32, seed) for seed in range(3)])
    torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]), rtol=1e-4, atol=1e-5)
