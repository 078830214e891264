"""Markers, borders and style: what is erased and what is left, one image's result without the others, and no draw taken from the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from pneumofed.common.config.experiment import AugmentationConfig
from pneumofed.common.imaging.augment import (
    MARKER_BRIGHTER,
    MARKER_HEIGHT,
    MARKER_RING,
    MARKER_STROKE,
    MARKER_WIDTH,
    STYLE_CYCLES,
    WIDEST_BORDER,
    augment,
    change_style,
    draw_log_factors,
    draw_parameters,
    erase_borders,
    erase_markers,
)

quick = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**31)
SIDES = st.sampled_from([32, 45, 64])
STILL = dict.fromkeys(AugmentationConfig.model_fields, 0.0)


def images_of(n: int, side: int, seed: int) -> Tensor:
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


def factors(n: int, seed: int, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    uniform = torch.rand(n, 1 + (STYLE_CYCLES + 1) ** 2, generator=torch.Generator().manual_seed(seed))
    drawn = draw_log_factors(uniform, strength)
    return drawn[:, 0], drawn[:, 1:].reshape(n, STYLE_CYCLES + 1, STYLE_CYCLES + 1)


@quick
@given(SIDES, SEEDS, st.floats(0, 0.4))
def test_an_erased_border_is_black_and_the_rest_is_as_it_was(side: int, seed: int, width: float) -> None:
    images = images_of(2, side, seed)
    erased, border = erase_borders(images, torch.tensor([width, 0.0])), int((torch.tensor(width) * side).round())
    inner = np.s_[:, border : side - border, border : side - border]
    assert torch.equal(erased[0][inner], images[0][inner]) and torch.equal(erased[1], images[1])
    assert erased[0].sum() == pytest.approx(float(images[0][inner].sum()), rel=1e-5)
    assert torch.equal(erase_borders(erased, torch.tensor([width, 0.0])), erased)


def sparse(side: int, seed: int) -> Tensor:
    """Dark with bright specks and lines, some of which touch: components of all sizes and places."""
    generator = np.random.default_rng(seed)
    picture = np.full((side, side), 0.1, np.float32)
    for _ in range(12):
        top, left = generator.integers(0, side, 2)
        height, width = (
            generator.integers(1, max(2, side // 4), 2) if generator.random() < 0.5 else (1, generator.integers(1, side))
        )
        picture[top : top + min(height, 3), left : left + width] = generator.uniform(0.2, 1.0)
    return torch.from_numpy(picture)[None, None]


@quick
@given(SIDES, SEEDS)
def test_markers_are_erased_once_for_all_and_only_near_the_edges(side: int, seed: int) -> None:
    images = sparse(side, seed)
    erased = erase_markers(images)
    assert (erased <= images).all() and torch.equal(erase_markers(erased), erased)
    ring = round(MARKER_RING * side)
    middle = np.s_[:, :, ring : side - ring, ring : side - ring]
    assert torch.equal(erased[middle], images[middle])


@quick
@given(SIDES, SEEDS)
def test_markers_are_the_small_outer_components_of_scipys_white_top_hat(side: int, seed: int) -> None:
    image = sparse(side, seed)[0, 0].numpy()
    size, ring = 2 * max(1, round(MARKER_STROKE * side / 2)) + 1, round(MARKER_RING * side)
    erosion = ndimage.minimum_filter(image, size, mode="constant", cval=np.inf)
    opened = ndimage.maximum_filter(erosion, size, mode="constant", cval=-np.inf)
    rim = ndimage.binary_dilation(image - opened > MARKER_BRIGHTER, np.ones((3, 3)))
    expected = image.copy()
    numbered, count = ndimage.label(rim, np.ones((3, 3)))
    for number in range(1, count + 1):
        rows, columns = np.nonzero(numbered == number)
        in_ring = rows.max() < ring or rows.min() >= side - ring or columns.max() < ring or columns.min() >= side - ring
        if np.ptp(rows) + 1 <= MARKER_HEIGHT * side and np.ptp(columns) + 1 <= MARKER_WIDTH * side and in_ring:
            expected[rows, columns] = opened[rows, columns]
    np.testing.assert_array_equal(erase_markers(torch.from_numpy(image)[None, None])[0, 0].numpy(), expected)


def test_a_letter_goes_the_gradient_under_it_comes_back_and_a_rib_stays() -> None:
    rows, columns = np.indices((96, 96), dtype=np.float32)
    plain = torch.from_numpy(0.2 + 0.2 * rows / 96 + 0.1 * columns / 96)[None, None]
    plain[..., 88:90, 5:60] = 0.9
    lettered = plain.clone()
    lettered[..., 8:16, 10:12] = lettered[..., 8:10, 10:16] = 1.0
    assert (erase_markers(lettered) - plain).abs().max() < 0.05
    assert torch.equal(erase_markers(plain), plain)


@quick
@given(SIDES, SEEDS)
def test_style_keeps_the_phases_the_mean_and_all_higher_frequencies(side: int, seed: int) -> None:
    """Against a full two-sided transform of numpy; the image stays well inside [0, 1], so that nothing is cut."""
    image = 0.45 + 0.1 * images_of(1, side, seed)
    _, amplitude = factors(1, seed)
    changed = change_style(image, torch.zeros(1), amplitude)
    before, after = (np.fft.fft2(one[0, 0].double().numpy()) for one in (image, changed))
    cycles = np.abs(np.fft.fftfreq(side, 1 / side)).round().astype(int)
    down, across = np.meshgrid(cycles, cycles, indexing="ij")
    low = (down <= STYLE_CYCLES) & (across <= STYLE_CYCLES) & (down + across > 0)
    expected = before.copy()
    expected[low] *= np.exp(amplitude[0].double().numpy())[down[low], across[low]]
    np.testing.assert_allclose(after, expected, atol=1e-3)
    assert changed.mean() == pytest.approx(float(image.mean()), abs=1e-5)


@quick
@given(SEEDS, st.floats(0.1, 1.0))
def test_gamma_and_amplitudes_lie_between_a_half_and_twice_at_full_strength(seed: int, strength: float) -> None:
    gamma, amplitude = factors(50, seed, strength)
    for drawn in (gamma, amplitude):
        assert drawn.exp().min() >= 2**-strength - 1e-6 and drawn.exp().max() <= 2**strength + 1e-6
    grey = torch.full((50, 1, 32, 32), 0.5)
    np.testing.assert_allclose(change_style(grey, gamma, amplitude)[:, 0, 3, 5], 0.5 ** gamma.exp(), atol=1e-5)


@quick
@given(SEEDS, st.sampled_from(["style", "erase_borders", "erase_markers"]))
def test_an_images_result_depends_on_no_other_image(seed: int, key: str) -> None:
    """Private training clips each image's gradient; it must not hold anything of the others."""
    images, cfg = torch.cat([sparse(48, seed + number) for number in range(4)]), AugmentationConfig(**{**STILL, key: 1.0})
    images[:, :, 4:7, 8:9] = 1.0
    parameters = draw_parameters(4, cfg, torch.Generator().manual_seed(seed))
    others = images.clone()
    others[1:] = images_of(3, 48, seed + 1)
    torch.testing.assert_close(augment(images, parameters)[0], augment(others, parameters)[0], atol=1e-6, rtol=0)
    assert not torch.equal(augment(images, parameters), images)


