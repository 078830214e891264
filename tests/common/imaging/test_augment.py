"""Augmentation: parameters in range and pure, geometry against exact and scipy oracles, identities bit for bit."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from pneumofed.common.config.experiment import AugmentationConfig
from pneumofed.common.imaging.augment import AugmentationParameters, augment, draw_parameters, normalize, to_model_input
from pneumofed.common.models.compute import import_torchvision

NOTHING = AugmentationConfig(
    rotation_deg=0.0, shift_fraction=0.0, scale_fraction=0.0, brightness=0.0, contrast=0.0, noise_std=0.0
)
quick = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**31)
CONFIGS = st.builds(
    AugmentationConfig,
    rotation_deg=st.floats(0, 45),
    shift_fraction=st.floats(0, 0.5),
    scale_fraction=st.floats(0, 0.5),
    brightness=st.floats(0, 0.5),
    contrast=st.floats(0, 0.9),
    noise_std=st.floats(0, 0.5),
    horizontal_flip_probability=st.floats(0, 1),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(n: int, size_px: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, size_px, size_px, generator=generator(seed))


def parameters_of(n: int, **changes: Any) -> AugmentationParameters:
    return replace(draw_parameters(n, NOTHING, generator(0)), **changes)


def values_of(parameters: AugmentationParameters) -> list[object]:
    values = [getattr(parameters, field.name) for field in fields(parameters)]
    return [value.tolist() if isinstance(value, Tensor) else value for value in values]


@quick
@given(SEEDS, CONFIGS)
def test_parameters_are_pure_in_the_generators_state_and_lie_in_range(seed: int, cfg: AugmentationConfig) -> None:
    p = draw_parameters(5, cfg, generator(seed))
    assert values_of(p) == values_of(draw_parameters(5, cfg, generator(seed)))
    slack = 1e-6
    assert p.angle_rad.abs().max() <= math.radians(cfg.rotation_deg) + slack
    assert p.shift.shape == (5, 2) and p.shift.abs().max() <= cfg.shift_fraction + slack
    assert (p.scale - 1).abs().max() <= cfg.scale_fraction + slack
    assert (p.contrast - 1).abs().max() <= cfg.contrast + slack
    assert p.brightness.abs().max() <= cfg.brightness + slack
    assert p.noise_std.min() >= 0 and p.noise_std.max() <= cfg.noise_std + slack


@quick
@given(SEEDS)
def test_switching_one_transform_off_leaves_the_draws_of_the_others(seed: int) -> None:
    full = draw_parameters(4, AugmentationConfig(), generator(seed))
    still = draw_parameters(4, AugmentationConfig(rotation_deg=0.0), generator(seed))
    assert torch.equal(full.shift, still.shift) and torch.equal(full.contrast, still.contrast)
    assert full.noise_seed == still.noise_seed


@quick
@given(SEEDS)
def test_zero_ranges_give_the_images_bit_for_bit(seed: int) -> None:
    images = images_of(3, seed=seed)
    assert torch.equal(augment(images, draw_parameters(3, NOTHING, generator(seed))), images)


@quick
@given(SEEDS, CONFIGS)
def test_result_is_deterministic_in_range_and_spares_its_input(seed: int, cfg: AugmentationConfig) -> None:
    images = images_of(3, seed=seed)
    before, parameters = images.clone(), draw_parameters(3, cfg, generator(seed))
    result = augment(images, parameters)
    assert torch.equal(result, augment(images, parameters))
    assert torch.equal(images, before)
    assert result.shape == images.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1


@quick
@given(st.integers(-5, 5), st.integers(-5, 5))
def test_shift_by_whole_pixels_moves_right_and_down_and_leaves_black(right: int, down: int) -> None:
    images = images_of(2)
    moved = augment(images, parameters_of(2, shift=torch.tensor([[right / 16, down / 16]] * 2)))
    expected = np.stack([ndimage.shift(image[0].numpy(), (down, right), order=0) for image in images])
    np.testing.assert_allclose(moved[:, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_go_counter_clockwise(quarters: int) -> None:
    images = images_of(2)
    turned = augment(images, parameters_of(2, angle_rad=torch.full((2,), quarters * math.pi / 2)))
    torch.testing.assert_close(turned, images.rot90(quarters, (2, 3)), atol=1e-5, rtol=0)


@quick
@given(SEEDS)
def test_geometry_is_scipys_affine_transform(seed: int) -> None:
    cfg = NOTHING.model_copy(update={"rotation_deg": 30.0, "shift_fraction": 0.2, "scale_fraction": 0.3})
    p = draw_parameters(1, cfg, generator(seed))
    images = images_of(1, 21, seed)
    cos, sin = math.cos(p.angle_rad.item()), math.sin(p.angle_rad.item())
    matrix = np.array([[cos, sin], [-sin, cos]]) / p.scale.item()  # rows and columns, from output to input
    center, shift = np.array([10.0, 10.0]), p.shift[0].numpy()[::-1] * 21
    padded = np.pad(images[0, 0].numpy(), 30)
    offset = center + 30 - matrix @ (center + shift)
    expected = ndimage.affine_transform(padded, matrix, offset, output_shape=(21, 21), order=1)
    np.testing.assert_allclose(augment(images, p)[0, 0].numpy(), expected, atol=1e-4)


@quick
@given(SEEDS)
def test_mirror_swaps_left_and_right_of_the_drawn_images_alone(seed: int) -> None:
    cfg = NOTHING.model_copy(update={"horizontal_flip_probability": 0.5})
    parameters, images = draw_parameters(6, cfg, generator(seed)), images_of(6)
    for mirrored, image, flip in zip(augment(images, parameters), images, parameters.flip, strict=True):
        assert torch.equal(mirrored, image.flip(-1) if flip else image)


@quick
@given(SEEDS)
def test_contrast_keeps_middle_grey_and_brightness_adds(seed: int) -> None:
    cfg = NOTHING.model_copy(update={"contrast": 0.5, "brightness": 0.3})
    p, images = draw_parameters(4, cfg, generator(seed)), images_of(4)
    expected = (images - 0.5) * p.contrast.view(-1, 1, 1, 1) + 0.5 + p.brightness.view(-1, 1, 1, 1)
    torch.testing.assert_close(augment(images, p), expected.clamp(0, 1))


def test_noise_is_normal_with_the_deviation_of_each_image() -> None:
    std = torch.tensor([0.0, 0.01, 0.05])
    grey = torch.full((3, 1, 200, 200), 0.5)
    noise = augment(grey, parameters_of(3, noise_std=std)) - 0.5
    assert noise[0].abs().max() == 0
    for one, expected in zip(noise[1:], std[1:], strict=True):
        assert one.mean().abs() < 4 * expected / 200
        assert one.std() == pytest.approx(float(expected), rel=0.02)
        assert (one.abs() < expected).float().mean() == pytest.approx(0.6827, abs=0.01)
    assert torch.corrcoef(noise[1:].flatten(1))[0, 1].abs() < 0.03


@quick
@given(st.integers(0, 3), SEEDS)
def test_model_input_is_a_copy_of_the_pixels_between_0_and_1(n: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 5, 5), dtype=np.uint8)
    pixels.flags.writeable = False
    images = to_model_input(pixels)
    assert images.shape == (n, 1, 5, 5) and images.dtype == torch.float32
    np.testing.assert_array_equal((images[:, 0] * 255).round().numpy(), pixels)
    assert torch.equal(images, to_model_input(torch.tensor(pixels)))


@pytest.mark.parametrize("in_channels", [1, 3])
def test_normalized_images_hold_the_grey_image_in_every_channel(in_channels: int) -> None:
    import_torchvision()
    from torchvision.transforms.functional import normalize as reference

    images = images_of(3)
    mean, std = ([0.449], [0.226]) if in_channels == 1 else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = reference(images.expand(-1, in_channels, -1, -1), mean, std)
    torch.testing.assert_close(normalize(images, in_channels), expected)