@quick
@given(SEEDS)
def test_the_new_draws_leave_the_views_of_older_experiments_as_they_were(seed: int) -> None:
    plain, all_on = (torch.Generator().manual_seed(seed) for _ in range(2))
    before = draw_parameters(6, AugmentationConfig(), plain)
    after = draw_parameters(6, AugmentationConfig(style=1.0, erase_borders=1.0, erase_markers=1.0), all_on)
    assert torch.equal(plain.get_state(), all_on.get_state()) and before.noise_seed == after.noise_seed
    assert torch.equal(before.shift, after.shift) and torch.equal(before.noise_std, after.noise_std)
    assert not (before.markers.any() or before.border.any() or before.log_gamma.any() or before.log_amplitude.any())


@quick
@given(SEEDS, st.floats(0.2, 0.8))
def test_probabilities_are_those_asked_for_and_borders_have_all_widths(seed: int, probability: float) -> None:
    cfg = AugmentationConfig(erase_borders=probability, erase_markers=probability)
    drawn = draw_parameters(4000, cfg, torch.Generator().manual_seed(seed))
    for chosen in (drawn.markers, drawn.border > 0):
        assert float(chosen.float().mean()) == pytest.approx(probability, abs=0.05)
    assert drawn.border.max() <= WIDEST_BORDER
    assert drawn.border[drawn.border > 0].mean() == pytest.approx(WIDEST_BORDER / 2, rel=0.1)
